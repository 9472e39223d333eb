"""A matrix as MNN stores it beside a model: float32, float16, or integers with scales, and back.

A matrix of integers [outputs, inputs] is, all little-endian and one after the other:

- one byte 2 (axes); outputs * blocks and the inputs of a block, 16 bits each, or 32 where one of them needs them;
- the codes' values from the smallest on: their number in one byte (0 for 256), then one signed byte each;
- the codes, row by row without gaps; of two 4-bit ones in a byte the first is the high nibble;
- for each row and block of inputs, float32: the lowest value and the scale, so that `x = scale * code + lowest`; where
  symmetric, scales alone: `x = scale * (code - middle)`;
- the bias, float32 [outputs].

Found by converting single layers with `--weightQuantBits` and reading MNN's loader (`ConvolutionCommon::load`, which
takes the two sizes for their product alone); a test holds what MNN's converter writes against it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glmexport.affine import Bytes, Floats
from glmexport.errors import ExportError

FLOAT32, FLOAT16 = 32, 16
KIND_INTEGERS, KIND_HALF = 1, 3
_SHORT = 0xFFFF


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


class CodePacker:
    """Puts codes uint8 into bytes as they come, whole rows or not; half a byte is carried over."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._rest = np.empty(0, np.uint8)

    def push(self, codes: Bytes) -> Bytes:
        """The bytes that are whole now, uint8 [bytes]."""
        flat = np.ascontiguousarray(codes).reshape(-1)
        if self._bits == 8:
            return flat
        if len(self._rest):
            flat = np.concatenate((self._rest, flat))
        even = len(flat) & ~1
        self._rest = flat[even:].copy()
        packed: Bytes = np.left_shift(flat[:even:2], np.uint8(4))
        packed |= flat[1:even:2]
        return packed

    def finish(self) -> Bytes:
        """The last byte, where half of one is left; its low nibble is 0."""
        return np.left_shift(self._rest, np.uint8(4))


def integer_parts(matrix: MnnMatrix, bands: Iterator[Integers], bias: Floats) -> Iterator[Bytes]:
    """The bytes of a quantized matrix, of which only the scales are kept while its bands of rows go by.

    bias: float32 [outputs].
    """
    yield np.frombuffer(matrix.header, np.uint8)
    packer, scales = CodePacker(matrix.bits), []
    for band in bands:
        scales.append(band.scales)
        yield packer.push(band.codes)
    yield packer.finish()
    for part in (*scales, bias):
        yield np.ascontiguousarray(part, "<f4").reshape(-1).view(np.uint8)


def unpack_codes(packed: Bytes, bits: int, odd: bool, count: int) -> Bytes:
    """Codes uint8 [count] of bytes; the inverse of a `CodePacker`. odd: the first half byte is none of them."""
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
