"""Checkpoint -> bundle in its final form: the draft of the checkpoint, changed by passes, written once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glmexport.bundle_writer import check_output
from glmexport.checkpoint import Checkpoint, heads_equal
from glmexport.checkpoint_draft import draft_of_checkpoint
from glmexport.draft import BundleDraft, Notice, ignore_notice
from glmexport.draft_writer import Advance, check_disk, ignore_advance, new_bytes, write_bundle
from glmexport.equivalence import check_patch
from glmexport.errors import BundleError, CheckpointError, ExportError
from glmexport.interface import ARGMAX_MODES, DEFAULT_OPSET, OPSETS
from glmexport.passes import Pass
from glmexport.tensors import SLICE_BYTES

LIBRARY_BYTES = 850 << 20
"""What the process holds before any weight: interpreter, torch and its exporter, onnx (peak on Linux, rounded up)."""


@dataclass(frozen=True)
class SplitOptions:
    """opset: of every graph. argmax: what the LM head gives (`interface.ARGMAX_MODES`). passes: to the final form."""

    opset: int = DEFAULT_OPSET
    argmax: str = "none"
    passes: tuple[Pass, ...] = ()

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


def plan_split(checkpoint: Checkpoint, options: SplitOptions) -> SplitPlan:
    """Sizes of every file of the bundle, and peak memory, from shapes alone: no tensor is read.

    A head of its own is taken to equal the embedding, which only reading both would tell.
    """
    draft = _draft(checkpoint, options, tied=True, notice=ignore_notice)
    largest_matrix = max(checkpoint.info(name).nbytes for name in checkpoint.weights.names())
    in_flight = 8 * SLICE_BYTES  # slices being cast, hashed and written
    return SplitPlan(draft.sizes(), LIBRARY_BYTES + largest_matrix + in_flight)


def split(
    checkpoint: Checkpoint,
    output: Path,
    options: SplitOptions | None = None,
    *,
    force: bool = False,
    notice: Notice = ignore_notice,
    advance: Advance = ignore_advance,
) -> BundleDraft:
    """Write the bundle of `checkpoint` to `output` and return what was written.

    notice: takes sentences for the user. advance: takes (graph, bytes written) as weights are written.
    Raises BundleError where the output may not be written or the disk is too small (before starting), CheckpointError
    for weights that cannot be read, ExportError where a graph is not what it must be, and what the passes raise. No
    error leaves anything behind.
    """
    options = options or SplitOptions()
    check_output(output, force=force)
    check_apart(checkpoint.directory, output)
    check_disk(output, new_bytes(_draft(checkpoint, options, tied=True, notice=ignore_notice)))
    for warning in checkpoint.warnings:
        notice(warning)
    advance("check patches", 0)
    check_patch(checkpoint.patch, checkpoint.config)
    tied = heads_equal(checkpoint)
    if not tied:
        notice(
            f"{checkpoint.head_name} differs from {checkpoint.embedding_name}: the checkpoint's own head is exported, "
            f"while the original's from_pretrained silently replaces it by the embedding."
        )
    draft = _draft(checkpoint, options, tied, notice)
    write_bundle(draft, output, force=force, advance=advance)
    return draft


def _draft(checkpoint: Checkpoint, options: SplitOptions, tied: bool, notice: Notice) -> BundleDraft:
    draft = draft_of_checkpoint(checkpoint, options.opset, options.argmax, tied, notice)
    transforms = [transform.name for transform in checkpoint.patch.transforms]
    draft = draft.with_step("split", opset=options.opset, argmax=options.argmax, transforms=transforms)
    for step in options.passes:
        draft = step.apply(draft, notice)
    return draft


def check_apart(directory: Path, output: Path) -> None:
    """Raise BundleError or CheckpointError where one of the two directories would lie in the other."""
    source, target = directory.resolve(), output.resolve()
    if target == source or source in target.parents:
        raise BundleError(f"{output} lies inside the checkpoint directory {directory}; choose an output outside it.")
    if target in source.parents:
        raise CheckpointError(f"The checkpoint {directory} lies inside the output {output}; choose another output.")
