"""The graphs of a bundle as modules: each forward signature is the signature of its ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from glmexport import interface, names
from glmexport.config import ModelConfig
from glmexport.interface import GraphSpec
from glmexport.patch import ModelPatch


class EmbeddingGraph(nn.Module):
    """`input_ids` int64 [batch, seq] -> `inputs_embeds`, see `interface.embedding_spec`."""

    def __init__(self, word_embeddings: nn.Module, flavor: str = names.PORTABLE) -> None:
        super().__init__()
        self.word_embeddings = word_embeddings
        self.flavor = flavor

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        # turning the ids first moves seq * batch numbers instead of seq * batch * hidden
        ids = input_ids.transpose(0, 1) if self.flavor == names.PORTABLE else input_ids
        embeddings: torch.Tensor = self.word_embeddings(ids)
        return embeddings


class BlockGraph(nn.Module):
    """One patched block: see `interface.block_spec` for the shapes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, presents = self.block(inputs_embeds, position_ids, attention_mask, past_key_values)
        return hidden_states, presents


class InPlaceBlockGraph(nn.Module):
    """One patched block that writes into its KV cache: see `interface.in_place_block_spec` for the shapes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        write_indices: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cache = (write_indices, key_cache, value_cache)
        hidden_states, (keys, values) = self.block(inputs_embeds, position_ids, attention_mask, cache)
        return hidden_states, keys, values


class LmHeadGraph(nn.Module):
    """`hidden_states` -> `logits` [batch, vocab] of the last position, the greedy id, or both: `head_spec`."""

    def __init__(self, final_norm: nn.Module, lm_head: nn.Module, argmax: str, flavor: str = names.PORTABLE) -> None:
        super().__init__()
        self.final_norm = final_norm
        self.lm_head = lm_head
        self.argmax = argmax
        self.flavor = flavor

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        # the last position is picked before anything is computed on the others
        last = hidden_states[-1] if self.flavor == names.PORTABLE else hidden_states[:, -1]
        logits: torch.Tensor = self.lm_head(self.final_norm(last))
        if self.argmax == "none":
            return logits
        token_id = logits.argmax(dim=-1)
        return token_id if self.argmax == "only" else (logits, token_id)


@dataclass(frozen=True)
class GraphPart:
    """One graph to be made: its name, signature, module, and where the module's submodules stand in the checkpoint.

    prefixes: attribute of the module -> path in the checkpoint: `block.mlp.…` becomes `transformer.layers.3.mlp.…`.
    """

    name: str
    spec: GraphSpec
    module: nn.Module
    prefixes: Mapping[str, str]

    def checkpoint_name(self, parameter: str) -> str:
        """The checkpoint's name for a parameter or buffer of `module`."""
        attribute, _, rest = parameter.partition(".")
        return f"{self.prefixes[attribute]}.{rest}"


def patched_parts(
    patch: ModelPatch, config: ModelConfig, argmax: str, dtype: str = "float32", flavor: str = names.PORTABLE
) -> tuple[GraphPart, ...]:
    """The graphs of the patched model on the meta device: shapes and buffers, no weights.

    flavor: one of `names.FLAVORS`. Raises ExportError where the architecture has no such graphs.
    """
    with torch.device("meta"):
        patched = patch.apply(patch.build_reference(config), flavor)
    return graph_parts(patch, config, parameters_to(patched, dtype), argmax, dtype, flavor)


def parameters_to(model: nn.Module, dtype: str) -> nn.Module:
    """`model` with its parameters cast to `dtype`, in place; returns it.

    Buffers stay as the patch made them: angles and guards are float32 in a float16 model too.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def graph_parts(
    patch: ModelPatch,
    config: ModelConfig,
    patched: nn.Module,
    argmax: str,
    dtype: str = "float32",
    flavor: str = names.PORTABLE,
) -> tuple[GraphPart, ...]:
    """Every graph of a patched model, in the order in which data flows: embedding, blocks, LM head.

    dtype: of the parameters of `patched`, one of `interface.DTYPES`. flavor: that it was patched for.
    """
    embedding = GraphPart(
        names.EMBEDDING,
        interface.embedding_spec(config, dtype, flavor),
        EmbeddingGraph(patched.get_submodule(patch.embedding), flavor),
        {"word_embeddings": patch.embedding},
    )
    blocks = tuple(block_part(patch, config, patched, block_id, dtype, flavor) for block_id in range(config.num_blocks))
    head = GraphPart(
        names.HEAD,
        interface.head_spec(config, argmax, dtype, flavor),
        LmHeadGraph(patched.get_submodule(patch.final_norm), patched.get_submodule(patch.head), argmax, flavor),
        {"final_norm": patch.final_norm, "lm_head": patch.head},
    )
    return (embedding, *blocks, head)


def block_part(
    patch: ModelPatch,
    config: ModelConfig,
    patched: nn.Module,
    block_id: int,
    dtype: str = "float32",
    flavor: str = names.PORTABLE,
) -> GraphPart:
    """The graph of one block of a patched model."""
    path, name = patch.block.format(block_id=block_id), names.block_name(block_id)
    block = (BlockGraph if flavor == names.PORTABLE else InPlaceBlockGraph)(patched.get_submodule(path))
    return GraphPart(name, interface.graph_spec(name, config, "none", dtype, flavor), block, {"block": path})


def stored_transposed(module: nn.Module) -> frozenset[str]:
    """Names of the parameters below `module` that hold the transpose of the checkpoint's tensor.

    A module says so of its own parameters in a class attribute `stored_transposed`.
    """
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name in getattr(type(child), "stored_transposed", ())
    )
