"""Rotary position embeddings without a table."""

from __future__ import annotations

import torch
from torch import nn


class AngleRotary2D(nn.Module):
    """Two-dimensional rotary embedding computed from the position ids themselves.

    The first half of each head turns by the position, the second half by the block position; inside a half, element i
    turns together with element i + half / 2. A table of cosines would have to be cut at the largest position or bake a
    length; position times frequency needs neither.
    """

    inv_freq: torch.Tensor

    def __init__(self, inv_freq: torch.Tensor) -> None:
        """inv_freq: float32 [head_dim / 4]."""
        super().__init__()
        self.quarter = inv_freq.shape[0]
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query, key: [seq, batch, heads, head_dim]; position_ids: int64 [batch, 2, seq]. Returns both, turned."""
        angles = position_ids.permute(2, 0, 1).to(torch.float32).unsqueeze(3).unsqueeze(4) * self.inv_freq
        position, block_position = angles.unbind(2)  # each [seq, batch, 1, head_dim / 4]
        angles = torch.cat((position, position, block_position, block_position), dim=-1)
        cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
        return self._turn(query, cos, sin), self._turn(key, cos, sin)

    def _turn(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b, c, d = torch.split(states, self.quarter, dim=-1)
        return states * cos + torch.cat((-b, a, -d, c), dim=-1) * sin
