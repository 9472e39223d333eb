"""Checkpoint -> bundle: trace one skeleton per kind of graph, then stamp the weights in, one matrix at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmexport import __version__, names
from glmexport.bundle import SCHEMA, BundleWriter, check_output
from glmexport.checkpoint import Checkpoint
from glmexport.equivalence import check_patch
from glmexport.errors import BundleError, CheckpointError, ExportError
from glmexport.graph_lint import OPSETS, lint_graph, operator_inventory
from glmexport.graphs import GraphPart, graph_parts, stored_transposed
from glmexport.interface import ARGMAX_MODES, GraphSpec
from glmexport.onnx_files import Array, ExternalDataWriter, aligned_size, stamp
from glmexport.trace import DEFAULT_OPSET, Skeleton, trace

SLICE_BYTES = 16 << 20
"""Weights are cast and written in slices of about this many bytes, which stay in the processor's outer cache."""

GRAPH_FILE_BYTES = 16 << 10
"""Rough size of one graph file without its weights, for estimates."""

LIBRARY_BYTES = 700 << 20
"""What the process holds before any weight: interpreter, torch and its exporter, onnx (peak on Linux, rounded up)."""

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxsim", "onnxruntime", "numpy")

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
    for part in _parts(checkpoint, options):
        transposed = stored_transposed(part.module)
        lengths = []
        for slot, tensor in part.module.named_parameters():
            lengths.append(tensor.numel() * 4)
            if slot in transposed:
                largest_matrix = max(largest_matrix, checkpoint.info(part.checkpoint_name(slot)).nbytes)
        lengths += [buffer.numel() * 4 for _, buffer in part.module.named_buffers() if buffer.numel() > 1]
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
    _check_apart(checkpoint.directory, output)
    plan = plan_split(checkpoint, options)
    _check_disk(output, plan.disk)
    for warning in checkpoint.warnings:
        notice(warning)
    advance("check patches", 0)
    check_patch(checkpoint.patch, checkpoint.config)
    parts = _parts(checkpoint, options)
    with BundleWriter(output, force=force) as writer:
        skeletons: dict[str, Skeleton] = {}
        entries: list[dict[str, Any]] = []
        digests: dict[str, str] = {}
        for part in parts:
            if part.spec.kind not in skeletons:
                advance(f"trace {part.spec.kind}", 0)
                skeletons[part.spec.kind] = trace(part.module, part.spec, options.opset)
            stamper = _Stamper(checkpoint, writer, part, notice, advance)
            entries.append(stamper.write(skeletons[part.spec.kind], options))
            digests |= stamper.digests
        tied = _tied(checkpoint, digests, notice)
        for path in checkpoint.tokenizer_files:
            writer.write_bytes(path.name, path.read_bytes())
        return writer.commit(_manifest(checkpoint, options, entries, tied))


def _parts(checkpoint: Checkpoint, options: SplitOptions) -> tuple[GraphPart, ...]:
    with torch.device("meta"):
        model = checkpoint.patch.build_reference(checkpoint.config)
        patched = checkpoint.patch.apply(model)
    return graph_parts(checkpoint.patch, checkpoint.config, patched, options.argmax)


class _Stamper:
    """Writes one graph and its weights."""

    def __init__(
        self, checkpoint: Checkpoint, writer: BundleWriter, part: GraphPart, notice: Notice, advance: Advance
    ) -> None:
        self._checkpoint, self._writer, self._part = checkpoint, writer, part
        self._notice, self._advance = notice, advance
        self._transposed = stored_transposed(part.module)
        self.digests: dict[str, str] = {}

    def write(self, skeleton: Skeleton, options: SplitOptions) -> dict[str, Any]:
        """Write `<graph>.onnx.data` and `<graph>.onnx`, lint them, and return the graph's entry in the manifest."""
        part = self._part
        data_name, graph_name = names.data_file(part.name), names.graph_file(part.name)
        parameters, buffers = dict(part.module.named_parameters()), dict(part.module.named_buffers())
        renames = {slot: part.checkpoint_name(slot) for slot in skeleton.slots}
        inline: dict[str, Array] = {}
        with self._writer.create(data_name) as sink:
            data = ExternalDataWriter(sink, data_name)
            for slot, name in renames.items():
                if slot in parameters:
                    slices = self._parameter(name, slot in self._transposed)
                    data.add(name, "float32", tuple(parameters[slot].shape), slices)
                elif buffers[slot].numel() > 1:
                    value = buffers[slot].numpy()
                    data.add(name, "float32", value.shape, [value])
                else:
                    inline[name] = buffers[slot].numpy()
        model = stamp(skeleton.model, part.name, renames, data.tensors, inline)
        self._writer.write_bytes(graph_name, model.SerializeToString(deterministic=True))
        complaints = lint_graph(self._writer.path(graph_name), part.spec, options.opset)
        if complaints:
            raise ExportError("A graph breaks the bundle's rules, so nothing was exported: " + " ".join(complaints))
        return _graph_entry(part) | {
            "operators": operator_inventory(model),
            "parameters": sum(parameter.numel() for parameter in parameters.values()),
            "transposed": sorted(renames[slot] for slot in self._transposed),
        }

    def _parameter(self, name: str, transposed: bool) -> Iterator[Array]:
        """Consecutive float32 slices of a checkpoint tensor, warning once where it is not finite."""
        digest, finite = hashlib.sha256(), True
        compare = name in (self._checkpoint.embedding_name, self._checkpoint.head_name)
        for part in _float32_slices(self._checkpoint, name, transposed):
            # a sum is not finite if any element is not; overflow of the sum itself is told apart by the slow check
            if finite and not torch.isfinite(part.sum()) and not torch.isfinite(part).all():
                finite = False
                self._notice(f"{name} holds NaN or infinite values; they are exported as they are.")
            array = part.numpy()
            if compare:
                digest.update(array.data.cast("B"))
            yield array
            self._advance(self._part.name, array.nbytes)
        if compare:
            self.digests[name] = digest.hexdigest()


def _float32_slices(checkpoint: Checkpoint, name: str, transposed: bool) -> Iterator[torch.Tensor]:
    """Contiguous float32 slices of a tensor, or of its transpose, in row-major order.

    A transposed matrix is read whole in its stored dtype, then cast and turned in bands; the rest is read in bands.
    """
    info = checkpoint.info(name)
    if transposed:
        whole = checkpoint.read(name)  # [out, in]
        outputs, inputs = whole.shape
        band = max(SLICE_BYTES // (4 * outputs), 1)
        for start in range(0, inputs, band):
            # cast first: turning float32 is five times faster than turning float16 or doing both at once
            yield whole[:, start : start + band].float().t().contiguous()
        return
    rows = info.shape[0] if info.shape else 1
    width = int(np.prod(info.shape[1:], dtype=np.int64))
    band = max(SLICE_BYTES // (4 * max(width, 1)), 1)
    for start in range(0, rows, band):
        yield checkpoint.read_rows(name, start, min(start + band, rows)).to(torch.float32).contiguous()


def _tied(checkpoint: Checkpoint, digests: Mapping[str, str], notice: Notice) -> bool:
    """Whether head and embedding are the same numbers; detected, never assumed."""
    tied = digests[checkpoint.embedding_name] == digests[checkpoint.head_name]
    if not tied:
        notice(
            f"{checkpoint.head_name} differs from {checkpoint.embedding_name}: the checkpoint's own head is exported, "
            f"while the original's from_pretrained silently replaces it by the embedding."
        )
    return tied


def _graph_entry(part: GraphPart) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": part.name, "kind": part.spec.kind}
    block_id = names.block_id_of(part.name)
    if block_id is not None:
        entry["block_id"] = block_id
    return entry | {
        "file": names.graph_file(part.name),
        "data": names.data_file(part.name),
        **_signature(part.spec),
        "weights": "float32",
    }


def _signature(spec: GraphSpec) -> dict[str, Any]:
    return {
        "inputs": [dataclasses.asdict(tensor) for tensor in spec.inputs],
        "outputs": [dataclasses.asdict(tensor) for tensor in spec.outputs],
    }


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
        "tools": _tool_versions(),
        "history": [{"step": "split", **dataclasses.asdict(options), "transforms": _transforms(checkpoint)}],
    }


def _transforms(checkpoint: Checkpoint) -> list[str]:
    return [transform.name for transform in checkpoint.patch.transforms]


def _tool_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for tool in TOOLS:
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:
            versions[tool] = "not installed as a package"
    return versions


def _check_apart(checkpoint: Path, output: Path) -> None:
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
            f"{place} has {free / 1e9:.2f} GB free and the bundle needs {needed / 1e9:.2f} GB; free some or choose "
            f"another output."
        )
