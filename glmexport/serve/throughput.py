"""How many tokens a second a runner gives, by how many rows it computes at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glmexport.serve.rows import RowRunner

ROWS = (1, 2, 4, 8)
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Point:
    """rows: computed at once. step: median seconds of one token for all of them. prefill: seconds of one prompt."""

    rows: int
    step: float
    prefill: float

    @property
    def speed(self) -> float:
        """Tokens a second of all rows together."""
        return self.rows / max(self.step, 1e-9)


def throughput(
    runner: RowRunner, prompt_ids: Sequence[int], *, rows: Sequence[int] = ROWS, tokens: int = 32, warm_up: int = 2
) -> list[Point]:
    """Measure greedy answers to one prompt, for each of `rows` that the runner has slots for.

    tokens: measured steps, after `warm_up` others. The runner's slots must be free; they are again afterwards.
    """
    points = []
    for count in (count for count in rows if count <= runner.slots):
        slots = list(range(count))
        try:
            begun = time.perf_counter()
            latest = [int(np.argmax(runner.prefill(slot, prompt_ids))) for slot in slots]
            prefill = (time.perf_counter() - begun) / count
            seconds = []
            for _ in range(warm_up + tokens):
                begun = time.perf_counter()
                latest = [int(token) for token in runner.decode(slots, latest).argmax(axis=-1)]
                seconds.append(time.perf_counter() - begun)
        finally:
            for slot in slots:
                runner.free(slot)
        points.append(Point(count, float(np.median(seconds[warm_up:])), prefill))
    return points


def in_words(points: Sequence[Point]) -> list[str]:
    """A line for each point: rows, tokens a second together and of each row, times as many as one row."""
    if not points:
        return []
    one = points[0].speed
    return [
        f"{_rows(point):7}: {point.speed:8.1f} tokens/s together, {point.speed / point.rows:7.1f} each, "
        f"{point.speed / one:.2f} times {_rows(points[0])}"
        for point in points
    ]


def _rows(point: Point) -> str:
    return f"{point.rows} row{'s' * (point.rows > 1)}"
