"""Half cache: graphs that write into their KV cache hold it as float16."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx

from glmexport import names
from glmexport.draft import BundleDraft, GraphDraft, Notice
from glmexport.errors import BundleError
from glmexport.form import FLOAT16, FLOAT32

_CACHES = (names.KEY_CACHE, names.VALUE_CACHE, names.KEY_CACHE_OUT, names.VALUE_CACHE_OUT)


@dataclass(frozen=True)
class HalfCachePass:
    """New keys and values are rounded to float16 where they are written; attention reads them as float32 again.

    Attention in float16 would be quicker over a long history, as no float32 copy of a block's cache is made. But it
    holds scores in float16 (onnxruntime 1.31 on a CPU), and those of this architecture may be larger than 65504: its
    own guard divides the query by the number of the layer, and multiplies the scores again where they are float32, for
    which there is no place within the operator.
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
    return graph.with_model(names.ORT, lambda: half_cache(make()))


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
            for place in (1, 2):
                nodes.append(_cast(node.input[place], onnx.TensorProto.FLOAT))
                node.input[place] = nodes[-1].output[0]
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    return model


def _cast(source: str, dtype: int) -> onnx.NodeProto:
    target = f"{source}.{FLOAT16 if dtype == onnx.TensorProto.FLOAT16 else FLOAT32}"
    return onnx.helper.make_node("Cast", [source], [target], name=f"Cast {source}", to=dtype)
