"""Rounding a weight matrix to 4 or 8 bits: kernels that read each weight from memory once.

A tile, one group of LANES outputs, is gathered into cache as [inputs of the group, LANES]. All loops run over its lanes
inside and its inputs outside, so that they vectorize although every sum is taken in one order, input by input. Nothing
is reassociated or fused: the bytes are the same on every machine, for any threads, and for any bands of rows.

What a scale is worth is measured as the squared error of `float32(scale * (q - zero_point))`, in float64. The methods:

- `rtn`, plain rounding to nearest. Symmetric: scale = max|w| / 7 (127), codes -7..7; asymmetric: 15 (255) steps from
  min(w, 0) to max(w, 0), the zero point rounded to an integer.
- `mse`: the best of the scales in `affine.STEPS`, then the one that fits the chosen codes best in closed form, if with
  codes rounded anew it is better still. A symmetric scale takes the sign that puts the weight of largest magnitude on
  the extra code, -8 (-128). Never worse than `rtn`, nor than max / -8 as in onnxruntime's quantizer: both are tried.
- `hqq`: half-quadratic splitting, after Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models"
  (2023); what differs is in `_split`.

A group of zeros gets scale 1, which a reader may divide by, and codes equal to the zero point. So does a group whose
largest magnitude is below 2**-100: its scale or what is computed from it would leave the normal float32 numbers.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numba
import numpy as np

from glmexport.affine import METHODS, Affine, Bytes, Doubles, Floats, Quantized, pack
from glmexport.compiled import Kernel
from glmexport.errors import GlmExportError

LANES = 32  # a power of two; 128 bytes of a tile's row, so a group of 128 stays in the first cache
MOST_ROWS = 256  # of one task: enough work for a thread, and its output stays in the second cache

_SIGNATURE = """int64(
    Array(float32, 1, "C", readonly=True), UniTuple(int64, 2), UniTuple(int64, 2), int64, int64,
    Tuple((int64, boolean, int64)), Array(float32, 1, "C"),
    Tuple((Array(uint8, 2, "C"), Array(float32, 2, "C"), Array(uint8, 2, "C"), Array(float64, 2, "C"))),
)"""
_RTN, _MSE, _HQQ = range(len(METHODS))
_ROUND = np.float32(3 << 22)  # adding and subtracting it rounds |x| < 2**22 to nearest even, in any vector unit
_ONE, _ZERO = np.float32(1), np.float32(0)
_SMALLEST, _LARGEST = np.float32(2.0**-100), np.float32(2.0**126)
_ITERATIONS, _BETA, _BETA_GROWTH = 20, np.float32(10), np.float32(1.01)

_Pair: TypeAlias = tuple[int, int]
_Kind: TypeAlias = tuple[int, bool, int]  # bits, symmetric, method
_Rows: TypeAlias = tuple[Bytes, Floats, Bytes, Doubles]  # codes, scales, zero points, sums as in `Fit`
_part = numba.njit(nogil=True, error_model="numpy")  # compiled as part of `_quantize_rows`


def quantize(matrix: Floats, spec: Affine, threads: int | None = None) -> Quantized:
    """Quantize `matrix`, float32 [out, in] of any strides, on `threads` threads (default: one per processor).

    Rows do not depend on each other: the bytes of a band of rows are those of the same rows of the whole matrix.
    Padding after the last input is the zero point. Raises GlmExportError where the matrix is not float32 and
    two-dimensional, has no inputs, or holds NaN or infinity (a magnitude above 2**126 counts as that).
    """
    if matrix.dtype != np.float32 or matrix.ndim != 2:
        raise GlmExportError(f"expected a float32 matrix to quantize, got {matrix.dtype} of shape {matrix.shape}.")
    rows, width = matrix.shape
    block, groups = spec.block_size(width), spec.groups(width)
    shared = groups if spec.per_channel else 1  # blocks that have one scale between them
    codes = np.empty((rows, groups * block * spec.bits // 8), np.uint8)
    scales, points = np.empty((rows, groups // shared), np.float32), np.empty((rows, groups // shared), np.uint8)
    sums = np.zeros((rows, 4))
    flat, strides = _flat(matrix)
    kind = (spec.bits, spec.symmetric, METHODS.index(spec.method))
    steps = np.array(spec.steps, np.float32)

    def task(first: int) -> int:
        chunk = (first, min(first + chunk_rows, rows))
        return int(_KERNEL(flat, strides, chunk, width, block * shared, kind, steps, (codes, scales, points, sums)))

    threads = max(1, threads or os.cpu_count() or 1)
    chunk_rows = min(MOST_ROWS, LANES * -(-max(rows, 1) // (LANES * threads * 2)))
    with ThreadPoolExecutor(threads) as pool:
        wrong = sum(pool.map(task, range(0, rows, chunk_rows)))
    if wrong:
        raise GlmExportError(f"{wrong} of its {rows * width} weights are NaN or infinite, which no scale can hold.")
    if shared > 1:
        scales, points = np.repeat(scales, shared, axis=1), np.repeat(points, shared, axis=1)
    blocks = codes.reshape(rows, groups, block * spec.bits // 8)
    return Quantized(blocks, scales, None if spec.symmetric else pack(points, spec.bits), sums)


def _flat(matrix: Floats) -> tuple[Floats, _Pair]:
    """The memory that `matrix` covers as a read-only vector, and the strides of rows and columns in it, in elements."""
    item = matrix.itemsize
    if not matrix.flags.aligned or any(stride < 0 or stride % item for stride in matrix.strides):
        matrix = matrix.copy()
    down, across = (stride // item for stride in matrix.strides)
    covered = 1 + (matrix.shape[0] - 1) * down + (matrix.shape[1] - 1) * across if matrix.size else 0
    return np.lib.stride_tricks.as_strided(matrix, (covered,), (item,), writeable=False), (down, across)


# What is known of each lane of a tile: rows of `lane` float32 [9, LANES] and `total` float64 [6, LANES], as passing
# fifteen arrays takes longer than the arithmetic on a small group. Low and high are the smallest and largest code less
# the zero point: -8 and 7 (-128 and 127) where symmetric. Totals 0 to 3 start at zero with each pass over the tile.
_LOWEST, _HIGHEST, _BASE, _SCALE, _LOW, _INVERSE, _HIGH, _BEST_SCALE, _BEST_LOW = range(9)
_ERROR, _DOT, _SQUARE, _SHIFT, _BEST_ERROR, _POINT = range(6)


@_part
def _round(exact: np.float32, low: np.float32, high: np.float32) -> np.float32:
    return (min(max(exact, low), high) + _ROUND) - _ROUND


@_part
def _gather(
    flat: Floats, row_stride: int, column_stride: int, row: int, rows: int, column: int, count: int, tile: Floats
) -> None:
    """Copy `count` inputs of `rows` outputs into tile [count, LANES]; lanes without an output are zero."""
    start = row * row_stride + column * column_stride
    if row_stride == 1 and rows == LANES:
        for i in range(count):
            for j in range(LANES):
                tile[i, j] = flat[start + i * column_stride + j]
        return
    if rows < LANES:
        tile[:count] = _ZERO
    for j in range(rows):
        for i in range(count):
            tile[i, j] = flat[start + j * row_stride + i * column_stride]


@_part
def _extremes(tile: Floats, count: int, lane: Floats, total: Doubles) -> int:
    """Smallest and largest weight of each lane, 0 included; how many weights are NaN or too large."""
    wrong = 0
    for j in range(LANES):
        lane[_LOWEST, j] = lane[_HIGHEST, j] = _ZERO
    for i in range(count):
        for j in range(LANES):
            weight = tile[i, j]
            wrong += 0 if abs(weight) <= _LARGEST else 1
            lane[_LOWEST, j] = weight if weight < lane[_LOWEST, j] else lane[_LOWEST, j]
            lane[_HIGHEST, j] = weight if weight > lane[_HIGHEST, j] else lane[_HIGHEST, j]
    return wrong


@_part
def _prepare(top: np.float32, lane: Floats, total: Doubles) -> None:
    for j in range(LANES):
        lane[_INVERSE, j] = _ONE / lane[_SCALE, j]
        lane[_HIGH, j] = lane[_LOW, j] + top
        total[_ERROR, j] = total[_DOT, j] = total[_SQUARE, j] = total[_SHIFT, j] = 0.0


@_part
def _keep_the_better(lane: Floats, total: Doubles) -> None:
    for j in range(LANES):
        better = total[_ERROR, j] < total[_BEST_ERROR, j]  # selects, as branches would not vectorize
        total[_BEST_ERROR, j] = total[_ERROR, j] if better else total[_BEST_ERROR, j]
        lane[_BEST_SCALE, j] = lane[_SCALE, j] if better else lane[_BEST_SCALE, j]
        lane[_BEST_LOW, j] = lane[_LOW, j] if better else lane[_BEST_LOW, j]


@_part
def _resume(top: np.float32, lane: Floats, total: Doubles) -> None:
    for j in range(LANES):
        lane[_SCALE, j] = lane[_BEST_SCALE, j]
        lane[_LOW, j] = lane[_BEST_LOW, j]
    _prepare(top, lane, total)


@_part
def _trial(tile: Floats, count: int, top: np.float32, lane: Floats, total: Doubles) -> None:
    """Measure the candidates; each that is better becomes the best."""
    _prepare(top, lane, total)
    for i in range(count):
        for j in range(LANES):
            code = _round(tile[i, j] * lane[_INVERSE, j], lane[_LOW, j], lane[_HIGH, j])
            error = np.float64(tile[i, j] - lane[_SCALE, j] * code)
            total[_ERROR, j] += error * error
    _keep_the_better(lane, total)


@_part
def _search(
    tile: Floats, count: int, symmetric: bool, method: int, steps: Floats, top: np.float32, lane: Floats, total: Doubles
) -> None:
    """Try every number of steps; asymmetric `mse` with both integers around the exact zero point."""
    for side in range(2 if method == _MSE and not symmetric else 1):
        for j in range(LANES):
            low, high = lane[_LOWEST, j], lane[_HIGHEST, j]
            size = max(high, -low)
            if symmetric:
                lane[_BASE, j] = -size if method != _RTN and size == high else size
                lane[_LOW, j] = -(top + _ONE) / np.float32(2)
            else:
                lane[_BASE, j] = high - low
                point = -low / (lane[_BASE, j] / top) if size >= _SMALLEST else _ZERO
                nearest = (point + _ROUND) - _ROUND
                if side == 1:
                    nearest += _ONE if point > nearest else -_ONE
                lane[_LOW, j] = -min(max(nearest, _ZERO), top)
            if side == 0:
                lane[_BEST_SCALE, j], lane[_BEST_LOW, j] = _ONE, lane[_LOW, j]
                total[_BEST_ERROR, j] = np.inf
            if size < _SMALLEST:
                lane[_BASE, j], total[_BEST_ERROR, j] = _ONE, -1.0  # nothing is better
        for step in steps:
            for j in range(LANES):
                lane[_SCALE, j] = lane[_BASE, j] / step
            _trial(tile, count, top, lane, total)


@_part
def _refit(tile: Floats, count: int, top: np.float32, lane: Floats, total: Doubles) -> None:
    """Try the scale of least squared error for the best codes so far: sum(w c) / sum(c c), where c = q - zero_point."""
    _resume(top, lane, total)
    for i in range(count):
        for j in range(LANES):
            code = np.float64(_round(tile[i, j] * lane[_INVERSE, j], lane[_LOW, j], lane[_HIGH, j]))
            total[_DOT, j] += np.float64(tile[i, j]) * code
            total[_SQUARE, j] += code * code
    for j in range(LANES):
        if total[_SQUARE, j] > 0.0:
            lane[_SCALE, j] = np.float32(total[_DOT, j] / total[_SQUARE, j])
    _trial(tile, count, top, lane, total)


@_part
def _split(tile: Floats, count: int, symmetric: bool, top: np.float32, lane: Floats, total: Doubles) -> None:
    """Half-quadratic splitting from the best candidate so far.

    Each iteration shrinks the errors, r -> sign(r) max(|r| - |r|**(p - 1) / beta, 0), and solves for scale and zero
    point with what is left, the large errors, taken out of the weights. As in the paper, beta grows from 10 by 1 % in
    each of 20 iterations, and the least sum of |w - v| wins. Adapted: errors are in units of the scale, so that beta
    does not depend on how large the weights are; p is 11/16 for 0.7, its powers are square roots and so the same on
    every machine. The paper moves a zero point that is no integer and keeps the scale; here the scale does the work,
    and an asymmetric zero point stays an integer: what rounding cuts off is carried into the next iteration.
    """
    beta = _BETA
    _resume(top, lane, total)
    for j in range(LANES):
        total[_POINT, j] = -lane[_LOW, j]
        total[_BEST_ERROR, j] = np.inf if total[_BEST_ERROR, j] >= 0.0 else -1.0
    for _ in range(_ITERATIONS):
        _prepare(top, lane, total)
        for i in range(count):
            for j in range(LANES):
                exact = tile[i, j] * lane[_INVERSE, j]
                code = _round(exact, lane[_LOW, j], lane[_HIGH, j])
                error = exact - code
                size = abs(error) + _SMALLEST
                fourth = np.sqrt(np.sqrt(size))
                kept = size - _ONE / (beta * fourth * np.sqrt(np.sqrt(fourth)))
                kept = kept if kept > _ZERO else _ZERO
                kept = kept if error > _ZERO else -kept
                total[_DOT, j] += np.float64(exact - kept) * np.float64(code)
                total[_SQUARE, j] += np.float64(code) * np.float64(code)
                total[_SHIFT, j] += np.float64(error - kept)
                total[_ERROR, j] += np.float64(abs(tile[i, j] - lane[_SCALE, j] * code))
        _keep_the_better(lane, total)
        for j in range(LANES):
            if total[_DOT, j] > 0.0:
                lane[_SCALE, j] = np.float32(lane[_SCALE, j] * (total[_DOT, j] / total[_SQUARE, j]))
            if not symmetric:
                total[_POINT, j] = min(max(total[_POINT, j] - total[_SHIFT, j] / count, 0.0), np.float64(top))
                lane[_LOW, j] = -np.float32(np.rint(total[_POINT, j]))
        beta *= _BETA_GROWTH


@_part
def _encode(tile: Floats, count: int, top: np.float32, lane: Floats, total: Doubles, codes: Bytes) -> None:
    """Codes uint8 [count, LANES] of the best candidates, padded with the zero point; totals 0 to 3 as in `Fit`."""
    _resume(top, lane, total)
    for i in range(count):
        for j in range(LANES):
            code = _round(tile[i, j] * lane[_INVERSE, j], lane[_LOW, j], lane[_HIGH, j])
            codes[i, j] = np.uint8(np.int32(code - lane[_LOW, j]))
            value = lane[_SCALE, j] * code
            error = np.float64(tile[i, j] - value)
            total[0, j] += error * error
            total[1, j] += np.float64(tile[i, j]) * np.float64(tile[i, j])
            total[2, j] += np.float64(tile[i, j]) * np.float64(value)
            total[3, j] += np.float64(value) * np.float64(value)
    for i in range(count, len(codes)):
        for j in range(LANES):
            codes[i, j] = np.uint8(np.int32(-lane[_LOW, j]))


@_part
def _store(codes: Bytes, bits: int, row: int, rows: int, start: int, out: Bytes) -> None:
    """Write codes [span, LANES] of `rows` outputs to out [row:, start:]; two of 4 bits a byte, low nibble first."""
    count = len(codes) * bits // 8
    if bits == 4:
        for i in range(count):
            for j in range(LANES):
                codes[i, j] = codes[2 * i, j] | (codes[2 * i + 1, j] << np.uint8(4))
    for j in range(rows):
        for i in range(count):
            out[row + j, start + i] = codes[i, j]


def _quantize_rows(
    flat: Floats, strides: _Pair, chunk: _Pair, width: int, span: int, kind: _Kind, steps: Floats, out: _Rows
) -> int:
    """Quantize the outputs of `chunk`, first and past the last, in groups of `span` inputs into their rows of `out`.

    Returns how many weights are NaN or too large.
    """
    row_stride, column_stride = strides
    first, last = chunk
    bits, symmetric, method = kind
    codes, scales, points, sums = out
    top = np.float32((1 << bits) - 1)
    tile, tile_codes = np.empty((span, LANES), np.float32), np.empty((span, LANES), np.uint8)
    lane, total = np.empty((9, LANES), np.float32), np.empty((6, LANES))
    tiles, groups = (last - first + LANES - 1) // LANES, (width + span - 1) // span
    across = row_stride < column_stride  # neighbours in memory are neighbours in time
    wrong = 0
    for number in range(tiles * groups):
        row = first + LANES * (number % tiles if across else number // groups)
        group = number // tiles if across else number % groups
        rows, count = min(LANES, last - row), min(span, width - group * span)
        _gather(flat, row_stride, column_stride, row, rows, group * span, count, tile)
        wrong += _extremes(tile, count, lane, total)
        _search(tile, count, symmetric, method, steps, top, lane, total)
        if method == _MSE:
            _refit(tile, count, top, lane, total)
        elif method == _HQQ:
            _split(tile, count, symmetric, top, lane, total)
        _encode(tile, count, top, lane, total, tile_codes)
        _store(tile_codes, bits, row, rows, group * span * bits // 8, codes)
        for j in range(rows):
            scales[row + j, group] = lane[_SCALE, j]
            points[row + j, group] = np.uint8(np.int32(-lane[_LOW, j]))
            for k in range(4):
                sums[row + j, k] += total[k, j]
    return wrong


_KERNEL = Kernel(_quantize_rows, _SIGNATURE)
