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
    """`input_ids` int64 [batch, seq] -> `inputs_embeds` [seq, batch, hidden]."""

    def __init__(self, word_embeddings: nn.Module) -> None:
        super().__init__()
        self.word_embeddings = word_embeddings

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        # turning the ids first moves seq * batch numbers instead of seq * batch * hidden
        embeddings: torch.Tensor = self.word_embeddings(input_ids.transpose(0, 1))
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


class LmHeadGraph(nn.Module):
    """`hidden_states` [seq, batch, hidden] -> `logits` [batch, vocab] of the last position, the greedy id, or both."""

    def __init__(self, final_norm: nn.Module, lm_head: nn.Module, argmax: str) -> None:
        super().__init__()
        self.final_norm = final_norm
        self.lm_head = lm_head
        self.argmax = argmax

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        # the last position is picked before anything is computed on the others
        logits: torch.Tensor = self.lm_head(self.final_norm(hidden_states[-1]))
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


def patched_parts(patch: ModelPatch, config: ModelConfig, argmax: str, dtype: str = "float32") -> tuple[GraphPart, ...]:
    """The graphs of the patched model on the meta device: shapes and buffers, no weights."""
    with torch.device("meta"):
        patched = patch.apply(patch.build_reference(config))
    return graph_parts(patch, config, parameters_to(patched, dtype), argmax, dtype)


def parameters_to(model: nn.Module, dtype: str) -> nn.Module:
    """`model` with its parameters cast to `dtype`, in place; returns it.

    Buffers stay as the patch made them: angles and guards are float32 in a float16 model too.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def graph_parts(
    patch: ModelPatch, config: ModelConfig, patched: nn.Module, argmax: str, dtype: str = "float32"
) -> tuple[GraphPart, ...]:
    """Every graph of a patched model, in the order in which data flows: embedding, blocks, LM head.

    dtype: of the parameters of `patched`, one of `interface.DTYPES`.
    """
    embedding = GraphPart(
        names.EMBEDDING,
        interface.embedding_spec(config, dtype),
        EmbeddingGraph(patched.get_submodule(patch.embedding)),
        {"word_embeddings": patch.embedding},
    )
    blocks = tuple(block_part(patch, config, patched, block_id, dtype) for block_id in range(config.num_blocks))
    head = GraphPart(
        names.HEAD,
        interface.head_spec(config, argmax, dtype),
        LmHeadGraph(patched.get_submodule(patch.final_norm), patched.get_submodule(patch.head), argmax),
        {"final_norm": patch.final_norm, "lm_head": patch.head},
    )
    return (embedding, *blocks, head)


def block_part(
    patch: ModelPatch, config: ModelConfig, patched: nn.Module, block_id: int, dtype: str = "float32"
) -> GraphPart:
    """The graph of one block of a patched model."""
    path = patch.block.format(block_id=block_id)
    block = BlockGraph(patched.get_submodule(path))
    return GraphPart(names.block_name(block_id), interface.block_spec(config, dtype), block, {"block": path})


def stored_transposed(module: nn.Module) -> frozenset[str]:
    """Names of the parameters below `module` that hold the transpose of the checkpoint's tensor.

    A module says so of its own parameters in a class attribute `stored_transposed`.
    """
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name in getattr(type(child), "stored_transposed", ())
    )
