"""Every group of a stored quantized matrix against the checkpoint's weights.

A doubled scale, a turned nibble or two exchanged groups move an output by less than quantizing does, and only in the
group where they are. So each group is held to what plain rounding to nearest, computed here and on its own, would give:
no method of ours is worse than that.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from glmexport.affine import Affine, Doubles, Floats
from glmexport.compiled import Kernel

BAND_BYTES = 1 << 22
SLACK = 1.001
"""Float32 sums of a group taken in another order."""

_SMALLEST = np.float32(2.0**-100)
"""A group whose largest magnitude is below this becomes zeros: its scale would leave the normal float32 numbers."""

_THREADS = os.cpu_count() or 1
_SIGNATURE = """float64[::1](
    Array(float32, 2, "C", readonly=True), Array(float32, 2, "C", readonly=True), int64,
    Tuple((boolean, boolean, int64, int64))
)"""

RECORDED = 1e-4
"""How far (absolute) the manifest's error and cosine may be from those found: they are sums over other orders."""


@dataclass(frozen=True)
class Finding:
    """What came of one matrix: groups that are worse than plain rounding, and ‖error‖ / ‖weights‖ of the whole."""

    bad_groups: int
    groups: int
    relative_error: float
    cosine: float


class Stored(Protocol):
    """A quantized matrix that rows can be read of, whatever file it lies in."""

    @property
    def affine(self) -> Affine: ...
    @property
    def outputs(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    def rows(self, ids: npt.NDArray[np.int64], /) -> Floats:
        """Float32 rows [len(ids), inputs]."""
        ...


def check_matrix(stored: Stored, rows: Callable[[int, int], torch.Tensor]) -> Finding:
    """Compare a stored matrix with the checkpoint's float32 rows `rows(start, stop)` [stop - start, in]."""
    affine, width = stored.affine, stored.inputs
    group = width if affine.per_channel else affine.block_size(width)
    kind = (affine.symmetric, affine.method == "hqq", affine.middle, affine.levels)
    band = max(BAND_BYTES // (4 * width), 1)

    def compare(start: int, weights: Floats) -> Doubles:
        found = stored.rows(np.arange(start, start + len(weights)))
        sums: Doubles = _KERNEL(weights, np.ascontiguousarray(found), group, kind)
        return sums

    # rows are read here, in their order, and compared beside that; few wait at a time
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[Doubles]] = deque()
        sums = np.zeros(5)
        for start in range(0, stored.outputs, band):
            weights = rows(start, min(start + band, stored.outputs)).contiguous().numpy()
            waiting.append(pool.submit(compare, start, weights))
            if len(waiting) > 2 * _THREADS:
                sums += waiting.popleft().result()
        sums += sum(future.result() for future in waiting)
    bad, squared_error, squared_weights, squared_stored, dot = sums.tolist()
    groups = stored.outputs * -(-width // group)
    norm = math.sqrt(squared_weights * squared_stored)
    return Finding(
        int(bad),
        groups,
        math.sqrt(squared_error / squared_weights) if squared_weights else 0.0,
        dot / norm if norm else 1.0,
    )


def record_complaints(record: dict[str, Any], finding: Finding) -> list[str]:
    """Where the manifest says other errors than those found; it may say that nobody measured them."""
    found = {"relative_error": finding.relative_error, "cosine": finding.cosine}
    return [
        f"the manifest says {key} {record.get(key)!r:.40}, found {value:.6f}"
        for key, value in found.items()
        if record.get(key) is not None and not _close(record[key], value)
    ]


def _close(stated: Any, found: float) -> bool:
    return isinstance(stated, float | int) and abs(stated - found) <= RECORDED


def _compare(weights: Floats, stored: Floats, group: int, kind: tuple[bool, bool, int, int]) -> Doubles:
    """Float64 [5]: groups worse than plain rounding, and the sums of error², weights², stored², weights * stored.

    weights, stored: float32 [rows, in]. kind: symmetric; whether absolute errors count (hqq minimizes these, the other
    methods squared ones); the middle code; how many codes there are. The scale of plain rounding is computed in
    float32, as it would be stored.
    """
    symmetric, absolute, middle, levels = kind
    result = np.zeros(5)
    rows, width = weights.shape
    for row in range(rows):
        for start in range(0, width, group):
            stop = min(start + group, width)
            lowest, highest = np.float32(0), np.float32(0)
            for i in range(start, stop):
                lowest, highest = min(lowest, weights[row, i]), max(highest, weights[row, i])
            largest = max(highest, -lowest)
            if symmetric and absolute:  # it sets out from the code that has no opposite
                scale = (-largest if highest == largest else largest) / np.float32(middle)
            elif symmetric:
                scale = largest / np.float32(middle - 1)
            else:
                scale = (highest - lowest) / np.float32(levels - 1)
            if not largest >= _SMALLEST:
                scale = np.float32(1)
            zero, low, high = np.float32(0), np.float32(-middle), np.float32(middle - 1)
            if not symmetric:
                zero, low, high = np.rint(-lowest / scale), np.float32(0), np.float32(levels - 1)
            ours, plain = 0.0, 0.0
            for i in range(start, stop):
                weight, found = weights[row, i], stored[row, i]
                error = np.float64(np.float32(weight - found))
                code = min(max(np.rint(np.float32(weight / scale) + zero), low), high)
                rounded = np.float64(np.float32(weight - np.float32(np.float32(code - zero) * scale)))
                ours += abs(error) if absolute else error * error
                plain += abs(rounded) if absolute else rounded * rounded
                result[1] += error * error
                result[2] += np.float64(weight) * np.float64(weight)
                result[3] += np.float64(found) * np.float64(found)
                result[4] += np.float64(weight) * np.float64(found)
            if not ours <= plain * SLACK:  # so that NaN is bad
                result[0] += 1
    return result


_KERNEL = Kernel(_compare, _SIGNATURE)
