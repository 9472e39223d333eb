"""Every group of a stored quantized matrix against the checkpoint's weights.

A doubled scale, a turned nibble or two exchanged groups move an output by less than quantizing does, and only in the
group where they are. So each group is held to what plain rounding to nearest, computed here and on its own, would give:
no method of ours is worse than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from glmexport.affine import Affine
from glmexport.quantized_rows import QuantizedRows

BAND_BYTES = 1 << 18
SLACK = 1.001
"""Float32 sums of a group taken in another order."""

SMALLEST = 2.0**-100
"""A group whose largest magnitude is below this becomes zeros: its scale would leave the normal float32 numbers."""

RECORDED = 1e-4
"""How far (absolute) the manifest's error and cosine may be from those found: they are sums over other orders."""


@dataclass(frozen=True)
class Finding:
    """What came of one matrix: groups that are worse than plain rounding, and ‖error‖ / ‖weights‖ of the whole."""

    bad_groups: int
    groups: int
    relative_error: float
    cosine: float


def check_matrix(stored: QuantizedRows, rows: Callable[[int, int], torch.Tensor]) -> Finding:
    """Compare a stored matrix with the checkpoint's float32 rows `rows(start, stop)` [stop - start, in]."""
    band = max(BAND_BYTES // (4 * stored.inputs), 1)
    bad = groups = 0
    squared_error = squared_weights = squared_stored = dot = 0.0
    for start in range(0, stored.outputs, band):
        stop = min(start + band, stored.outputs)
        weights = rows(start, stop)
        found = torch.from_numpy(stored.rows(np.arange(start, stop)))
        error = weights - found
        squared_error += _dot(error, error)
        squared_weights += _dot(weights, weights)
        squared_stored += _dot(found, found)
        dot += _dot(weights, found)
        ours, plain = _per_group(stored.affine, weights, error), _plain_rounding(stored.affine, weights)
        bad += int((~(ours <= plain * SLACK)).sum())  # so that NaN is bad
        groups += ours.numel()
    norm = math.sqrt(squared_weights * squared_stored)
    return Finding(
        bad, groups, math.sqrt(squared_error / squared_weights) if squared_weights else 0.0, dot / norm if norm else 1.0
    )


def record_complaints(record: dict[str, Any], finding: Finding) -> list[str]:
    """Where the manifest says other errors than those found; it may say that nobody measured them."""
    found = {"relative_error": finding.relative_error, "cosine": finding.cosine}
    return [
        f"the manifest says {key} {record.get(key)!r:.40}, found {value:.6f}"
        for key, value in found.items()
        if record.get(key) is not None and not _close(record[key], value)
    ]


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() * other.double()).sum())


def _close(stated: Any, found: float) -> bool:
    return isinstance(stated, float | int) and abs(stated - found) <= RECORDED


def _grouped(affine: Affine, weights: torch.Tensor) -> torch.Tensor:
    """[rows, in] -> [rows, groups, group], the last group filled up with zeros."""
    rows, width = weights.shape
    group = width if affine.per_channel else affine.block_size(width)
    padded = torch.nn.functional.pad(weights, (0, -width % group))
    return padded.reshape(rows, -1, group)


def _per_group(affine: Affine, weights: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    return _norm(affine, _grouped(affine, error))


def _norm(affine: Affine, error: torch.Tensor) -> torch.Tensor:
    """Of [rows, groups, group]: what the method promises not to exceed. hqq minimizes absolute, the others squared."""
    return (error.abs() if affine.method == "hqq" else error.square()).sum(-1)


def _plain_rounding(affine: Affine, weights: torch.Tensor) -> torch.Tensor:
    """The error of plain rounding to nearest in each group, [rows, groups]."""
    grouped = _grouped(affine, weights)
    lowest, highest = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    largest = torch.maximum(highest, -lowest)
    if affine.symmetric and affine.method == "hqq":  # it sets out from the code that has no opposite
        scale = torch.where(highest == largest, -largest, largest) / affine.middle
    elif affine.symmetric:
        scale = largest / (affine.middle - 1)
    else:
        scale = (highest - lowest) / (affine.levels - 1)
    scale = torch.where(largest >= SMALLEST, scale, torch.ones_like(scale))
    if affine.symmetric:
        zero, low, high = torch.zeros_like(scale), -affine.middle, affine.middle - 1
    else:
        zero, low, high = (-lowest / scale).round(), 0, affine.levels - 1
    codes = (grouped / scale + zero).round().clamp(low, high)
    return _norm(affine, grouped - (codes - zero) * scale)
