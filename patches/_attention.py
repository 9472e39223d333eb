"""Attention with export-friendly tensor operations and a single-tensor KV cache."""

from __future__ import annotations

import math

import torch
from torch import nn

from glmexport.export_ops import merge_heads, split_heads
from glmexport.models.chatglm_6b import SelfAttention


class SplitHeads(nn.Module):
    """[seq, batch, heads * 3 * head_dim] -> query, key, value, each [seq, batch, heads, head_dim]."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim

    def forward(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = torch.split(split_heads(mixed, self.heads), self.head_dim, dim=-1)
        return query, key, value


class MatMulAttention(nn.Module):
    """Scaled attention by two batched matrix products over [batch, heads, …], whatever the lengths.

    No view needs a length, and the mask is always applied (the original skips it when nothing is hidden, which a graph
    could only do with an `If`). `layer_scale` = layer + 1 divides the query and multiplies the scores: it guards
    float16 against overflow and is the one scalar in which two blocks' graphs differ.
    """

    layer_scale: torch.Tensor

    def __init__(self, layer_id: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        # four axes, a shape of its own: no other constant of the graph can be equal to it
        scale = torch.full((1, 1, 1, 1), float(layer_id + 1), device="cpu")
        self.register_buffer("layer_scale", scale, persistent=False)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """The context [seq, batch, heads * head_dim].

        query: [seq, batch, heads, head_dim]; key, value: [total, batch, heads, head_dim]; attention_mask: bool
        [batch, 1, seq, total], True hides.
        """
        # a float16 divisor would be rounded, and not cancel what multiplies the scores
        query = (query.float() / (self.layer_scale * math.sqrt(self.head_dim))).to(value.dtype)
        scores = query.permute(1, 2, 0, 3) @ key.permute(1, 2, 3, 0)  # [batch, heads, seq, total]
        scores = scores.masked_fill(attention_mask, -10000.0).float() * self.layer_scale
        weights = scores.softmax(dim=-1).to(value.dtype)
        context = weights @ value.permute(1, 2, 0, 3)  # [batch, heads, seq, head_dim]
        merged: torch.Tensor = merge_heads(context.permute(2, 0, 1, 3))
        return merged


class TensorCacheAttention(nn.Module):
    """Wraps a self-attention so that its KV cache is one tensor [2, length, batch, heads, head_dim], keys first."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.query_key_value: nn.Module = attention.query_key_value
        self.dense: nn.Module = attention.dense
        self.split_heads: nn.Module = attention.split_heads
        self.rotary_emb: nn.Module = attention.rotary_emb
        self.core_attention: nn.Module = attention.core_attention

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        layer_past: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [seq, batch, hidden], layer_past [2, past, batch, heads, head_dim] (past may be 0).

        Returns the output [seq, batch, hidden] and the grown cache [2, total, batch, heads, head_dim].
        """
        query, key, value = self.split_heads(self.query_key_value(hidden_states))
        query, key = self.rotary_emb(query, key, position_ids)
        new = torch.cat((key.unsqueeze(0), value.unsqueeze(0)), dim=0)
        presents = torch.cat((layer_past, new), dim=1)
        key, value = presents.unbind(0)
        return self.dense(self.core_attention(query, key, value, attention_mask)), presents
