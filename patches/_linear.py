"""Linear layers whose stored weight is what the graph multiplies with."""

from __future__ import annotations

import torch
from torch import nn

from glmexport.export_ops import linear_rows


class GemmLinear(nn.Module):
    """A linear layer without bias over a matrix [rows, in], whose graph reads the weight [out, in] as it is stored."""

    def __init__(self, linear: nn.Linear) -> None:
        """Raises ValueError for a layer with a bias."""
        super().__init__()
        if linear.bias is not None:
            raise ValueError("GemmLinear takes a linear layer without bias")
        self.weight: nn.Parameter = linear.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out]."""
        product: torch.Tensor = linear_rows(states, self.weight)
        return product


class MatMulLinear(nn.Module):
    """`x @ weight + bias` with weight [in, out], where `nn.Linear` keeps [out, in].

    A graph over the [out, in] form needs a Transpose of every matrix, which onnxruntime computes at load: a block then
    takes seconds to open and twice its size in memory, where the [in, out] form is mapped from its file as it is.
    """

    stored_transposed = ("weight",)
    """Parameters that are the transpose of the checkpoint's tensor of the same name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[…, in] -> […, out]."""
        return states @ self.weight + self.bias
