"""Torch operations whose best ONNX form neither of torch's exporters finds by itself.

`x.view(seq, batch, heads, head_dim)` is exported as Shape, Gather, Concat and Reshape, or worse with the traced lengths
baked in; ONNX's Reshape has an entry 0 for "copy this axis from the input", which torch cannot express. A linear layer
without bias over a matrix becomes Transpose and MatMul in one exporter, where Gemm reads the weight as it is stored. As
custom operations they translate to exactly that, in both exporters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import library

NAMESPACE = "glmexport"


@library.custom_op(f"{NAMESPACE}::split_heads", mutates_args=())
def split_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[seq, batch, heads * width] -> [seq, batch, heads, width], any dtype; `width` follows from the input."""
    return torch.unflatten(states, -1, (heads, -1)).clone()


@split_heads.register_fake
def _(states: torch.Tensor, heads: int) -> torch.Tensor:
    return states.new_empty((*states.shape[:-1], heads, states.shape[-1] // heads))


@library.custom_op(f"{NAMESPACE}::merge_heads", mutates_args=())
def merge_heads(states: torch.Tensor) -> torch.Tensor:
    """[seq, batch, heads, width] -> [seq, batch, heads * width], any dtype."""
    return states.flatten(-2).clone()


@merge_heads.register_fake
def _(states: torch.Tensor) -> torch.Tensor:
    return states.new_empty((*states.shape[:-2], states.shape[-2] * states.shape[-1]))


@library.custom_op(f"{NAMESPACE}::linear_rows", mutates_args=())
def linear_rows(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """States [rows, in], weight [out, in], of one dtype -> [rows, out]."""
    return states @ weight.t()


@linear_rows.register_fake
def _(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return states.new_empty((states.shape[0], weight.shape[0]))


@library.custom_op(f"{NAMESPACE}::write_cache", mutates_args=())
def write_cache(cache: torch.Tensor, new: torch.Tensor, write_indices: torch.Tensor) -> torch.Tensor:
    """The cache [batch, heads, capacity, width] with row i of `new` [batch, heads, seq, width] at write_indices[i].

    write_indices: int64 [batch]. In a graph it is TensorScatter, which changes the cache where it lies.
    """
    written = cache.clone()
    for row, start in enumerate(write_indices.tolist()):
        written[row, :, start : start + new.shape[2]] = new[row]
    return written


@write_cache.register_fake
def _(cache: torch.Tensor, new: torch.Tensor, write_indices: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(cache)


@library.custom_op(f"{NAMESPACE}::attend", mutates_args=())
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """softmax(query·key)·value: [batch, heads, seq, width] over [batch, heads, total, width]; 0 where nothing is seen.

    visible: bool [batch, 1, seq, total], True takes part. In a graph it is Attention with a scale of 1, as only then
    onnxruntime 1.31 multiplies a single row by the keys where they lie (`MlasGemm` with alpha 1) and does not pack them
    first: callers scale the query.
    """
    scores = query @ key.transpose(-1, -2)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.nan_to_num(weights, nan=0.0) @ value


@attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)


def dynamo_translations() -> dict[Any, Any]:
    """The table that `torch.onnx.export(dynamo=True, custom_translation_table=…)` takes.

    onnxscript reads these functions' source and signature, so they stay free of anything but ONNX operators.
    """
    from onnxscript import opset18 as op
    from onnxscript import values

    op24 = values.Opset("", 24)  # which onnxscript has no module of yet

    def onnx_split_heads(states, heads: int):  # type: ignore[no-untyped-def]  # onnxscript's own typing
        return op.Reshape(states, op.Constant(value_ints=[0, 0, heads, -1]))  # type: ignore[arg-type]  # as above

    def onnx_merge_heads(states):  # type: ignore[no-untyped-def]  # onnxscript's own typing
        return op.Reshape(states, op.Constant(value_ints=[0, 0, -1]))  # type: ignore[arg-type]  # as above

    def onnx_linear_rows(states, weight):  # type: ignore[no-untyped-def]  # onnxscript's own typing
        return op.Gemm(states, weight, transB=1)

    def onnx_write_cache(cache, new, write_indices):  # type: ignore[no-untyped-def]  # onnxscript's own typing
        return op24.TensorScatter(cache, new, write_indices, axis=-2)

    def onnx_attend(query, key, value, visible):  # type: ignore[no-untyped-def]  # onnxscript's own typing
        attended, _key, _value, _scores = op24.Attention(query, key, value, visible, scale=1.0)
        return attended

    return {
        torch.ops.glmexport.write_cache.default: onnx_write_cache,
        torch.ops.glmexport.attend.default: onnx_attend,
        torch.ops.glmexport.split_heads.default: onnx_split_heads,
        torch.ops.glmexport.merge_heads.default: onnx_merge_heads,
        torch.ops.glmexport.linear_rows.default: onnx_linear_rows,
    }


def register_torchscript_translations(opset: int) -> None:
    """Teach torch's TorchScript exporter the operations for one opset; registering twice is harmless."""
    from torch.onnx.symbolic_helper import parse_args

    register = torch.onnx.register_custom_op_symbolic  # type: ignore[attr-defined]  # public, but not in __all__

    def reshape(g: Any, states: Any, shape: list[int]) -> Any:
        return g.op("Reshape", states, g.op("Constant", value_t=torch.tensor(shape)))

    @parse_args("v", "i")
    def onnx_split_heads(g: Any, states: Any, heads: int) -> Any:
        return reshape(g, states, [0, 0, heads, -1])

    def onnx_merge_heads(g: Any, states: Any) -> Any:
        return reshape(g, states, [0, 0, -1])

    def onnx_linear_rows(g: Any, states: Any, weight: Any) -> Any:
        return g.op("Gemm", states, weight, transB_i=1)

    register(f"{NAMESPACE}::split_heads", onnx_split_heads, opset)
    register(f"{NAMESPACE}::linear_rows", onnx_linear_rows, opset)
    register(f"{NAMESPACE}::merge_heads", onnx_merge_heads, opset)
