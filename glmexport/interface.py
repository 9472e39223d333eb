"""The fixed interface of the graphs: names, dtypes and shapes of their inputs and outputs.

A number in a shape is fixed by the model; a word names a dynamic axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmexport import names
from glmexport.config import ModelConfig
from glmexport.errors import GlmExportError

if TYPE_CHECKING:
    import onnx

OPSETS = range(14, 25)
"""The opsets that can be asked for."""

IN_PLACE_OPSET = 24
"""Of the graphs that write into their KV cache: the first opset with TensorScatter."""

DEFAULT_OPSET = 18
"""The lowest opset that torch's maintained exporter writes: LayerNormalization is one node, onnxruntime fuses all it
needs, and MNN's converter takes it; a later opset only narrows the set of runtimes that read the file."""

DTYPES = ("float32", "float16")
"""What graphs compute in: the dtype of their weights and of everything between them that is no id, mask or position."""

ARGMAX_MODES = ("none", "also", "only")
"""What the LM head gives: logits; logits and `token_id`; `token_id` alone."""


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output; dtype is numpy's name for it."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Axis number -> name of every dynamic axis."""
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}


@dataclass(frozen=True)
class GraphSpec:
    """The signature of one kind of graph."""

    kind: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def value_info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    """The ONNX form of a graph input or output."""
    import numpy as np
    import onnx  # here: what runs a bundle needs the names and shapes only

    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return onnx.helper.make_tensor_value_info(tensor.name, dtype, tensor.shape)


def graph_spec(
    graph: str,
    config: ModelConfig,
    argmax: str,
    dtype: str = "float32",
    flavor: str = names.PORTABLE,
    cache_dtype: str | None = None,
) -> GraphSpec:
    """The signature of the graph of that name. dtype: one of `DTYPES`, flavor of `names.FLAVORS`, here and below.

    cache_dtype: of a KV cache that the graph writes into, as a rule `dtype`.
    """
    kind = names.graph_kind(graph)
    if kind == names.KIND_HEAD:
        return head_spec(config, argmax, dtype, flavor)
    if kind == names.KIND_EMBEDDING:
        return embedding_spec(config, dtype, flavor)
    return block_spec(config, dtype) if flavor == names.PORTABLE else in_place_block_spec(config, dtype, cache_dtype)


def opset_of(flavor: str, portable: int) -> int:
    """The opset of graphs of a flavor, in a bundle whose portable ones have, or would have, the opset `portable`."""
    return portable if flavor == names.PORTABLE else IN_PLACE_OPSET


def _hidden(config: ModelConfig, flavor: str) -> tuple[int | str, ...]:
    """The shape of hidden states: the sequence first as in the model, or the batch first."""
    order = (names.SEQ, names.BATCH) if flavor == names.PORTABLE else (names.BATCH, names.SEQ)
    return (*order, config.hidden_size)


def embedding_spec(config: ModelConfig, dtype: str = "float32", flavor: str = names.PORTABLE) -> GraphSpec:
    """`input_ids` [batch, seq] -> `inputs_embeds` [seq, batch, hidden], or [batch, seq, hidden]."""
    return GraphSpec(
        names.KIND_EMBEDDING,
        (TensorSpec(names.INPUT_IDS, "int64", (names.BATCH, names.SEQ)),),
        (TensorSpec(names.INPUTS_EMBEDS, dtype, _hidden(config, flavor)),),
    )


def block_spec(config: ModelConfig, dtype: str = "float32") -> GraphSpec:
    """Hidden states, mask (True hides), positions and KV cache in; hidden states and grown KV cache out."""
    hidden = (names.SEQ, names.BATCH, config.hidden_size)
    heads = (names.BATCH, config.num_heads, config.head_dim)
    return GraphSpec(
        names.KIND_BLOCK,
        (
            TensorSpec(names.INPUTS_EMBEDS, dtype, hidden),
            TensorSpec(names.ATTENTION_MASK, "bool", (names.BATCH, 1, names.SEQ, names.TOTAL)),
            TensorSpec(names.POSITION_IDS, "int64", (names.BATCH, 2, names.SEQ)),
            TensorSpec(names.PAST, dtype, (2, names.PAST_LENGTH, *heads)),
        ),
        (
            TensorSpec(names.HIDDEN_STATES, dtype, hidden),
            TensorSpec(names.PRESENTS, dtype, (2, names.TOTAL, *heads)),
        ),
    )


def in_place_block_spec(config: ModelConfig, dtype: str = "float32", cache_dtype: str | None = None) -> GraphSpec:
    """As `block_spec`, batch first, with a KV cache that the graph writes into.

    Row i's new keys and values go to places `write_indices`[i] and on of `key_cache` and `value_cache`, which come out
    again: bound to the memory that they came in, nothing is copied. `attention_mask` is over the whole capacity, and
    hides (True) what is not written yet.
    """
    hidden = _hidden(config, names.ORT)
    cache, cache_dtype = (names.BATCH, config.num_heads, names.CAPACITY, config.head_dim), cache_dtype or dtype
    return GraphSpec(
        names.KIND_BLOCK,
        (
            TensorSpec(names.INPUTS_EMBEDS, dtype, hidden),
            TensorSpec(names.ATTENTION_MASK, "bool", (names.BATCH, 1, names.SEQ, names.CAPACITY)),
            TensorSpec(names.POSITION_IDS, "int64", (names.BATCH, 2, names.SEQ)),
            TensorSpec(names.WRITE_INDICES, "int64", (names.BATCH,)),
            TensorSpec(names.KEY_CACHE, cache_dtype, cache),
            TensorSpec(names.VALUE_CACHE, cache_dtype, cache),
        ),
        (
            TensorSpec(names.HIDDEN_STATES, dtype, hidden),
            TensorSpec(names.KEY_CACHE_OUT, cache_dtype, cache),
            TensorSpec(names.VALUE_CACHE_OUT, cache_dtype, cache),
        ),
    )


def head_spec(
    config: ModelConfig, argmax: str = "none", dtype: str = "float32", flavor: str = names.PORTABLE
) -> GraphSpec:
    """`hidden_states` of `seq` places -> `logits` [batch, vocab] of the last position and/or `token_id` [batch].

    Raises GlmExportError for an unknown `argmax`.
    """
    logits = TensorSpec(names.LOGITS, dtype, (names.BATCH, config.vocab_size))
    token = TensorSpec(names.TOKEN_ID, "int64", (names.BATCH,))
    outputs = {"none": (logits,), "also": (logits, token), "only": (token,)}
    if argmax not in outputs:
        raise GlmExportError(f"argmax must be one of {', '.join(ARGMAX_MODES)}, found {argmax!r}.")
    hidden = TensorSpec(names.HIDDEN_STATES, dtype, _hidden(config, flavor))
    return GraphSpec(names.KIND_HEAD, (hidden,), outputs[argmax])
