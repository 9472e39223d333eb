"""What a bundle says of itself against what a split of the checkpoint would say: manifest, tokenizer, graphs.

Numbers cannot show everything. A layernorm epsilon, a constant or a row of the embedding can be wrong in ways that no
prompt of a verification meets, so each graph is compared with a fresh trace of the patched model, node by node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.checkpoint import Checkpoint, heads_equal
from glmexport.errors import BundleError
from glmexport.graphs import GraphPart, patched_parts
from glmexport.interface import OPSETS
from glmexport.onnx_files import external_tensors, holds, load_graph, rows_of
from glmexport.stamping import buffer_values, external_shapes, graph_entry, skeleton_for, stamped_graph
from glmexport.tools import EXPORT_TOOLS, tool_versions
from glmexport.verify.report import Row


def check_structure(bundle: Bundle, checkpoint: Checkpoint, advance: Callable[[str], None]) -> Iterator[Row]:
    """Rows for the manifest, the tokenizer and every graph; passing graphs share one row.

    advance: called once a graph. Raises BundleError for graphs that cannot be read.
    """
    yield _row("manifest", _manifest_complaints(bundle, checkpoint), "lists exactly what a split writes")
    yield _row("tokenizer", _tokenizer_complaints(bundle, checkpoint), "files equal the checkpoint's")
    made_with = bundle.manifest.get("tools")
    ours = tool_versions()
    differ = [tool for tool in EXPORT_TOOLS if not isinstance(made_with, dict) or made_with.get(tool) != ours[tool]]
    failed = False
    for part, entry in zip(patched_parts(checkpoint.patch, bundle.config, bundle.argmax), bundle.graphs, strict=True):
        model = load_graph(bundle.path(entry["file"]))
        complaints = [*_entry_complaints(part, model, entry), *_weight_complaints(bundle, part, model)]
        if not complaints and not differ:
            complaints = list(_trace_complaints(bundle, checkpoint, part, model))
        advance(f"structure {part.name}")
        if complaints:
            failed = True
            yield Row(part.name, "structure", False, detail=" ".join(complaints))
    if not failed:
        count = len(bundle.graphs)
        detail = f"{count} graphs equal a fresh trace, node by node"
        if differ:
            detail = f"{count} graphs not compared with a fresh trace: made with other versions of {', '.join(differ)}"
        yield Row("all", "structure", True, detail=detail)


def _row(case: str, complaints: list[str], detail: str) -> Row:
    return Row("all", case, not complaints, detail=" ".join(complaints) or detail)


def _manifest_complaints(bundle: Bundle, checkpoint: Checkpoint) -> list[str]:
    graphs = {name for graph in bundle.graphs for name in (graph["file"], graph["data"])}
    tokenizer = [path.name for path in checkpoint.tokenizer_files]
    complaints = [
        f"{name} belongs to no graph and not to the tokenizer."
        for name in sorted({*bundle.files} - graphs - {*tokenizer})
    ]
    if bundle.opset not in OPSETS:
        complaints.append(f"opset is {bundle.opset}, expected {OPSETS.start} to {OPSETS.stop - 1}.")
    if bundle.manifest.get("tied") is not heads_equal(checkpoint):
        complaints.append(f"tied is {bundle.manifest.get('tied')}, which the checkpoint's head and embedding are not.")
    return complaints


def _tokenizer_complaints(bundle: Bundle, checkpoint: Checkpoint) -> list[str]:
    expected = {path.name: path for path in checkpoint.tokenizer_files}
    if bundle.manifest.get("tokenizer") != [*expected] or not {*expected} <= {*bundle.files}:
        return [f"The manifest lists {bundle.manifest.get('tokenizer')!r:.200}, the checkpoint has {[*expected]}."]
    return [
        f"{name} differs from the checkpoint's."
        for name, path in expected.items()
        if bundle.path(name).read_bytes() != path.read_bytes()
    ]


def _entry_complaints(part: GraphPart, model: onnx.ModelProto, entry: Any) -> Iterator[str]:
    expected = graph_entry(part, model)
    wrong = sorted(key for key in {*expected, *entry} if expected.get(key) != entry.get(key))
    if wrong:
        yield f"The manifest's {', '.join(wrong)} of {part.name} are not the graph's."


def _weight_complaints(bundle: Bundle, part: GraphPart, model: onnx.ModelProto) -> Iterator[str]:
    stored = {tensor.name: tensor for tensor in external_tensors(model, part.name)}
    expected = external_shapes(part)
    for name in sorted({*stored} ^ {*expected}):
        yield f"{name} is {'missing' if name in expected else 'one weight too many'}."
    for name, value in buffer_values(part).items():
        if name in stored and not holds(bundle.directory, stored[name], value.shape, rows_of(value)):
            yield f"{name} does not hold the patch's values."


def _trace_complaints(bundle: Bundle, checkpoint: Checkpoint, part: GraphPart, model: onnx.ModelProto) -> Iterator[str]:
    skeleton = skeleton_for(checkpoint.patch, bundle.config, part.spec.kind, bundle.argmax, bundle.opset)
    try:
        expected = stamped_graph(part, skeleton, external_tensors(model, part.name))
    except BundleError as error:
        yield str(error)
        return
    if model.SerializeToString(deterministic=True) != expected.SerializeToString(deterministic=True):
        yield f"{names.graph_file(part.name)} is not what a fresh trace gives: {_first_difference(model, expected)}."


def _first_difference(found: onnx.ModelProto, expected: onnx.ModelProto) -> str:
    if len(found.graph.node) != len(expected.graph.node):
        return f"{len(found.graph.node)} nodes, expected {len(expected.graph.node)}"
    for ours, theirs in zip(found.graph.node, expected.graph.node, strict=True):
        if ours != theirs:
            return f"the node {ours.name or ours.op_type} differs from {theirs.name}"
    values = {tensor.name: tensor for tensor in expected.graph.initializer}
    for tensor in found.graph.initializer:
        if values.get(tensor.name) != tensor:
            return f"the constant {tensor.name} differs"
    return "inputs, outputs or names differ"
