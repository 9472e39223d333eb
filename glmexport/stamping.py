"""A graph part, its skeleton and its weights' places -> the graph, and what the manifest says of it.

`split` writes with these; `verify` calls them again and compares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import onnx

from glmexport import names
from glmexport.config import ModelConfig
from glmexport.graph_lint import operator_inventory
from glmexport.graphs import GraphPart, patched_parts, stored_transposed
from glmexport.onnx_files import Array, ExternalTensor, stamp
from glmexport.patch import ModelPatch
from glmexport.trace import Skeleton, trace


@lru_cache(maxsize=16)
def skeleton_for(patch: ModelPatch, config: ModelConfig, kind: str, argmax: str, opset: int) -> Skeleton:
    """The skeleton of one kind of graph of a model; traced once in a process."""
    part = next(part for part in patched_parts(patch, config, argmax) if part.spec.kind == kind)
    return trace(part.module, part.spec, opset)


def external_shapes(part: GraphPart) -> dict[str, tuple[int, ...]]:
    """Initializer name -> shape of all that is stored beside the graph: parameters, and buffers of any length."""
    tensors = [*part.module.named_parameters(), *_long_buffers(part).items()]
    return {part.checkpoint_name(slot): tuple(tensor.shape) for slot, tensor in tensors}


def buffer_values(part: GraphPart) -> dict[str, Array]:
    """Initializer name -> value of the stored buffers, which come from the patch and not from the checkpoint."""
    return {part.checkpoint_name(slot): buffer.numpy() for slot, buffer in _long_buffers(part).items()}


def stamped_graph(part: GraphPart, skeleton: Skeleton, external: Iterable[ExternalTensor]) -> onnx.ModelProto:
    """The graph of `part` whose weights lie where `external` says; buffers of one element go into the graph itself."""
    renames = {slot: part.checkpoint_name(slot) for slot in skeleton.slots}
    inline = {renames[slot]: buffer.numpy() for slot, buffer in part.module.named_buffers() if buffer.numel() == 1}
    return stamp(skeleton.model, part.name, renames, external, inline)


def graph_entry(part: GraphPart, model: onnx.ModelProto) -> dict[str, Any]:
    """What the manifest says of a graph."""
    entry: dict[str, Any] = {"name": part.name, "kind": part.spec.kind}
    block_id = names.block_id_of(part.name)
    if block_id is not None:
        entry["block_id"] = block_id
    return entry | {
        "file": names.graph_file(part.name),
        "data": names.data_file(part.name),
        "inputs": [_plain(dataclasses.asdict(tensor)) for tensor in part.spec.inputs],
        "outputs": [_plain(dataclasses.asdict(tensor)) for tensor in part.spec.outputs],
        "weights": "float32",
        "operators": operator_inventory(model),
        "parameters": sum(parameter.numel() for parameter in part.module.parameters()),
        "transposed": sorted(part.checkpoint_name(slot) for slot in stored_transposed(part.module)),
    }


def _long_buffers(part: GraphPart) -> dict[str, Any]:
    return {slot: buffer for slot, buffer in part.module.named_buffers() if buffer.numel() > 1}


def _plain(tensor: dict[str, Any]) -> dict[str, Any]:
    return {**tensor, "shape": list(tensor["shape"])}  # as JSON gives it back
