"""How far numbers are from the reference's: worst errors of an output, and what becomes of the next token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

SAME_LOGIT = 1e-4
"""Likeliest tokens whose reference logits are this close are one: float32 sums in another order exchange them."""


@dataclass
class Worst:
    """Largest absolute error, largest relative error and largest ‖error‖ / ‖reference‖ seen; NaN sticks."""

    absolute: float = 0.0
    relative: float = 0.0
    norm: float = 0.0
    reference_is_finite: bool = True

    def add(self, found: Array, expected: Array, dtype: str = "float32") -> None:
        """Take in one pair of outputs, the second float32; another shape or dtype counts as an infinite error."""
        if found.shape != expected.shape or found.dtype != dtype:
            self.absolute = self.relative = self.norm = float("inf")
            return
        found = found.astype(np.float32, copy=False)
        self.reference_is_finite &= bool(np.isfinite(expected).all())
        with np.errstate(invalid="ignore"):  # infinity from infinity is a NaN, which sticks
            difference = found - expected
        error = float(np.abs(difference).max(initial=0.0))
        largest = float(np.abs(expected).max(initial=0.0))
        self.absolute = float(np.maximum(self.absolute, error))
        self.relative = float(np.maximum(self.relative, error / largest if largest else error))
        size, length = float(np.linalg.norm(difference)), float(np.linalg.norm(expected))
        self.norm = float(np.maximum(self.norm, size / length if length else size))


@dataclass
class NextTokens:
    """What a chain of graphs says of the next token, against the reference, over all its steps.

    same, count: likeliest tokens that are the reference's, of all. divergences: mean over the batch of each step's
    KL(reference || found) in nats.
    """

    worst: Worst = field(default_factory=Worst)
    same: int = 0
    count: int = 0
    divergences: list[float] = field(default_factory=list)

    def add(self, expected: Array, tokens: Array, logits: Array | None, dtype: str = "float32") -> None:
        """Take in one step: reference logits [batch, vocab], generated ids [batch], the chain's logits or None."""
        if logits is not None:
            self.worst.add(logits, expected, dtype)
            if logits.shape == expected.shape:
                self.divergences.append(_divergence(expected, logits))
        self.same += int((margin(expected, tokens) <= SAME_LOGIT).sum())
        self.count += len(tokens)

    def merge(self, other: NextTokens) -> None:
        """Take in what another chain saw, but for its worst errors."""
        self.same, self.count = self.same + other.same, self.count + other.count
        self.divergences += other.divergences

    @property
    def share(self) -> float:
        """Of tokens that are the reference's."""
        return self.same / self.count

    @property
    def divergence(self) -> float:
        """Mean KL divergence in nats; 0 where the chain gave no logits."""
        return float(np.mean(self.divergences)) if self.divergences else 0.0


@dataclass(frozen=True)
class HalfErrors:
    """What float16 does to the logits of the reference itself: its head alone, and all of it. By case."""

    head: dict[str, Worst]
    chain: dict[str, NextTokens]

    @property
    def whole(self) -> NextTokens:
        """All cases together."""
        whole = NextTokens()
        for chain in self.chain.values():
            whole.merge(chain)
        return whole


def half_errors(
    expected: dict[str, list[Array]], alone: dict[str, list[Array]], chained: dict[str, list[Array]]
) -> HalfErrors:
    """Each case -> logits float32 [batch, vocab] of every step: in float32, of a float16 head, of a float16 model."""
    errors = HalfErrors({}, {})
    for case, steps in expected.items():
        head, chain = errors.head.setdefault(case, Worst()), errors.chain.setdefault(case, NextTokens())
        for logits, of_head, of_chain in zip(steps, alone[case], chained[case], strict=True):
            head.add(of_head, logits)
            chain.add(logits, of_chain.argmax(-1), of_chain)
    return errors


def margin(logits: Array, tokens: Array) -> Array:
    """How far each token's reference logit is below the best one: float32 [batch]; 0 for the greedy token."""
    result: Array = logits.max(-1) - np.take_along_axis(logits, tokens[:, None], -1)[:, 0]
    return result


def _divergence(reference: Array, found: Array) -> float:
    ours, theirs = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (found, reference))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())
