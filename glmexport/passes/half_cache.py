"""Half cache: graphs that write into their KV cache hold it as float16, and attend over it so."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx

from glmexport import names
from glmexport.draft import BundleDraft, GraphDraft, Notice
from glmexport.errors import BundleError
from glmexport.form import FLOAT16

_CACHES = (names.KEY_CACHE, names.VALUE_CACHE, names.KEY_CACHE_OUT, names.VALUE_CACHE_OUT)


@dataclass(frozen=True)
class HalfCachePass:
    """New keys, values and queries are rounded to float16, and what attention gives is float32 again.

    The operators take nothing in between: TensorScatter writes what its cache is of, and Attention's query, keys and
    values are of one type (ONNX, opset 24). onnxruntime 1.31 computes it on a CPU by casting a head's keys and values
    to float32 at each step: half the memory in about the same time.
    """

    def apply(self, draft: BundleDraft, notice: Notice) -> BundleDraft:
        """The draft with such graphs of the flavor ort. Raises BundleError where there are none, or they are so."""
        if names.ORT not in draft.form.flavors:
            raise BundleError(
                f"A {FLOAT16} KV cache is for graphs that write into it, and none of these do: add --flavor "
                f"{names.ORT} or --flavor both, or leave it out."
            )
        if draft.form.kv_cache == FLOAT16:
            raise BundleError("The KV cache is float16 already.")
        changed = dataclasses.replace(draft, form=dataclasses.replace(draft.form, kv_cache=FLOAT16))
        for graph in draft.graphs:
            if names.graph_kind(graph.name) == names.KIND_BLOCK:
                changed = changed.with_graph(_with_half_cache(graph))
        return changed.with_step("kv_cache", dtype=FLOAT16)


def _with_half_cache(graph: GraphDraft) -> GraphDraft:
    make = graph.models[names.ORT]
    models = {**graph.models, names.ORT: lambda: half_cache(make())}
    links = {flavor: link for flavor, link in graph.graph_links.items() if flavor != names.ORT}
    return dataclasses.replace(graph, models=models, graph_links=links)


def half_cache(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, a block that writes into a float32 KV cache, with a float16 one, in place; returns it."""
    graph = model.graph
    for value in (*graph.input, *graph.output):
        if value.name in _CACHES:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "TensorScatter":
            nodes.append(_cast(node.input[1], onnx.TensorProto.FLOAT16))
            node.input[1] = nodes[-1].output[0]
        if node.op_type == "Attention":
            nodes.append(_cast(node.input[0], onnx.TensorProto.FLOAT16))
            node.input[0] = nodes[-1].output[0]
            result = node.output[0]
            node.output[0] = f"{result}.{FLOAT16}"
            nodes += [node, _cast(node.output[0], onnx.TensorProto.FLOAT, result)]
            continue
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    return model


def _cast(source: str, dtype: int, target: str = "") -> onnx.NodeProto:
    target = target or f"{source}.{FLOAT16}"
    return onnx.helper.make_node("Cast", [source], [target], name=f"Cast {source}", to=dtype)
