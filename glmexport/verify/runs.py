"""One case as it goes through graphs and reference, and what a block takes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from glmexport import names
from glmexport.verify.cases import Case

Array = npt.NDArray[Any]
BlockInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Hidden states, mask, positions and past, as `ModelPatch.run_reference_block` takes them."""
BlockOutputs = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Run:
    """A case on its way; lists have one entry a step, step 0 is the prefill.

    tokens: [batch] ids fed at each decode step, and the last ones generated. logits: what the chain of graphs gave.
    hidden: the reference's hidden states at the block being compared. half: those of the reference in float16, whose
    blocks are chained, for a bundle that computes so.
    """

    case: Case
    tokens: list[Array] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    half: list[torch.Tensor] = field(default_factory=list)

    def input_ids(self, step: int) -> Array:
        """int64 [batch, seq] fed at a step."""
        return self.case.prompt.input_ids if step == 0 else self.tokens[step - 1][:, None]

    def inputs(self, step: int, hidden: torch.Tensor, past: torch.Tensor) -> BlockInputs:
        """What a block takes at a step."""
        mask, positions = map(torch.from_numpy, self.case.inputs(step))
        return hidden, mask, positions, past


def as_array(values: torch.Tensor, dtype: str) -> Array:
    """A float tensor as a graph of that dtype takes it; what float16 cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        return values.contiguous().numpy().astype(dtype, copy=False)


def feeds(inputs: BlockInputs, dtype: str) -> dict[str, Array]:
    """A block's inputs as its graph takes them."""
    hidden, mask, positions, past = inputs
    return {
        names.INPUTS_EMBEDS: as_array(hidden, dtype),
        names.ATTENTION_MASK: mask.numpy(),
        names.POSITION_IDS: positions.numpy(),
        names.PAST: as_array(past, dtype),
    }
