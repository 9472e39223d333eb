"""Two torch operations whose ONNX form copies the leading axes instead of computing them from a traced shape.

`x.view(seq, batch, heads, head_dim)` is exported as Shape, Gather, Concat and Reshape, or worse with the traced lengths
baked in. ONNX's Reshape has an entry 0 for "copy this axis from the input", which torch cannot express. As custom
operations the two head reshapes translate to exactly that, in both of torch's exporters.
"""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "glmexport"


@torch.library.custom_op(f"{NAMESPACE}::split_heads", mutates_args=())
def split_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[seq, batch, heads * width] -> [seq, batch, heads, width], any dtype; `width` follows from the input."""
    return states.unflatten(-1, (heads, -1)).clone()


@split_heads.register_fake
def _(states: torch.Tensor, heads: int) -> torch.Tensor:
    return states.new_empty((*states.shape[:-1], heads, states.shape[-1] // heads))


@torch.library.custom_op(f"{NAMESPACE}::merge_heads", mutates_args=())
def merge_heads(states: torch.Tensor) -> torch.Tensor:
    """[seq, batch, heads, width] -> [seq, batch, heads * width], any dtype."""
    return states.flatten(-2).clone()


@merge_heads.register_fake
def _(states: torch.Tensor) -> torch.Tensor:
    return states.new_empty((*states.shape[:-2], states.shape[-2] * states.shape[-1]))


def dynamo_translations() -> dict[Any, Any]:
    """The table that `torch.onnx.export(dynamo=True, custom_translation_table=…)` takes.

    onnxscript reads these functions' source and signature, so they stay free of anything but ONNX operators.
    """
    from onnxscript import opset18 as op

    def onnx_split_heads(states, heads: int):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - onnxscript's own typing
        return op.Reshape(states, op.Constant(value_ints=[0, 0, heads, -1]))

    def onnx_merge_heads(states):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - onnxscript's own typing
        return op.Reshape(states, op.Constant(value_ints=[0, 0, -1]))

    return {
        torch.ops.glmexport.split_heads.default: onnx_split_heads,
        torch.ops.glmexport.merge_heads.default: onnx_merge_heads,
    }


def register_torchscript_translations(opset: int) -> None:
    """Teach torch's TorchScript exporter the two operations for one opset; registering twice is harmless."""

    def reshape(g: Any, states: Any, shape: list[int]) -> Any:
        return g.op("Reshape", states, g.op("Constant", value_t=torch.tensor(shape)))

    def onnx_split_heads(g: Any, states: Any, heads: Any) -> Any:
        return reshape(g, states, [0, 0, heads.node()["value"] if not isinstance(heads, int) else heads, -1])

    def onnx_merge_heads(g: Any, states: Any) -> Any:
        return reshape(g, states, [0, 0, -1])

    torch.onnx.register_custom_op_symbolic(f"{NAMESPACE}::split_heads", onnx_split_heads, opset)
    torch.onnx.register_custom_op_symbolic(f"{NAMESPACE}::merge_heads", onnx_merge_heads, opset)
