"""`llm.mnn.weight`: how the engine wants its matrices, floats or integers with scales, written as they are made.

A matrix of integers [out, in] is, all little-endian and one after the other:

- one byte 2 (axes); out and in, 16 bits each, or 32 where one of them needs them;
- the codes' values from the smallest on: their number in one byte (0 for 256), then one signed byte each;
- the codes, row by row without gaps; of two 4-bit ones in a byte the first is the high nibble;
- for each row and block of inputs, float32: the value of code 0 and the scale, so that `x = code * scale + least`;
- the bias, float32 [out].

Found by converting single layers with `--weightQuantBits` and reading MNN's loader (`ConvolutionCommon::load`); a test
holds what MNN's converter writes against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport.affine import Affine, Bytes, Floats, Quantized, unpack
from glmexport.errors import GlmExportError

BLOCKS = (32, 64, 128, "channel")
FLOAT32_BITS, FLOAT16_BITS = 32, 16
BITS = (4, 8, FLOAT16_BITS, FLOAT32_BITS)
_SHORT = 65535  # the largest size that is written in 16 bits


@dataclass(frozen=True)
class StoredMatrix:
    """How one matrix [outputs, inputs] is stored: `bits` of BITS; `block` inputs share a scale, or "channel" all.

    What is no multiple of the block gets one scale a row, as MNN knows no partial blocks.
    """

    outputs: int
    inputs: int
    bits: int
    block: int | str = "channel"

    @property
    def quantized(self) -> bool:
        """Whether it is integers."""
        return self.bits in (4, 8)

    @property
    def affine(self) -> Affine:
        """How its rows are quantized."""
        whole = self.block == "channel" or self.inputs % int(self.block)
        return Affine(self.bits, "channel" if whole else self.block, symmetric=False)

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        affine = self.affine
        return 1 if affine.per_channel else affine.groups(self.inputs)

    @property
    def header(self) -> bytes:
        """What stands in front of the codes."""
        long = max(self.outputs, self.inputs) > _SHORT
        sizes = np.array([self.outputs, self.inputs], "<u4" if long else "<u2").tobytes()
        levels = 1 << self.bits
        return bytes((2,)) + sizes + bytes((levels & 255,)) + np.arange(-levels // 2, levels // 2, dtype="i1").tobytes()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of weights, scales and bias."""
        count = self.outputs * self.inputs
        if not self.quantized:
            return count * self.bits // 8, 0, self.outputs * 4
        return len(self.header) + (count * self.bits + 7) // 8, self.outputs * self.blocks * 8, self.outputs * 4

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return sum(self.sizes)

    def external(self, offset: int) -> list[int]:
        """Where the engine finds it, as its operator says so."""
        weights, scales, bias = self.sizes
        return [offset, weights, bias] if self.bits == FLOAT32_BITS else [offset, weights, scales, bias, 0]

    @property
    def parameter(self) -> dict[str, Any] | None:
        """The operator's `quanParameter`."""
        if self.bits == FLOAT32_BITS:
            return None
        if self.bits == FLOAT16_BITS:
            return {"type": 3}
        return {
            "type": 1,
            "quantScale": 1.0,
            "aMaxOrBits": self.bits,
            "aMin": -(1 << (self.bits - 1)),
            "readType": self.outputs * self.blocks,
            "shapeInt32": max(self.outputs, self.inputs) > _SHORT,
        }


class CodePacker:
    """Puts codes uint8 into bytes as they come, whole rows or not; half a byte is carried over."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._rest = np.empty(0, np.uint8)

    def push(self, codes: Bytes) -> Bytes:
        """The bytes that are whole now."""
        if self._bits == 8:
            return codes.reshape(-1)
        flat = codes.reshape(-1)
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


def plain_codes(rows: Quantized, stored: StoredMatrix) -> tuple[Bytes, Floats]:
    """Codes uint8 [rows, inputs] and pairs float32 [rows, blocks, 2]: the value of code 0, and the scale."""
    affine, count, groups = stored.affine, len(rows.codes), rows.codes.shape[1]
    codes = unpack(rows.codes.reshape(count, -1), affine.bits, stored.inputs)
    if rows.zero_points is None:
        raise GlmExportError("the engine's matrices are asymmetric, these rows have no zero points.")
    points = unpack(rows.zero_points, affine.bits, groups)[:, : stored.blocks]  # a channel's is repeated
    scales = rows.scales[:, : stored.blocks]
    return codes, np.stack((scales * -points.astype(np.float32), scales), axis=-1)


def read_matrix(data: bytes, stored: StoredMatrix) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(weights [out, in], bias [out]) of a stored matrix, read slowly and apart from what writes it, for tests.

    Raises GlmExportError where the bytes are no such matrix.
    """
    weights_size, scales_size, bias_size = stored.sizes
    if len(data) != weights_size + scales_size + bias_size:
        raise GlmExportError(f"a stored matrix has {len(data)} bytes, expected {stored.total}.")
    bias = np.frombuffer(data, "<f4", offset=weights_size + scales_size)
    shape = (stored.outputs, stored.inputs)
    if not stored.quantized:
        dtype = "<f4" if stored.bits == FLOAT32_BITS else "<f2"
        return np.frombuffer(data[:weights_size], dtype).astype(np.float32).reshape(shape), bias
    if not data.startswith(stored.header):
        raise GlmExportError("a stored matrix does not begin as one of its size and bits does.")
    packed = data[len(stored.header) : weights_size]
    codes = list(packed) if stored.bits == 8 else [nibble for byte in packed for nibble in (byte >> 4, byte & 15)]
    pairs = np.frombuffer(data, "<f4", stored.outputs * stored.blocks * 2, weights_size).reshape(stored.outputs, -1, 2)
    values = np.array(codes[: stored.outputs * stored.inputs], np.float32)
    grouped = values.reshape(stored.outputs, stored.blocks, -1)
    return (grouped * pairs[:, :, 1:] + pairs[:, :, :1]).reshape(shape), bias


def quantized_parts(stored: StoredMatrix, bands: Iterator[Quantized], bias: Floats) -> Iterator[Bytes]:
    """The bytes of a matrix of integers, of which only the scales are kept while its bands of rows go by."""
    yield np.frombuffer(stored.header, np.uint8)
    packer, pairs = CodePacker(stored.bits), []
    for band in bands:
        codes, ranges = plain_codes(band, stored)
        pairs.append(ranges)
        yield packer.push(codes)
    yield packer.finish()
    yield np.concatenate(pairs).astype("<f4").reshape(-1).view(np.uint8)
    yield bias.astype("<f4").view(np.uint8)
