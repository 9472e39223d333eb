"""Checkpoint -> bundle: trace one skeleton per kind of graph, then stamp the weights in, one matrix at a time."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmexport import __version__, names
from glmexport.bundle import SCHEMA
from glmexport.bundle_writer import BundleWriter, check_output
from glmexport.checkpoint import Checkpoint, heads_equal
from glmexport.equivalence import check_patch
from glmexport.errors import BundleError, CheckpointError, ExportError
from glmexport.graph_lint import lint_graph
from glmexport.graphs import GraphPart, patched_parts, stored_transposed
from glmexport.interface import ARGMAX_MODES, DEFAULT_OPSET, OPSETS
from glmexport.onnx_files import Array, ExternalDataWriter, aligned_size
from glmexport.stamping import buffer_values, external_shapes, graph_entry, skeleton_for, stamped_graph
from glmexport.tools import tool_versions
from glmexport.trace import Skeleton

SLICE_BYTES = 16 << 20
"""Weights are cast and written in slices of about this many bytes, which stay in the processor's outer cache."""

GRAPH_FILE_BYTES = 16 << 10
"""Rough size of one graph file without its weights, for estimates."""

LIBRARY_BYTES = 850 << 20
"""What the process holds before any weight: interpreter, torch and its exporter, onnx (peak on Linux, rounded up)."""

Notice = Callable[[str], None]
Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class SplitOptions:
    """opset: of every graph. argmax: what the LM head gives, one of `interface.ARGMAX_MODES`."""

    opset: int = DEFAULT_OPSET
    argmax: str = "none"

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise ExportError(f"Opset {self.opset} cannot be exported, expected {OPSETS.start} to {OPSETS.stop - 1}.")
        if self.argmax not in ARGMAX_MODES:
            raise ExportError(f"argmax must be one of {', '.join(ARGMAX_MODES)}, found {self.argmax!r}.")


@dataclass(frozen=True)
class SplitPlan:
    """What a split will write and need; sizes in bytes. files: name -> size; graph files are estimates."""

    files: Mapping[str, int]
    peak_memory: int

    @property
    def disk(self) -> int:
        """Bytes that must be free where the bundle goes."""
        return sum(self.files.values())


def ignore_notice(message: str) -> None:
    """Drop a notice."""


def ignore_advance(graph: str, count: int) -> None:
    """Drop a progress report."""


def plan_split(checkpoint: Checkpoint, options: SplitOptions) -> SplitPlan:
    """Sizes of every file of the bundle, and peak memory, from shapes alone: no tensor is read."""
    files: dict[str, int] = {}
    largest_matrix = 0
    for part in patched_parts(checkpoint.patch, checkpoint.config, options.argmax):
        for slot in stored_transposed(part.module):
            largest_matrix = max(largest_matrix, checkpoint.info(part.checkpoint_name(slot)).nbytes)
        lengths = [4 * math.prod(shape) for shape in external_shapes(part).values()]
        files[names.graph_file(part.name)] = GRAPH_FILE_BYTES
        files[names.data_file(part.name)] = aligned_size(lengths)
    files |= {path.name: path.stat().st_size for path in checkpoint.tokenizer_files}
    files[names.MANIFEST] = 2048 * (checkpoint.config.num_blocks + 2)
    in_flight = 8 * SLICE_BYTES  # slices being cast, hashed and written
    return SplitPlan(files, LIBRARY_BYTES + largest_matrix + in_flight)


def split(
    checkpoint: Checkpoint,
    output: Path,
    options: SplitOptions | None = None,
    *,
    force: bool = False,
    notice: Notice = ignore_notice,
    advance: Advance = ignore_advance,
) -> Path:
    """Write the bundle of `checkpoint` to `output` and return its path.

    notice: takes sentences for the user. advance: takes (graph, bytes written) as weights are written.
    Raises BundleError where the output may not be written or the disk is too small (before starting), CheckpointError
    for weights that cannot be read, ExportError where a graph is not what it must be. No error leaves anything behind.
    """
    options = options or SplitOptions()
    check_output(output, force=force)
    check_apart(checkpoint.directory, output)
    plan = plan_split(checkpoint, options)
    _check_disk(output, plan.disk)
    for warning in checkpoint.warnings:
        notice(warning)
    advance("check patches", 0)
    check_patch(checkpoint.patch, checkpoint.config)
    patch, config = checkpoint.patch, checkpoint.config
    with BundleWriter(output, force=force) as writer:
        entries: list[dict[str, Any]] = []
        for part in patched_parts(patch, config, options.argmax):
            advance(part.name, 0)
            skeleton = skeleton_for(patch, config, part.spec.kind, options.argmax, options.opset)
            entries.append(_Stamper(checkpoint, writer, part, notice, advance).write(skeleton, options))
        tied = _tied(checkpoint, notice)
        for path in checkpoint.tokenizer_files:
            writer.write_bytes(path.name, path.read_bytes())
        advance(names.MANIFEST, 0)
        return writer.commit(_manifest(checkpoint, options, entries, tied))


class _Stamper:
    """Writes one graph and its weights."""

    def __init__(
        self, checkpoint: Checkpoint, writer: BundleWriter, part: GraphPart, notice: Notice, advance: Advance
    ) -> None:
        self._checkpoint, self._writer, self._part = checkpoint, writer, part
        self._notice, self._advance = notice, advance

    def write(self, skeleton: Skeleton, options: SplitOptions) -> dict[str, Any]:
        """Write `<graph>.onnx.data` and `<graph>.onnx`, lint them, and return the graph's entry in the manifest."""
        part = self._part
        data_name, graph_name = names.data_file(part.name), names.graph_file(part.name)
        values, shapes = buffer_values(part), external_shapes(part)
        transposed = {part.checkpoint_name(slot) for slot in stored_transposed(part.module)}
        with self._writer.create(data_name) as sink:
            data = ExternalDataWriter(sink, data_name)
            for name, shape in shapes.items():
                slices = [values[name]] if name in values else self._parameter(name, name in transposed)
                data.add(name, "float32", shape, slices)
        model = stamped_graph(part, skeleton, data.tensors)
        self._writer.write_bytes(graph_name, model.SerializeToString(deterministic=True))
        complaints = lint_graph(self._writer.path(graph_name), part.spec, options.opset)
        if complaints:
            raise ExportError("A graph breaks the bundle's rules, so nothing was exported: " + " ".join(complaints))
        return graph_entry(part, model)

    def _parameter(self, name: str, transposed: bool) -> Iterator[Array]:
        """Consecutive float32 slices of a checkpoint tensor, warning once where it is not finite."""
        finite = True
        for part in _float32_slices(self._checkpoint, name, transposed):
            # a sum is not finite if any element is not; overflow of the sum itself is told apart by the slow check
            if finite and not torch.isfinite(part.sum()) and not torch.isfinite(part).all():
                finite = False
                self._notice(f"{name} holds NaN or infinite values; they are exported as they are.")
            yield part.numpy()
            self._advance(self._part.name, part.nbytes)


def _float32_slices(checkpoint: Checkpoint, name: str, transposed: bool) -> Iterator[torch.Tensor]:
    """Contiguous float32 slices of a tensor, or of its transpose, in row-major order.

    A transposed matrix is read whole in its stored dtype, then cast and turned in bands; the rest is read in bands.
    """
    if transposed:
        whole = checkpoint.read(name)  # [out, in]
        outputs, inputs = whole.shape
        band = max(SLICE_BYTES // (4 * outputs), 1)
        for start in range(0, inputs, band):
            # cast first: turning float32 is five times faster than turning float16 or doing both at once
            yield whole[:, start : start + band].float().t().contiguous()
        return
    width = math.prod(checkpoint.info(name).shape[1:])
    for rows in checkpoint.read_bands(name, max(SLICE_BYTES // (4 * width), 1)):
        yield rows.float()


def _tied(checkpoint: Checkpoint, notice: Notice) -> bool:
    """Whether head and embedding are the same numbers; detected, never assumed."""
    tied = heads_equal(checkpoint)
    if not tied:
        notice(
            f"{checkpoint.head_name} differs from {checkpoint.embedding_name}: the checkpoint's own head is exported, "
            f"while the original's from_pretrained silently replaces it by the embedding."
        )
    return tied


def _manifest(
    checkpoint: Checkpoint, options: SplitOptions, graphs: list[dict[str, Any]], tied: bool
) -> dict[str, Any]:
    dtypes = sorted({checkpoint.weights.info(name).dtype for name in checkpoint.weights.names()})
    return {
        "schema": SCHEMA,
        "glmexport": __version__,
        "architecture": checkpoint.patch.name,
        "model": dataclasses.asdict(checkpoint.config),
        "tied": tied,
        "opset": options.opset,
        "argmax": options.argmax,
        "graphs": graphs,
        "tokenizer": [path.name for path in checkpoint.tokenizer_files],
        "checkpoint": {"dtypes": dtypes, "bytes": checkpoint.weights.total_bytes},
        "tools": tool_versions(),
        "history": [{"step": "split", **dataclasses.asdict(options), "transforms": _transforms(checkpoint)}],
    }


def _transforms(checkpoint: Checkpoint) -> list[str]:
    return [transform.name for transform in checkpoint.patch.transforms]


def check_apart(checkpoint: Path, output: Path) -> None:
    """Raise BundleError or CheckpointError where one of the two directories would lie in the other."""
    source, target = checkpoint.resolve(), output.resolve()
    if target == source or source in target.parents:
        raise BundleError(f"{output} lies inside the checkpoint directory {checkpoint}; choose an output outside it.")
    if target in source.parents:
        raise CheckpointError(f"The checkpoint {checkpoint} lies inside the output {output}; choose another output.")


def _check_disk(output: Path, needed: int) -> None:
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BundleError(
            f"{place} has {free / 1e6:,.1f} MB free and the bundle needs {needed / 1e6:,.1f} MB; free some or choose "
            f"another output."
        )
