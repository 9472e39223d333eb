"""Whether a converted graph is right: what lies in its files, and what MNN computes from them.

First every weight is read back from the finished files and held against the bundle's, norms and tables bit for bit.
Then MNN runs the graph in a process of its own (a damaged file can end it), and onnxruntime the bundle's graph with
exactly the weights that were read back: in normal memory mode nothing but the order of float32 sums may differ,
whatever the bits.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from glmexport import names
from glmexport.convert.mnn_graph import Laid
from glmexport.convert.mnn_sources import FloatSource, Source
from glmexport.convert.plain_graph import PlainGraph
from glmexport.errors import ExportError
from glmexport.interface import GraphSpec
from glmexport.mnn.matrix import FileBytes, StoredMatrix
from glmexport.mnn.module import LOW, NORMAL, run_request
from glmexport.mnn.process import last_line, run_apart
from glmexport.mnn.rounding import is_nearest
from glmexport.mnn.session import as_mnn_takes
from glmexport.mnn.vectors import complaint_of_vectors
from glmexport.onnx_files import Array

Weights = dict[str, Array]
"""Name -> matrix float32 [inputs, outputs], or bias [outputs]."""

NORMAL_BOUND = 2e-5
"""‖error‖ / ‖reference‖ of an output where weights are the same numbers: measured 1e-7 to 1e-6."""

LOW_BOUND = 0.1
"""The same with activations rounded to 8 bits: 0.2 to 1 % each time, and a saturated softmax multiplies it. It finds a
kernel that reads a layout wrongly, which is 100 % off and more."""

NORMAL_BYTES = 1 << 30
"""A graph whose matrices take more than this as float32 is run in low memory mode alone, as it would be in use."""

CASES = ((1, 5, 0), (1, 1, 5), (1, 9, 3), (2, 3, 0), (2, 2, 4))
"""(batch, seq, past): none of them traced; a history of length 0, and one."""

PART_BYTES = 1 << 27
"""Of a head's matrix that the reference holds at a time."""

TURNED_ROWS = 16
TIMEOUT = 900.0


def check_weights(
    beside: Path, laid: Sequence[Laid], plain: PlainGraph, sources: Mapping[str, Source], *, keep: bool
) -> Weights:
    """Hold every weight of a finished file against the bundle's; returns them.

    beside: the file beside the model. keep: whether to return the matrices whole, as `check_numbers` needs them for a
    block; those of a head are read again in bands. Raises ExportError, which names the matrix.
    """
    kept: dict[str, Array] = {}
    for one in laid:
        product, source = one.product, sources[one.product.matrix]
        stored = StoredMatrix(FileBytes(beside, one.offset), one.stored)
        bias = np.zeros(product.outputs, np.float32) if product.bias is None else plain.vectors[product.bias]
        wrong = not np.array_equal(stored.bias, bias)
        whole = np.empty((product.inputs, product.outputs) if keep else (0, 0), np.float32)
        first = 0
        for rows in source.bands():
            found = stored.rows(first, len(rows))
            wrong |= not is_nearest(found, rows, one.stored, rounded=isinstance(source, FloatSource))
            if keep:
                for start in range(0, len(rows), TURNED_ROWS):  # in bands: numpy's copy of a whole one misses the cache
                    part = found[start : start + TURNED_ROWS]
                    whole[:, first + start : first + start + len(part)] = part.T
            first += len(rows)
        if wrong or first != product.outputs:
            raise ExportError(
                f"{product.matrix} was not written as the bundle has it; the disk or the memory may be damaged, "
                "convert again."
            )
        if keep:
            kept |= {product.matrix: whole} | ({} if product.bias is None else {product.bias: stored.bias})
    return kept


def check_vectors(model: Path, beside: Path, plain: PlainGraph) -> None:
    """Hold the norms and tables of a finished graph, which the converter copied, bit for bit against the bundle's.

    model, beside: the files. Raises ExportError, which names what differs.
    """
    floats = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in plain.model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    needed = {name: value for name, value in floats.items() if value.ndim == 1 and value.size > 1}
    complaint = complaint_of_vectors(model.read_bytes(), beside, needed, floats)
    if complaint:
        raise ExportError(f"{model.name}: the converter did not copy what the bundle has, {complaint}; convert again.")


def check_numbers(
    model: Path,
    beside: Path,
    laid: Sequence[Laid],
    plain: PlainGraph,
    weights: Weights,
    spec: GraphSpec,
    positions: int,
    memory: str,
) -> dict[str, float]:
    """Run a finished graph and its reference; returns memory mode -> worst ‖error‖ / ‖reference‖.

    model, beside: the files. weights: of `check_weights`, emptied once they are used. positions: ids of positions are
    below it. memory: the mode that the bundle is to be run in. Raises ExportError where the two differ by more than the
    mode's bound.
    """
    feeds = [_feeds(spec, positions, *case) for case in CASES]
    parts = _head_in_parts(beside, laid) if spec.kind == names.KIND_HEAD else iter([weights])
    expected = _reference(plain, spec, feeds, parts)
    weights.clear()  # their memory is MNN's turn
    if not all(np.isfinite(value).all() for case in expected for value in case.values()):
        raise ExportError(
            f"{model.name}: the bundle's own graph gives NaN or infinite numbers for ordinary inputs, which "
            "nothing can be held to; look at the checkpoint's weights."
        )
    bounds = _bounds(laid, memory)
    worst, found = {}, run_in_mnn(model, spec, feeds, [*bounds])
    for mode, bound in bounds.items():
        worst[mode] = max(_distance(ours, theirs) for ours, theirs in zip(found[mode], expected, strict=True))
        if not worst[mode] <= bound:
            normal = "; give --memory normal if it is the weights that rounded activations harm" * (mode == LOW)
            raise ExportError(
                f"{model.name} does not compute what its graph does: it is {worst[mode]:.1e} off in {mode} memory "
                f"mode, expected at most {bound:.0e}{normal}. Nothing was taken over: convert again, or with another "
                "MNN."
            )
    return worst


def _bounds(laid: Sequence[Laid], memory: str) -> dict[str, float]:
    """Modes to run a graph in -> what it may be off; low where it is to be used, or where normal is too large."""
    floats = 4 * sum(one.product.inputs * one.product.outputs for one in laid)
    if not any(one.stored.is_integers for one in laid):
        return {NORMAL: NORMAL_BOUND}
    if floats > NORMAL_BYTES:
        return {LOW: LOW_BOUND}
    return {NORMAL: NORMAL_BOUND, LOW: LOW_BOUND} if memory == LOW else {NORMAL: NORMAL_BOUND}


def _distance(found: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """Worst ‖error‖ / ‖reference‖ of the outputs, infinite for another shape; of a token how far its logit is off."""
    worst = 0.0
    for name, ours in found.items():
        reference = expected[names.LOGITS if name == names.TOKEN_ID else name]
        error: Any = np.inf
        if name == names.TOKEN_ID and ours.shape == reference.shape[:1]:
            missed = reference.max(-1) - np.take_along_axis(reference, ours.astype(np.int64)[:, None], -1)[:, 0]
            error = missed.max() / np.linalg.norm(reference)
        elif name != names.TOKEN_ID and ours.shape == reference.shape:
            error = np.linalg.norm(ours - reference) / (np.linalg.norm(reference) or 1.0)
        worst = float(np.maximum(worst, error))  # NaN stays
    return worst


def _feeds(spec: GraphSpec, positions: int, batch: int, seq: int, past: int) -> dict[str, Array]:
    """Seeded inputs of a graph as its ONNX form takes them."""
    random = np.random.default_rng((batch, seq, past))
    sizes = {names.BATCH: batch, names.SEQ: seq, names.PAST_LENGTH: past, names.TOTAL: seq + past}
    feeds: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if tensor.dtype == "float32":
            feeds[tensor.name] = random.standard_normal(shape, dtype=np.float32)
        elif tensor.dtype == "bool":  # later places are hidden, as are some earlier ones of the second row
            hidden = np.triu(np.ones(shape[-2:], bool), past + 1)
            feeds[tensor.name] = np.broadcast_to(hidden, shape).copy()
            feeds[tensor.name][1:, :, past:, :1] = seq > 1
        else:
            feeds[tensor.name] = random.integers(0, min(positions, 512), shape)
    return feeds


def _reference(
    plain: PlainGraph, spec: GraphSpec, feeds: Sequence[Mapping[str, Array]], parts: Iterator[Weights]
) -> list[dict[str, Array]]:
    """What onnxruntime computes of the graph with these weights; parts: of a head, some of its outputs each."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(plain.with_inputs().SerializeToString(), options)
    outputs = [names.LOGITS] if spec.kind == names.KIND_HEAD else [tensor.name for tensor in spec.outputs]
    results: list[dict[str, list[Array]]] = [{name: [] for name in outputs} for _ in feeds]
    for weights in parts:
        for case, result in zip(feeds, results, strict=True):
            for name, value in zip(outputs, session.run(outputs, {**case, **weights}), strict=True):
                result[name].append(value)
    return [{name: np.concatenate(found, -1) for name, found in result.items()} for result in results]


def _head_in_parts(beside: Path, laid: Sequence[Laid]) -> Iterator[Weights]:
    """The matrix [inputs, outputs] of a head, some outputs at a time."""
    (one,) = laid
    stored = StoredMatrix(FileBytes(beside, one.offset), one.stored)
    inputs, outputs = one.product.inputs, one.product.outputs
    step = 2 * max(PART_BYTES // (8 * inputs), 1)
    for start in range(0, outputs, step):
        yield {one.product.matrix: np.ascontiguousarray(stored.rows(start, min(step, outputs - start)).T)}


def run_in_mnn(
    model: Path, spec: GraphSpec, feeds: Sequence[Mapping[str, Array]], memories: Sequence[str]
) -> dict[str, list[dict[str, Array]]]:
    """Memory mode -> outputs of a `.mnn` model for each of `feeds` (as ONNX takes them), computed in another process.

    Raises ExportError where that process fails or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="glmexport-mnn-") as folder:
        place = Path(folder)
        for number, case in enumerate(feeds):
            arrays: dict[str, Any] = {name: as_mnn_takes(value) for name, value in case.items()}
            np.savez(place / f"in-{number}.npz", **arrays)
        request = {
            "model": str(model.resolve()),
            "inputs": [tensor.name for tensor in spec.inputs],
            "outputs": [tensor.name for tensor in spec.outputs],
            "memories": [*memories],
            "count": len(feeds),
        }
        call = f"from {run_request.__module__} import run_request as run; run()"
        said, errors = place / "said", place / "errors"
        wrong = run_apart(["-c", call, json.dumps(request)], place, said, errors, timeout=TIMEOUT)
        if wrong:
            raise ExportError(f"{model.name} cannot be run by MNN: {wrong} ({last_line(errors, said)}).")
        return {memory: [_load(place / f"out-{memory}-{i}.npz") for i in range(len(feeds))] for memory in memories}


def _load(path: Path) -> dict[str, Array]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}
