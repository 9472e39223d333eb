"""What a bundle says of itself against what the checkpoint gives in that form: manifest, small files, graphs.

Numbers cannot show everything. A layernorm epsilon, a constant or a row of the embedding can be wrong in ways that no
prompt of a verification meets, so each graph is compared with a fresh trace of the patched model, node by node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.draft import BundleDraft, GraphDraft, graph_entry, with_tensors
from glmexport.errors import BundleError, GlmExportError
from glmexport.interface import OPSETS
from glmexport.onnx_files import Array, ExternalTensor, external_tensors, holds, load_graph, rows_of
from glmexport.passes.slim_vocab import tokenizer_of_draft
from glmexport.stored import stored_tensors
from glmexport.tensors import ArrayTensor
from glmexport.tokenizer import Tokenizer
from glmexport.tools import EXPORT_TOOLS, tool_versions
from glmexport.verify.report import Row

FACTS = (
    *("architecture", "model", "vocabulary", "embedding", "quantization", "weights", "dtype"),
    *("tied", "opset", "argmax", "tokenizer"),
)
"""Keys of the manifest that follow from the checkpoint and the form."""

MEASURED = ("relative_error", "cosine")
"""What the manifest says of a quantized matrix and only its weights can tell."""


def check_structure(bundle: Bundle, expected: BundleDraft, advance: Callable[[str], None]) -> Iterator[Row]:
    """Rows for the manifest, the tokenizer and every graph; passing graphs share one row.

    expected: what the bundle must be. advance: called once a graph. Raises BundleError for graphs that cannot be read.
    """
    yield _row("manifest", list(_manifest_complaints(bundle, expected)), "lists exactly what the checkpoint gives")
    yield tokenizer_row(bundle, expected)
    made_with = bundle.manifest.get("tools")
    ours = tool_versions()
    differ = [tool for tool in EXPORT_TOOLS if not isinstance(made_with, dict) or made_with.get(tool) != ours[tool]]
    failed = False
    for graph, entry in zip(expected.graphs, bundle.graphs, strict=True):
        flavored = bundle.flavored(entry)
        models = {flavor: load_graph(bundle.whole_path(one["file"])) for flavor, one in flavored.items()}
        complaints = list(_entry_complaints(expected, graph, models, entry))
        for flavor, model in models.items():
            complaints += _weight_complaints(bundle, graph, flavored[flavor], model)
        complaints += _sharing_complaints(bundle, flavored, models)
        if not complaints and not differ:
            for flavor, model in models.items():
                complaints += _trace_complaints(graph, flavor, model)
        advance(f"structure {graph.name}")
        if complaints:
            failed = True
            yield Row(graph.name, "structure", False, detail=" ".join(complaints))
    if not failed:
        count = len(bundle.graphs)
        detail = f"{count} graphs equal a fresh trace, node by node"
        if differ:
            detail = f"{count} graphs not compared with a fresh trace: made with other versions of {', '.join(differ)}"
        yield Row("all", "structure", True, detail=detail)


def tokenizer_row(bundle: Bundle, expected: BundleDraft) -> Row:
    """The row about the small files, and about ids of a slimmed vocabulary."""
    return _row("tokenizer", *_tokenizer_complaints(bundle, expected))


def _row(case: str, complaints: list[str], detail: str) -> Row:
    return Row("all", case, not complaints, detail=" ".join(complaints) or detail)


def _manifest_complaints(bundle: Bundle, expected: BundleDraft) -> Iterator[str]:
    files = {*expected.sizes()} - {names.MANIFEST}
    for name in sorted({*bundle.files} - files):
        yield f"{name} belongs to no graph and not to the tokenizer."
    for name in sorted(files - {*bundle.files}):
        yield f"{name} is missing."
    if bundle.opset not in OPSETS:
        yield f"opset is {bundle.opset}, expected {OPSETS.start} to {OPSETS.stop - 1}."
    document = expected.manifest([])
    for key in FACTS:
        stated = bundle.manifest.get(key, getattr(bundle.form, key, None))  # weights and dtype may be absent
        if stated != document[key]:
            yield f"{key} is {stated!r:.120}, where the checkpoint gives {document[key]!r:.120}."


def _tokenizer_complaints(bundle: Bundle, expected: BundleDraft) -> tuple[list[str], str]:
    """(complaints, what passes) about the small files, which are compared byte by byte, and about slimmed ids."""
    small = {name: content for name, content in expected.files.items() if isinstance(content, bytes)}
    complaints = [
        f"{name} is not what the checkpoint gives."
        for name, content in small.items()
        if name in bundle.files and bundle.read_small(name) != content
    ]
    if complaints or bundle.form.slim is None:
        return complaints, "files equal the checkpoint's"
    return _round_trip(bundle, expected)


def _round_trip(bundle: Bundle, expected: BundleDraft) -> tuple[list[str], str]:
    """Every kept id through the full and the slimmed tokenizer: one piece, one text, and back to the same ids."""
    slim = bundle.form.slim
    slimmed, full = tokenizer_of_draft(expected), tokenizer_of_draft(expected, checkpoint_ids=True)
    if slimmed is None or full is None or slim is None:
        return [], "there is none"
    old_ids = slim.vocabulary.old_ids()
    wrong = []
    for new_id, old_id in enumerate(old_ids.tolist()):
        text = full.decode([old_id])
        same = slimmed.piece(new_id) == full.piece(old_id) and slimmed.decode([new_id]) == text
        through_full = np.array(full.encode(text), np.int64)
        mapped = slim.vocabulary.to_new(through_full)
        # where the full tokenizer writes the text with pieces that were dropped, the text itself must survive
        returns = (
            slimmed.encode(text) == mapped.tolist()
            if (mapped >= 0).all()
            else _survives(slimmed, text, old_id, through_full)
        )
        if not (same and returns):
            wrong.append(new_id)
    if wrong:
        return [f"{len(wrong)} of {len(old_ids)} kept ids do not make the round trip, first {wrong[0]}."], ""
    return [], f"files as the checkpoint gives them; {len(old_ids)} kept ids make the round trip"


def _survives(slimmed: Tokenizer, text: str, old_id: int, through_full: Array) -> bool:
    """Whether a text that needs dropped pieces is still written; one that does not lead back to its id need not be."""
    try:
        written = slimmed.decode(slimmed.encode(text)) == text
    except GlmExportError:
        written = False
    return written or old_id not in through_full


def _entry_complaints(
    expected: BundleDraft, graph: GraphDraft, models: Mapping[str, onnx.ModelProto], entry: Mapping[str, Any]
) -> Iterator[str]:
    ours = _unmeasured(graph_entry(expected, graph, models))
    theirs = _unmeasured(entry)
    wrong = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if wrong:
        yield f"The manifest's {', '.join(wrong)} of {graph.name} are not the graph's."


def _unmeasured(entry: Mapping[str, Any]) -> dict[str, Any]:
    matrices = {
        name: {key: value for key, value in record.items() if key not in MEASURED}
        for name, record in entry["matrices"].items()
    }
    return {**entry, "matrices": matrices}


def _weight_complaints(
    bundle: Bundle, graph: GraphDraft, entry: Mapping[str, Any], model: onnx.ModelProto
) -> Iterator[str]:
    stored = stored_tensors(bundle, model, entry)
    expected = {tensor.name: tensor for tensor in graph.tensors}
    for name in sorted({*stored} ^ {*expected}):
        yield f"{name} is {'missing' if name in expected else 'one weight too many'}."
    for name, tensor in expected.items():
        if name not in stored:
            continue
        if (stored[name].dtype, stored[name].shape) != (tensor.dtype, tensor.shape):
            found, ours = (f"{one.dtype} {list(one.shape)}" for one in (stored[name], tensor))
            yield f"{name} is {found}, expected {ours}."
        elif isinstance(tensor, ArrayTensor) and not _holds(bundle, stored[name], tensor):
            yield f"{name} does not hold the patch's values."


def _sharing_complaints(
    bundle: Bundle, flavored: Mapping[str, Mapping[str, Any]], models: Mapping[str, onnx.ModelProto]
) -> Iterator[str]:
    """Every flavor reads the numbers of the first, which alone are compared with the checkpoint's."""
    stored = {flavor: stored_tensors(bundle, model, flavored[flavor]) for flavor, model in models.items()}
    first, *others = flavored
    for other in others:
        one, same = flavored[other], flavored[first]["data"]
        if bundle.files[one["data"]] != bundle.files[same]:
            yield f"{one['data']} is not what {same} is."
        moved = sorted(
            name
            for name, place in stored[other].items()
            if name in stored[first] and dataclasses.replace(place, location=same) != stored[first][name]
        )
        if moved:
            yield f"{one['file']} reads {', '.join(moved[:3])} from another place than {flavored[first]['file']} does."


def _holds(bundle: Bundle, place: ExternalTensor, tensor: ArrayTensor) -> bool:
    return holds(bundle.directory, place, tensor.shape, rows_of(tensor.value))


def _trace_complaints(graph: GraphDraft, flavor: str, model: onnx.ModelProto) -> Iterator[str]:
    try:
        expected = with_tensors(graph.models[flavor](), external_tensors(model, graph.name))
    except BundleError as error:
        yield str(error)
        return
    if model.SerializeToString(deterministic=True) != expected.SerializeToString(deterministic=True):
        file = names.in_flavor(names.graph_file(graph.name), flavor)
        yield f"{file} is not what a fresh trace gives: {_first_difference(model, expected)}."


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
