"""Rows of a raw embedding file: float32 to and from the stored dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport.form import NEAREST

_HALF = np.uint32(0x7FFF)  # just under half of what is cut off; the last kept bit makes it a half on odd ones
_FRACTION = np.uint16(0x7F)
_QUIET = np.uint16(0x40)  # the highest fraction bit of a bfloat16


def encode_rows(rows: npt.NDArray[np.float32], dtype: str, rounding: str = NEAREST) -> npt.NDArray[Any]:
    """Float32 rows, any shape -> uint16 (bfloat16), float16 or float32 of that shape, as stored.

    rounding: bfloat16 only. `nearest-even` as IEEE 754 rounds, infinities and NaN stay what they are; `truncate` is the
    upper half of each float32 (a NaN whose upper half would be an infinity stays a NaN).
    """
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):  # infinities that come of it are found by whoever compares
            return rows.astype(dtype)
    bits = np.ascontiguousarray(rows).view(np.uint32)
    if rounding == NEAREST:
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += _HALF
        rounded += bits
        upper = (rounded >> np.uint32(16)).astype(np.uint16)
    else:
        upper = (bits >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(rows)
    if nan.any():
        cut = (bits[nan] >> np.uint32(16)).astype(np.uint16)
        upper[nan] = np.where(cut & _FRACTION, cut, cut | _QUIET)
    return upper


def decode_rows(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Stored rows -> float32 rows of the same shape, exact."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)
