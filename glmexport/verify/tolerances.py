"""How far a bundle may be from the reference, per form of its weights, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """An output passes when its largest absolute error, or that over the largest reference value, is in bounds."""

    absolute: float
    relative: float
    reason: str

    def allows(self, absolute: float, relative: float) -> bool:
        """Whether errors pass; NaN never does."""
        return absolute <= self.absolute or relative <= self.relative


TOLERANCES = {
    "float32": Tolerance(
        1e-4,
        1e-5,
        "the same float32 numbers summed in another order: sums of up to 16384 products differ by some 1e-6 of the "
        "largest value, and the absolute bound is for models whose activations stay near 1",
    ),
}
