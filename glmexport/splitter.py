"""Checkpoint -> bundle in its final form: the draft of the checkpoint, changed by passes, written once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmexport import names
from glmexport.bundle_writer import HashingFile, check_output
from glmexport.checkpoint import Checkpoint, heads_equal
from glmexport.checkpoint_draft import draft_of_checkpoint
from glmexport.draft import BundleDraft, Notice, ignore_notice
from glmexport.draft_writer import Advance, Making, Resumable, check_disk, ignore_advance, new_bytes, write_bundle
from glmexport.equivalence import check_patch
from glmexport.errors import BundleError, CheckpointError, ExportError
from glmexport.form import FLOAT16
from glmexport.interface import ARGMAX_MODES, DEFAULT_OPSET, DTYPES, OPSETS
from glmexport.passes import Pass
from glmexport.tensors import SLICE_BYTES

LIBRARY_BYTES = 850 << 20
"""What the process holds before any weight: interpreter, torch and its exporter, onnx (peak on Linux, rounded up)."""


FLAVORS = {**{flavor: (flavor,) for flavor in names.FLAVORS}, "both": names.FLAVORS}
"""What `--flavor` takes -> flavors of the graphs."""


@dataclass(frozen=True)
class SplitOptions:
    """opset: of every graph. argmax: what the LM head gives (`interface.ARGMAX_MODES`). passes: to the final form.

    dtype: what the graphs compute in (`interface.DTYPES`). flavor: of `FLAVORS`.
    """

    opset: int = DEFAULT_OPSET
    argmax: str = "none"
    passes: tuple[Pass, ...] = ()
    dtype: str = "float32"
    flavor: str = names.PORTABLE

    @property
    def flavors(self) -> tuple[str, ...]:
        """The flavors of the graphs, of `names.FLAVORS` and in their order."""
        return FLAVORS[self.flavor]

    def __post_init__(self) -> None:
        if self.flavor not in FLAVORS:
            raise ExportError(f"flavor must be one of {', '.join(FLAVORS)}, found {self.flavor!r:.40}.")
        if self.dtype == FLOAT16 and names.ORT in self.flavors:
            raise ExportError(
                f"Graphs of the flavor {names.ORT} are for onnxruntime on processors, which has no float16 products: "
                "leave --dtype float16 or --flavor out."
            )
        if self.opset not in OPSETS:
            raise ExportError(f"Opset {self.opset} cannot be exported, expected {OPSETS.start} to {OPSETS.stop - 1}.")
        if self.argmax not in ARGMAX_MODES:
            raise ExportError(f"argmax must be one of {', '.join(ARGMAX_MODES)}, found {self.argmax!r}.")
        if self.dtype not in DTYPES:
            raise ExportError(f"dtype must be one of {', '.join(DTYPES)}, found {self.dtype!r:.40}.")


@dataclass(frozen=True)
class SplitPlan:
    """What a split will write and need; sizes in bytes. files: name -> size; graph files are estimates.

    shared: names of files that are others of these too, as flavors share their data.
    """

    files: Mapping[str, int]
    peak_memory: int
    shared: Collection[str] = ()

    @property
    def disk(self) -> int:
        """Bytes that must be free where the bundle goes."""
        return sum(size for name, size in self.files.items() if name not in self.shared)


def plan_split(checkpoint: Checkpoint, options: SplitOptions) -> SplitPlan:
    """Sizes of every file of the bundle, and peak memory, from shapes alone: no tensor is read.

    A head of its own is taken to equal the embedding, which only reading both would tell.
    """
    draft = _draft(checkpoint, options, tied=True, notice=ignore_notice)
    tables = {checkpoint.embedding_name, checkpoint.head_name}  # read in bands
    whole = max(checkpoint.info(name).nbytes for name in checkpoint.weights.names() if name not in tables)
    slices = Making.SLICES_AHEAD + 2  # one is being cast and one turned
    in_flight = Making.TENSORS_AT_ONCE * (whole + slices * SLICE_BYTES) + HashingFile.BLOCKS * HashingFile.BLOCK_BYTES
    return SplitPlan(draft.sizes(), LIBRARY_BYTES + in_flight, draft.shared_data())


def split(
    checkpoint: Checkpoint,
    output: Path,
    options: SplitOptions | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    notice: Notice = ignore_notice,
    advance: Advance = ignore_advance,
) -> BundleDraft:
    """Write the bundle of `checkpoint` to `output` and return what was written.

    resume: go on where a run that was killed or stopped has left off; graphs that it finished are taken over.
    notice: takes sentences for the user. advance: takes (graph, bytes written) as weights are written.
    Raises BundleError where the output may not be written, the disk is too small (before starting), or the run to be
    resumed was to make something else; CheckpointError for weights that cannot be read or change meanwhile; ExportError
    where a graph is not what it must be; and what the passes raise. What is left behind, `BundleWriter` says.
    """
    options = options or SplitOptions()
    check_output(output, force=force)
    check_apart(checkpoint.directory, output)
    if not resume:
        check_disk(output, new_bytes(_draft(checkpoint, options, tied=True, notice=ignore_notice)))
    for warning in checkpoint.warnings:
        notice(warning)
    advance("check patches", 0)
    check_patch(checkpoint.patch, checkpoint.config, options.dtype, options.flavors)
    tied = heads_equal(checkpoint)
    if not tied:
        notice(
            f"{checkpoint.head_name} differs from {checkpoint.embedding_name}: the checkpoint's own head is exported, "
            f"while the original's from_pretrained silently replaces it by the embedding."
        )
    draft = _draft(checkpoint, options, tied, notice)
    rounded = [dtype for dtype in draft.facts["checkpoint"]["dtypes"] if dtype not in (FLOAT16, options.dtype)]
    if options.dtype == FLOAT16 and rounded:
        notice(f"The checkpoint holds {' and '.join(rounded)}: every weight is rounded to the nearest float16.")

    def begun(found: bool) -> None:
        if not found:
            notice(f"There is no unfinished run of {output} to go on with; it is begun anew.")

    def check() -> None:
        changed = checkpoint.weights.changed()
        if changed:
            raise CheckpointError(f"{changed[0]} changed while it was read; split again when nothing writes to it.")

    resumable = Resumable(
        {**_identity(draft), "checkpoint": checkpoint.weights.state_when_opened}, resume, begun, check
    )
    write_bundle(draft, output, force=force, resumable=resumable, advance=advance)
    return draft


def _identity(draft: BundleDraft) -> dict[str, Any]:
    """What the bytes of a bundle follow from, beside the weights: its manifest, and its small files by hash."""
    small = {
        name: hashlib.sha256(content).hexdigest() for name, content in draft.files.items() if isinstance(content, bytes)
    }
    return {"bundle": {**draft.manifest([]), "graphs": [graph.name for graph in draft.graphs]}, "files": small}


def _draft(checkpoint: Checkpoint, options: SplitOptions, tied: bool, notice: Notice) -> BundleDraft:
    draft = draft_of_checkpoint(checkpoint, options.opset, options.argmax, tied, notice, options.dtype, options.flavors)
    patch = checkpoint.patch
    transforms = [transform.name for flavor in options.flavors for transform in patch.transforms_of(flavor)]
    transforms = [*dict.fromkeys(transforms)]
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
