"""A graph part and its skeleton -> the graph without its weights, and which weights it needs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import onnx

from glmexport import names
from glmexport.config import ModelConfig
from glmexport.graphs import GraphPart, patched_parts
from glmexport.onnx_files import Array, stamp
from glmexport.patch import ModelPatch
from glmexport.trace import Skeleton, trace


@lru_cache(maxsize=16)
def skeleton_for(
    patch: ModelPatch,
    config: ModelConfig,
    kind: str,
    argmax: str,
    opset: int,
    dtype: str = "float32",
    flavor: str = names.PORTABLE,
) -> Skeleton:
    """The skeleton of one kind of graph of a model; traced once in a process."""
    part = next(part for part in patched_parts(patch, config, argmax, dtype, flavor) if part.spec.kind == kind)
    return trace(part.module, part.spec, opset)


def external_shapes(part: GraphPart) -> dict[str, tuple[int, ...]]:
    """Initializer name -> shape of all that is stored beside the graph: parameters, and buffers of any length."""
    tensors = [*part.module.named_parameters(), *_long_buffers(part).items()]
    return {part.checkpoint_name(slot): tuple(tensor.shape) for slot, tensor in tensors}


def buffer_values(part: GraphPart) -> dict[str, Array]:
    """Initializer name -> value of the stored buffers, which come from the patch and not from the checkpoint."""
    return {part.checkpoint_name(slot): buffer.numpy() for slot, buffer in _long_buffers(part).items()}


def stamped_graph(part: GraphPart, skeleton: Skeleton) -> onnx.ModelProto:
    """The graph of `part` without the tensors of `external_shapes`; buffers of one element go into the graph itself."""
    renames = {slot: part.checkpoint_name(slot) for slot in skeleton.slots}
    inline = {renames[slot]: buffer.numpy() for slot, buffer in part.module.named_buffers() if buffer.numel() == 1}
    return stamp(skeleton.model, part.name, renames, inline)


def _long_buffers(part: GraphPart) -> dict[str, Any]:
    return {slot: buffer for slot, buffer in part.module.named_buffers() if buffer.numel() > 1}
