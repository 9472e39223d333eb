"""A checkpoint -> the draft of its bundle: every graph of the patched model, weights in float32, nothing read yet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from glmexport import names
from glmexport.bundle import MAX_SMALL_BYTES
from glmexport.checkpoint import Checkpoint
from glmexport.config import ModelConfig
from glmexport.draft import BundleDraft, GraphDraft, MakeModel, Notice, ignore_notice
from glmexport.errors import CheckpointError
from glmexport.form import Form
from glmexport.graphs import GraphPart, patched_parts, stored_transposed
from glmexport.interface import opset_of
from glmexport.onnx_files import Array
from glmexport.patch import ModelPatch
from glmexport.stamping import buffer_values, external_shapes, skeleton_for, stamped_graph
from glmexport.tensors import SLICE_BYTES, ArrayTensor, Tensor, rows_per_slice
from glmexport.tools import tool_versions
from glmexport.untrusted import read_small_file

FLOAT16_OVERFLOW = 65520.0
"""Where rounding to the nearest float16 begins to give infinity; the largest float16 is 65504."""


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of a checkpoint in float32 or float16, or its transpose; a Matrix where it has two axes.

    notice: told once where a value is not finite. target: of `slices`, one of `interface.DTYPES`.
    """

    checkpoint: Checkpoint
    name: str
    transposed: bool
    notice: Notice
    target: str = "float32"

    @property
    def dtype(self) -> str:
        """As stored in a bundle."""
        return self.target

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored in a bundle."""
        shape = self.checkpoint.info(self.name).shape
        return shape[::-1] if self.transposed else shape

    def slices(self) -> Iterator[Array]:
        """Consecutive slices. Raises CheckpointError, for a number beyond float16 where that is the target too."""
        finite = True
        for part in self._turned() if self.transposed else self._rows():
            # a sum is not finite if any element is not; overflow of the sum itself is told apart by the slow check
            if finite and not torch.isfinite(part.sum()) and not torch.isfinite(part).all():
                finite = False
                self.notice(f"{self.name} holds NaN or infinite values; they are exported as they are.")
            yield self._narrowed(part).numpy()

    def bands(self) -> Iterator[Array]:
        """Consecutive float32 bands of rows in the checkpoint's orientation, of the stored numbers.

        Raises CheckpointError.
        """
        for part in self._rows():
            yield self._narrowed(part).float().numpy()

    def _narrowed(self, part: torch.Tensor) -> torch.Tensor:
        """A float32 slice in the target dtype, rounded to the nearest."""
        if self.target == "float32":
            return part
        if self.checkpoint.info(self.name).dtype != "float16":
            smallest, largest = torch.aminmax(part)  # either is NaN where any element is
            if not -FLOAT16_OVERFLOW < smallest <= largest < FLOAT16_OVERFLOW:
                beyond = part[torch.isfinite(part) & (part.abs() >= FLOAT16_OVERFLOW)]
                if len(beyond):
                    raise CheckpointError(
                        f"{self.name} holds {float(beyond[0])!r}, float16 ends at 65504: leave --dtype float16 out."
                    )
        return part.half()

    def _rows(self) -> Iterator[torch.Tensor]:
        width = math.prod(self.checkpoint.info(self.name).shape[1:])
        for rows in self.checkpoint.read_bands(self.name, rows_per_slice(width)):
            yield as_float32(rows)

    def _turned(self) -> Iterator[torch.Tensor]:
        whole = self.checkpoint.read(self.name)  # [out, in]
        outputs, inputs = whole.shape
        band = max(SLICE_BYTES // (4 * outputs), 1)
        for start in range(0, inputs, band):
            # cast first: turning float32 is five times faster than turning float16 or doing both at once
            yield as_float32(as_float32(whole[:, start : start + band]).t())


def as_float32(weights: torch.Tensor) -> torch.Tensor:
    """The same numbers, contiguous: numpy asks for large pages, without which new memory costs more than the cast."""
    result = torch.from_numpy(np.empty(tuple(weights.shape), np.float32))
    return result.copy_(weights)


def draft_of_checkpoint(
    checkpoint: Checkpoint,
    opset: int,
    argmax: str,
    tied: bool,
    notice: Notice = ignore_notice,
    dtype: str = "float32",
    flavors: tuple[str, ...] = (names.PORTABLE,),
) -> BundleDraft:
    """What a split of `checkpoint` writes.

    tied: whether head and embedding hold the same numbers (`checkpoint.heads_equal` reads both to tell).
    notice: takes sentences for the user while tensors are read. dtype: what the graphs compute in (`interface.DTYPES`).
    flavors: of the graphs, in the order of `names.FLAVORS`; weights lie as the portable ones would have them, always.
    """
    patch, config = checkpoint.patch, checkpoint.config
    parts = patched_parts(patch, config, argmax, dtype)
    flavored = {flavor: patched_parts(patch, config, argmax, dtype, flavor) for flavor in flavors}
    dtypes = sorted({checkpoint.weights.info(name).dtype for name in checkpoint.weights.names()})
    facts = {
        "architecture": patch.name,
        "tied": tied,
        "opset": opset,
        "argmax": argmax,
        "tokenizer": [path.name for path in checkpoint.tokenizer_files],
        "checkpoint": {"dtypes": dtypes, "bytes": checkpoint.weights.total_bytes},
        "tools": tool_versions(),
        "history": [],
    }
    graphs = tuple(
        GraphDraft(
            name=part.name,
            tensors=_tensors(checkpoint, part, notice, dtype),
            parameters=sum(parameter.numel() for parameter in part.module.parameters()),
            models={
                flavor: model_of_part(patch, config, of_flavor[place], argmax, opset_of(flavor, opset), dtype, flavor)
                for flavor, of_flavor in flavored.items()
            },
        )
        for place, part in enumerate(parts)
    )
    return BundleDraft(
        facts,
        config,
        Form(dtype=dtype, flavors=flavors),
        graphs,
        {path.name: read_small_file(path, MAX_SMALL_BYTES) for path in checkpoint.tokenizer_files},
    )


def model_of_part(
    patch: ModelPatch,
    config: ModelConfig,
    part: GraphPart,
    argmax: str,
    opset: int,
    dtype: str,
    flavor: str = names.PORTABLE,
) -> MakeModel:
    """A function that traces (once for each kind of graph) and gives the graph of a part without its weights."""

    def make() -> onnx.ModelProto:
        given = argmax if part.spec.kind == names.KIND_HEAD else "none"  # which the others are the same for
        return stamped_graph(part, skeleton_for(patch, config, part.spec.kind, given, opset, dtype, flavor))

    return make


def _tensors(checkpoint: Checkpoint, part: GraphPart, notice: Notice, dtype: str) -> tuple[Tensor, ...]:
    transposed = {part.checkpoint_name(slot) for slot in stored_transposed(part.module)}
    buffers = buffer_values(part)
    return tuple(
        ArrayTensor(name, buffers[name])
        if name in buffers
        else CheckpointTensor(checkpoint, name, name in transposed, notice, dtype)
        for name in external_shapes(part)
    )
