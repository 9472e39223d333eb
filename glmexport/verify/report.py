"""What a verification found, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One comparison. Errors are over all steps of the case; None where a row compares no numbers.

    headroom: how many times larger the values of a float16 graph might be, in the rows about overflow.
    """

    graph: str
    case: str
    passed: bool
    max_abs_error: float | None = None
    relative_error: float | None = None
    detail: str = ""
    headroom: float | None = None


@dataclass
class Report:
    """Every row in the order in which it was found; `greedy` counts tokens equal to the reference's, of all."""

    bundle: str
    form: str
    rows: list[Row] = field(default_factory=list)
    greedy: tuple[int, int] = (0, 0)

    @property
    def passed(self) -> bool:
        """Whether every row passed, and there was one."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> Sequence[Row]:
        """The rows that did not pass."""
        return [row for row in self.rows if not row.passed]

    @property
    def worst(self) -> float:
        """Largest absolute error of all rows; NaN if any error is."""
        errors = [row.max_abs_error for row in self.rows if row.max_abs_error is not None]
        return float("nan") if any(error != error for error in errors) else max(errors, default=0.0)

    def worst_rows(self) -> list[Row]:
        """Of each graph the row with the largest error, what speaks of all graphs, and every row that failed."""
        worst: dict[str, Row] = {}
        for row in self.rows:
            if row.passed and row.max_abs_error is not None:
                held = worst.setdefault(row.graph, row)
                if row.max_abs_error > (held.max_abs_error or 0.0):
                    worst[row.graph] = row
        whole = ("files", "overflow", "next token")
        return [
            row
            for row in self.rows
            if not row.passed
            or worst.get(row.graph) is row
            or (row.graph in ("all", "chain") and row.case.startswith(whole))
        ]

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values; errors that are no finite number are given as strings."""
        return {
            "bundle": self.bundle,
            "form": self.form,
            "passed": self.passed,
            "greedy_equal": self.greedy[0],
            "greedy_total": self.greedy[1],
            "rows": [{key: _plain(value) for key, value in asdict(row).items()} for row in self.rows],
        }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
