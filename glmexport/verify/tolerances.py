"""How far a bundle may be from the reference, per form of its weights, each bound with its reason."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tolerance:
    """Bounds of one output of one graph; it passes when one of them holds.

    absolute: largest absolute error. relative: that over the largest reference value. norm: ‖error‖ / ‖reference‖.
    A bound of 0 asks for equal numbers.
    """

    absolute: float
    relative: float
    norm: float
    reason: str

    def allows(self, absolute: float, relative: float, norm: float) -> bool:
        """Whether errors pass; NaN never does."""
        return absolute <= self.absolute or relative <= self.relative or norm <= self.norm


@dataclass(frozen=True)
class ChainBudget:
    """Bounds of a whole chain of graphs.

    logits: ‖error‖ / ‖reference‖ of the logits, in each case. divergence: mean KL divergence in nats of the next
    token's distribution from the reference's, over all cases. greedy: share of steps, of all cases, whose likeliest
    token is the reference's.
    """

    logits: float
    divergence: float
    greedy: float
    reason: str

    def or_near(self, greedy: float, divergence: float) -> ChainBudget:
        """Wide enough for a chain that is no worse than this one, or no further off than `HALF_SLACK` times that."""
        return replace(self, greedy=min(self.greedy, greedy), divergence=max(self.divergence, HALF_SLACK * divergence))


FORMS = ("float32", "float16", "bfloat16", "int8", "int4")
"""Forms of weights, the closest to the reference first; a chain is held to the budget of its coarsest part."""

TOLERANCES = {
    "float32": Tolerance(
        1e-4,
        1e-5,
        0.0,
        "the same float32 numbers summed in another order: sums of up to 16384 products differ by some 1e-6 of the "
        "largest value, and the absolute bound is for models whose activations stay near 1",
    ),
    "float16": Tolerance(
        0.0,
        0.0,
        2.0**-11,
        "numbers rounded to 11 significant bits: at most half a unit in the last; graphs that compute in float16 round "
        "every result, and are held to what that does to the reference itself",
    ),
    "bfloat16": Tolerance(0.0, 0.0, 2.0**-7, "rows rounded to 8 significant bits, or cut off there: one unit at most"),
    "int8": Tolerance(
        0.0,
        0.0,
        0.02,
        "weights rounded to 127 steps of the largest of their group are 0.5 to 0.7 % off, more with heavy tails; "
        "activations rounded to 8 bits too are as much off again, and the MLP does both twice",
    ),
    "int4": Tolerance(
        0.0,
        0.0,
        0.2,
        "weights rounded to 7 or 8 steps of the largest of their group are 8 to 12 % off, 16 % with one group a "
        "channel; a matrix that is read wrongly is 100 % off and more",
    ),
}

CHAIN_BUDGETS = {
    "float16": ChainBudget(0.01, 1e-3, 0.95, "an embedding or all results off by 0.02 %, carried through every block"),
    "bfloat16": ChainBudget(0.02, 1e-2, 0.9, "an embedding off by 0.17 % (cut off: 0.33 %), through every block"),
    "int8": ChainBudget(0.05, 0.02, 0.8, "every block and the head off by some 1 %, adding up like noise"),
    "int4": ChainBudget(0.4, 1.0, 0.3, "every block off by some 10 %, adding up like noise; KL grows with the logits"),
}
"""Measured on seeded random models, whose logits are no sharper for being right: a trained model keeps more tokens."""

_LOW = {
    "int8": Tolerance(
        0.0,
        0.0,
        0.04,
        "the weights' own 0.3 to 1 %, and activations rounded to 8 bits before each product, a row at a time: as much "
        "again, more where one activation of a row is far larger than the others",
    ),
    "int4": Tolerance(0.0, 0.0, 0.25, "the weights' own 4 to 16 %, and activations rounded to 8 bits"),
}
MNN_TOLERANCES = {
    "normal": {
        **TOLERANCES,
        "float16": Tolerance(
            1e-4,
            1e-5,
            2e-3,
            "weights rounded to 11 significant bits, 0.02 % off in every product; float32's own where nothing is lost",
        ),
    },
    "low": {**TOLERANCES, "float16": Tolerance(1e-4, 1e-5, 2e-3, "as in normal mode: only integers differ"), **_LOW},
}
"""The same for MNN, by memory mode. Normal mode makes float32 of the weights when it opens them, so that their error is
all there is; low mode keeps integers and rounds activations."""

MNN_CHAIN_BUDGETS = {
    "normal": CHAIN_BUDGETS,
    "low": {
        **CHAIN_BUDGETS,
        "int8": ChainBudget(0.12, 0.1, 0.7, "weights and activations both off by some 1 % in every block"),
        "int4": ChainBudget(0.45, 1.2, 0.3, "as of the weights alone, and activations off by some 1 %"),
    },
}

HALF_SLACK = 2.0
"""A graph that computes in float16, and a chain of them, passes where it is no further off than so many times the
unpatched reference in float16, on the same inputs: the same roundings in another order, or in other places. That is
measured for every case, because it grows with what is summed and with what a softmax multiplies."""

INHERENT_SLACK = 1.5
"""A block beyond its bound passes all the same where it is no further off than so many times what the stored weights do
to the reference itself: a saturated softmax multiplies the error of weights that could not be rounded better, and that
they could not is checked group by group. The chain has no such way out: there the damage is the finding."""

FLAVORS_APART = {"float32": 0.005, "float16": 0.02}
"""‖difference‖ / ‖output‖ of two flavors of a block over the same integers, on the same inputs, by the KV cache of the
second. Their products are the same but for float sums in another order, which now and then move an activation to the
next of the 255 steps that products round it to. A rounded cache moves all that come after attention a little, and so
many of them that the difference is about that rounding's own, 0.6 % of each product."""
