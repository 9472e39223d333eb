"""Blocks, batch first, that write keys and values into a cache of fixed places, of operators that runtimes fuse."""

from __future__ import annotations

import torch
from torch import nn

from glmexport.export_ops import attend, merge_heads, split_heads, write_cache
from glmexport.models.chatglm_6b import MLP, SelfAttention

from ._rope import AngleRotary2D

InPlaceCache = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""write_indices int64 [batch]; key and value cache [batch, heads, capacity, head_dim]."""


class BatchFirstRotary2D(AngleRotary2D):
    """`AngleRotary2D` for [batch, heads, seq, head_dim]; what is negated is the sine, which all heads share."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query, key: [batch, heads, seq, head_dim]; position_ids: int64 [batch, 2, seq]. Returns both, turned."""
        angles = position_ids.to(torch.float32).unsqueeze(-1) * self.inv_freq  # [batch, 2, seq, head_dim / 4]
        position, block_position = torch.split(angles, 1, dim=1)
        angles = torch.cat((position, position, block_position, block_position), dim=-1)
        first, second = position.sin(), block_position.sin()
        cos, sin = angles.cos(), torch.cat((-first, first, -second, second), dim=-1)  # [batch, 1, seq, head_dim]
        return self._turn(query, cos, sin), self._turn(key, cos, sin)

    def _turn(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b, c, d = torch.split(states, self.quarter, dim=-1)
        return states * cos + torch.cat((b, a, d, c), dim=-1) * sin


class InPlaceAttention(nn.Module):
    """Wraps a self-attention so that new keys and values are written into caches, and queries see those."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.query_key_value: nn.Module = attention.query_key_value
        self.dense: nn.Module = attention.dense
        self.rotary_emb: nn.Module = attention.rotary_emb
        self.heads, self.head_dim = attention.num_heads, attention.head_dim

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor, cache: InPlaceCache
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The output [batch, seq, hidden] and both caches as they are now.

        hidden_states: [batch, seq, hidden]. attention_mask: bool [batch, 1, seq, capacity], True hides. The guard of
        the original against overflow of float16 is left out: it cancels.
        """
        write_indices, keys, values = cache
        mixed = split_heads(self.query_key_value(hidden_states), self.heads).transpose(1, 2)
        query, key, value = torch.split(mixed, self.head_dim, dim=-1)  # each [batch, heads, seq, head_dim]
        query, key = self.rotary_emb(query, key, position_ids)
        keys, values = write_cache(keys, key, write_indices), write_cache(values, value, write_indices)
        context = attend(query * self.head_dim**-0.5, keys, values, ~attention_mask)
        return self.dense(merge_heads(context.transpose(1, 2))), (keys, values)


class GeluMLP(nn.Module):
    """The MLP with GELU as one operator."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.dense_h_to_4h: nn.Module = mlp.dense_h_to_4h
        self.dense_4h_to_h: nn.Module = mlp.dense_4h_to_h

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[…, hidden] -> […, hidden]."""
        raised = nn.functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh")
        lowered: torch.Tensor = self.dense_4h_to_h(raised)
        return lowered
