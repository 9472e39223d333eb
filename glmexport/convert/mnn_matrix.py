"""A matrix as MNN stores it beside a model: float32, float16, or integers with scales, and back.

Integers lie row by row of the output, unsigned, two 4-bit ones a byte with the first in the high nibble, after a header
(sizes, then the value of each code). Each block of inputs of an output has a scale and, where asymmetric, its lowest
value before it: `x = scale * code + lowest`. A symmetric matrix has scales alone: `x = scale * (code - middle)`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from glmexport.affine import Bytes, Floats
from glmexport.errors import ExportError

FLOAT32, FLOAT16 = 32, 16
BLOCK_STEP = 16
"""MNN's blocks are multiples of this many inputs."""

KIND_INTEGERS, KIND_HALF = 1, 3
_SHORT = 0xFFFF
_HALF_STEP = 0.501
_ROUNDED_ONCE = 1e-6


class Integers(NamedTuple):
    """Rows of a quantized matrix: codes uint8 [rows, inputs]; scales float32 [rows, blocks, 2 (lowest, scale) or 1]."""

    codes: Bytes
    scales: Floats


@dataclass(frozen=True)
class MnnMatrix:
    """How a matrix [outputs, inputs] is stored.

    bits: 32 or 16 for floats, 8 or 4 for integers. block: inputs that share a scale, all of them where it is `inputs`.
    symmetric: scales alone.
    """

    outputs: int
    inputs: int
    bits: int
    block: int = 0
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.is_integers and (self.block < 1 or self.inputs % self.block):
            raise ExportError(f"Blocks of {self.block} inputs do not divide {self.inputs}; MNN needs equal blocks.")

    @property
    def is_integers(self) -> bool:
        """Whether it is quantized."""
        return self.bits < FLOAT16

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.inputs // self.block

    @property
    def kind(self) -> int | None:
        """MNN's number for this form; None for float32, which has none."""
        return None if self.bits == FLOAT32 else KIND_INTEGERS if self.is_integers else KIND_HALF

    @property
    def stored_bits(self) -> int:
        """As the model says it."""
        return self.bits if self.is_integers else 0

    @property
    def lowest(self) -> int:
        """The value of code 0 before scaling, as the model says it; 0 stands for symmetric."""
        return -(1 << (self.bits - 1)) if self.is_integers and not self.symmetric else 0

    @property
    def scale_rows(self) -> int:
        """How many pairs (lowest, scale) there are; 0 where symmetric."""
        return self.outputs * self.blocks if self.is_integers and not self.symmetric else 0

    @property
    def wide_header(self) -> bool:
        """Whether the header's sizes have 32 bits."""
        return self.is_integers and max(self._sizes) > _SHORT

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.outputs * self.blocks, self.block

    @property
    def header(self) -> bytes:
        """What stands before the integers; nothing before floats."""
        if not self.is_integers:
            return b""
        levels = 1 << self.bits
        values = np.arange(-levels // 2, levels // 2).astype(np.int8).tobytes()
        return struct.pack("<B2IB" if self.wide_header else "<B2HB", 2, *self._sizes, levels % 256) + values

    @property
    def weight_bytes(self) -> int:
        """Of the header and what follows it."""
        return len(self.header) + -(-self.outputs * self.inputs * self.bits // 8)

    @property
    def scale_bytes(self) -> int:
        """Of the scales."""
        return 4 * self.outputs * self.blocks * (1 if self.symmetric else 2) if self.is_integers else 0

    @property
    def bias_bytes(self) -> int:
        """Of the bias, which every product has."""
        return 4 * self.outputs

    @property
    def total_bytes(self) -> int:
        """Of all of it beside the model."""
        return self.weight_bytes + self.scale_bytes + self.bias_bytes

    def external(self, offset: int) -> tuple[int, ...]:
        """Where its parts lie, as the model says it."""
        if self.bits == FLOAT32:
            return offset, self.weight_bytes, self.bias_bytes
        return offset, self.weight_bytes, self.scale_bytes, self.bias_bytes, 0


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """Bytes of codes uint8 [rows, inputs], one after the other; an odd last one of 4 bits has a zero beside it."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed: Bytes = (flat[0::2] << np.uint8(4)) | flat[1::2]
    return packed


def unpack_codes(packed: Bytes, bits: int, odd: bool, count: int) -> Bytes:
    """Codes uint8 [count] of bytes; the inverse of `pack_codes`. odd: the first half byte is none of them."""
    if bits == 8:
        return packed[:count]
    codes = np.empty(packed.size * 2, np.uint8)
    np.right_shift(packed, 4, out=codes[0::2])
    np.bitwise_and(packed, 15, out=codes[1::2])
    return codes[odd : odd + count]


def dequantized(rows: Integers, matrix: MnnMatrix) -> Floats:
    """Float32 rows [rows, inputs], as MNN computes them: one product and one sum."""
    codes = rows.codes.reshape(-1, matrix.blocks, matrix.block).astype(np.float32)
    if matrix.symmetric:
        codes -= np.float32(1 << (matrix.bits - 1))
        codes *= rows.scales
    else:
        codes *= rows.scales[..., 1:]
        codes += rows.scales[..., :1]
    return codes.reshape(-1, matrix.inputs)


def quantized(rows: npt.NDArray[np.float32], matrix: MnnMatrix) -> Integers:
    """Round float32 rows [rows, inputs] to the nearest of equal steps from each block's lowest to its highest weight.

    As MNN's converter does it. Raises ExportError for weights that are no finite numbers.
    """
    blocks = np.ascontiguousarray(rows).reshape(len(rows), matrix.blocks, matrix.block)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ExportError("A weight is no finite number, which cannot be quantized; look at the checkpoint.")
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


class FileBytes:
    """The bytes of a file from `offset` on; slices are read when they are asked for.

    Not mapped: touched pages of a mapped file count as memory of the process. Raises OSError.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path, self._offset = path, offset

    def __len__(self) -> int:
        return max(self._path.stat().st_size - self._offset, 0)

    def __getitem__(self, part: slice) -> Bytes:
        start, stop, _ = part.indices(len(self))
        return np.fromfile(self._path, np.uint8, stop - start, offset=self._offset + start)


class StoredMatrix:
    """A matrix read back from the bytes beside a model: float32 rows, by arithmetic of its own."""

    def __init__(self, data: Bytes | FileBytes, matrix: MnnMatrix) -> None:
        """data: uint8, from where the matrix begins. Raises ExportError where the header is another form's."""
        self._codes_at = len(matrix.header)
        if len(data) < matrix.total_bytes or data[: self._codes_at].tobytes() != matrix.header:
            raise ExportError("A stored matrix is cut off, or its header is not the one of its form; convert again.")
        self.matrix = matrix
        self._data = data
        end = matrix.weight_bytes + matrix.scale_bytes
        self.bias: Floats = data[end : end + matrix.bias_bytes].copy().view(np.float32)

    def rows(self, first: int, count: int) -> Floats:
        """Float32 [count, inputs]."""
        matrix = self.matrix
        start, stop = (number * matrix.inputs * matrix.bits for number in (first, first + count))  # in bits
        stored = self._data[self._codes_at + start // 8 : self._codes_at + -(-stop // 8)]
        if not matrix.is_integers:
            floats = stored.copy().view(np.float32 if matrix.bits == FLOAT32 else np.float16)
            return floats.reshape(count, matrix.inputs).astype(np.float32, copy=False)
        codes = unpack_codes(stored, matrix.bits, start % 8 > 0, count * matrix.inputs)
        width, at = matrix.scale_bytes // matrix.outputs, matrix.weight_bytes
        scales = self._data[at + first * width : at + (first + count) * width].copy().view(np.float32)
        rows = Integers(codes.reshape(count, matrix.inputs), scales.reshape(count, matrix.blocks, -1))
        return dequantized(rows, matrix)
