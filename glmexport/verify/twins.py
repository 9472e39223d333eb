"""Two flavors of one graph, over the same weights: how far they are apart."""

from __future__ import annotations

import torch

from glmexport.verify.measures import Worst
from glmexport.verify.modes import ModeRun
from glmexport.verify.report import Row
from glmexport.verify.runs import Array, BlockInputs
from glmexport.verify.tolerances import FLAVORS_APART


class Twins:
    """What the flavors of one block give for the same inputs, each held to the first.

    The reference cannot tell a slip in attention from weights that are some percent off; another graph with exactly
    these weights can.
    """

    def __init__(self, graph: str, cache_dtype: str) -> None:
        """cache_dtype: of the KV cache that one of them writes into."""
        self._graph, self._most = graph, FLAVORS_APART[cache_dtype]
        self._first: dict[tuple[str, int], tuple[BlockInputs, tuple[Array, Array]]] = {}
        self._worst, self._compared = Worst(), 0

    def take(self, run: ModeRun, inputs: BlockInputs, found: tuple[Array, Array]) -> None:
        """One step of a case in one flavor; where chains went on with other tokens, inputs differ and tell nothing."""
        past = inputs[3]
        key = (run.case.name, past.shape[1])
        first_inputs, expected = self._first.setdefault(key, (inputs, found))
        if expected is found or not (torch.equal(first_inputs[0], inputs[0]) and torch.equal(first_inputs[3], past)):
            return
        told = run.mode.comparable(inputs[1].numpy())
        self._worst.add(found[0][told], expected[0][told])
        self._worst.add(found[1], expected[1])
        self._compared += 1

    def row(self) -> Row:
        """For the report; without a pair to compare it does not pass."""
        worst, detail = self._worst, f"one flavor against the other, {self._compared} steps"
        passed = self._compared > 0 and worst.norm <= self._most
        return Row(self._graph, "flavors", passed, worst.absolute, worst.norm, detail)
