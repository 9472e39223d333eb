"""Rounding a matrix for MNN: to which steps, in blocks of how many inputs, and whether a stored one is the nearest."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from glmexport.affine import Affine, Floats
from glmexport.errors import ExportError
from glmexport.mnn.matrix import FLOAT16, FLOAT32, Integers, MnnMatrix

BLOCK_STEP = 16
"""MNN's blocks are multiples of this many inputs."""

_HALF_STEP = 0.501
_ROUNDED_ONCE = 1e-6


def quantized(rows: npt.NDArray[np.float32], matrix: MnnMatrix) -> Integers:
    """Round float32 rows [rows, inputs] to the nearest of equal steps from each block's lowest to its highest weight.

    As MNN's converter does it. Raises ExportError for weights that are no finite numbers.
    """
    blocks = np.ascontiguousarray(rows).reshape(len(rows), matrix.blocks, matrix.block)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ExportError("a weight is no finite number, which cannot be quantized; look at the checkpoint.")
    steps = np.float32((1 << matrix.bits) - 1)
    scale = (high - low) / steps
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint((blocks - low) / scale)
    codes[~np.isfinite(codes)] = 0  # a block of one value is its lowest
    np.clip(codes, 0, steps, out=codes)
    return Integers(codes.astype(np.uint8).reshape(rows.shape), np.concatenate([low, scale], -1))


def is_nearest(found: Floats, rows: Floats, matrix: MnnMatrix, *, rounded: bool) -> bool:
    """Whether stored rows are as close to the float32 rows as their form lets them be: half a step.

    rounded: whether integers are of these rows; otherwise the rows are of the integers, and only the arithmetic may
    have rounded them.
    """
    if matrix.bits == FLOAT32:
        return np.array_equal(found.view(np.uint32), np.ascontiguousarray(rows).view(np.uint32))
    if matrix.bits == FLOAT16:
        return bool((np.abs(found - rows) <= np.abs(rows) * 2.0**-11 + 2.0**-25).all())
    shape = (len(rows), matrix.blocks, matrix.block)
    blocks, error = rows.reshape(shape), np.abs(found - rows).reshape(shape)
    largest = np.abs(blocks).max(-1, keepdims=True)
    spread = blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)
    step = spread / ((1 << matrix.bits) - 1) * _HALF_STEP if rounded else 0.0
    return bool((error <= step + _ROUNDED_ONCE * (largest + spread)).all())


def block_for(inputs: set[int], at_most: int) -> int | None:
    """The largest multiple of 16 up to `at_most` that divides every one of `inputs`; None: one scale per channel."""
    common = math.gcd(*inputs)
    fitting = (size for size in range(at_most // BLOCK_STEP * BLOCK_STEP, 0, -BLOCK_STEP) if common % size == 0)
    return next(fitting, None)


def block_that_holds(affine: Affine, inputs: int) -> int | None:
    """The largest equal blocks of MNN's in which a quantized matrix keeps its scales, each group as one or several.

    None where no multiple of 16 divides its groups and its inputs; one group is a block of any size.
    """
    group = inputs if affine.per_channel else affine.block_size(inputs)
    if group >= inputs:
        return inputs
    block = math.gcd(group, inputs)
    return None if block % BLOCK_STEP else block
