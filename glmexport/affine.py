"""Affine quantization of a weight matrix: what is stored, in which bytes, and how it is read back.

A matrix [out, in] becomes small unsigned codes `q` with `x ≈ scale * (q - zero_point)`. Consecutive inputs of one
output share a scale: `group_size` of them, or with "channel" all. A symmetric matrix stores no zero points; all are in
the middle, 8 or 128. Two layouts hold the same numbers:

- `matmulnbits`, the inputs of `com.microsoft.MatMulNBits`, row by row of the output;
- `qdq`, the inputs of ONNX `DequantizeLinear` (opset 21) in front of `MatMul`, which wants the matrix transposed.

Both pack two 4-bit codes into a byte, the first in the low nibble. Everything here is numpy; the rounding itself is in
`quantize_kernels`.

Sources: the schemas of MatMulNBits (onnxruntime contrib operators) and DequantizeLinear-21, QuantizeLinear-21 (ONNX).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from glmexport.errors import GlmExportError

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]
_Number = TypeVar("_Number", np.uint8, np.float32)
Layout = Literal["matmulnbits", "qdq"]

BITS = (8, 4)
GROUP_SIZES = (32, 64, 128, "channel")
METHODS = ("rtn", "mse", "hqq")
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
"""Powers of two between these are the block sizes that onnxruntime's MatMulNBits takes."""

STEPS: dict[tuple[int, bool], tuple[float, ...]] = {
    (4, True): (7, 8, 6.5, 6.75, 7.25, 7.5, 7.75, 8.25, 8.5, 8.75, 9, 9.5, 10, 10.5, 11, 12, 13, 14, 16, 19, 23, 28),
    (8, True): (127, 128, *range(118, 127), *range(129, 142), 146, 152, 160, 172, 190, 220),
    (4, False): (15, 14.4, 15.4, 15.8, 16.3, 16.8, 17.4, 18, 19, 20.5, 22.5, 25, 29, 34, 42),
    (8, False): (255, 243, 247, 250, 252.5, 258, 261, 264, 267, 270, 275, 283, 295, 315),
}
"""Bits and symmetry -> the scales that `mse` tries: a group's largest magnitude (asymmetric: its range with 0) is so
many steps. More steps than codes clip the largest weights for a finer step, by which long tails and long groups gain.
Near the first, which is that of `rtn`, little is clipped; what is gained there is how the weights happen to round."""


class Sizes(NamedTuple):
    """Bytes of one stored matrix."""

    codes: int
    scales: int
    zero_points: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class QdqMatrix(NamedTuple):
    """Initializers of `DequantizeLinear`: the raw bytes of codes and zero points, the scales as they are."""

    codes: Bytes
    scales: Floats
    zero_points: Bytes | None


@dataclass(frozen=True)
class Affine:
    """How one matrix is quantized. Raises GlmExportError for a value that no graph of ours can hold."""

    bits: int
    group_size: int | str
    symmetric: bool = True
    method: str = "mse"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("bits", self.bits, BITS),
            ("group size", self.group_size, GROUP_SIZES),
            ("symmetric", self.symmetric, (True, False)),
            ("method", self.method, METHODS),
        ):
            # 8.0 and True are equal to 8 and 1, and would be written into a manifest as they are
            if not any(type(value) is type(one) and value == one for one in known):
                choices = ", ".join(map(str, known))
                raise GlmExportError(f"quantization knows no {name} {value!r}: choose one of {choices}.")

    @property
    def levels(self) -> int:
        """How many codes there are, 16 or 256."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of a symmetric matrix, 8 or 128."""
        return self.levels // 2

    @property
    def steps(self) -> tuple[float, ...]:
        """The scales that the method starts from, as in `STEPS`: one of them but for `mse`."""
        known = STEPS[self.bits, self.symmetric]
        if self.method == "mse":
            return known
        return (self.middle,) if self.method == "hqq" and self.symmetric else known[:1]

    @property
    def per_channel(self) -> bool:
        """Whether all inputs of an output share one scale."""
        return self.group_size == "channel"

    def block_size(self, width: int) -> int:
        """The group size that MatMulNBits is told for `width` inputs: a power of two from 16 to 256.

        A narrow matrix has one group, no larger than it must be. A scale per channel is stored again for every 256
        inputs: the operator takes no larger block, and the repetition costs 3 % of the bytes at 4 bits.
        """
        if width < 1:
            raise GlmExportError(f"a matrix to quantize has {width} inputs; it needs at least 1.")
        whole = max(SMALLEST_BLOCK, 1 << (width - 1).bit_length())
        return min(whole, self.group_size if isinstance(self.group_size, int) else LARGEST_BLOCK)

    def groups(self, width: int) -> int:
        """How many groups a row has in the MatMulNBits layout; the last may be partial."""
        return -(-width // self.block_size(width))

    def sizes(self, out: int, width: int, layout: Layout = "matmulnbits") -> Sizes:
        """Bytes of a matrix [out, width]."""
        groups = self.groups(width)
        if layout == "matmulnbits":
            codes = out * groups * self.block_size(width) * self.bits // 8
            return Sizes(codes, out * groups * 4, 0 if self.symmetric else out * _packed_length(groups, self.bits))
        scales = out * (1 if self.per_channel else groups)
        zero_points = 0 if self.symmetric else _packed_length(scales, self.bits)
        return Sizes(_packed_length(out * width, self.bits), scales * 4, zero_points)

    @property
    def qdq_type(self) -> str:
        """Element type of codes and zero points in the qdq layout, by its ONNX name in lower case.

        Symmetric codes are signed, so that the zero point is 0 and need not be stored. onnxruntime fuses all
        four types into MatMulNBits.
        """
        return f"{'int' if self.symmetric else 'uint'}{self.bits}"

    def qdq_attributes(self, width: int) -> dict[str, int]:
        """The attributes of `DequantizeLinear` for codes [width, out]: blocks of inputs, or an output axis."""
        return {"axis": 1} if self.per_channel else {"axis": 0, "block_size": self.block_size(width)}


@dataclass(frozen=True)
class Fit:
    """Sums over weights w and what they became, v."""

    squared_error: float = 0.0
    squared_weights: float = 0.0
    dot: float = 0.0
    squared_quantized: float = 0.0

    @classmethod
    def of_rows(cls, sums: Doubles) -> Fit:
        """The fit of rows whose sums are float64 [rows, 4] in the order of the fields.

        `fsum` is exact, so that the order of rows, and bands that they came in, are no part of the result.
        """
        return cls(*(math.fsum(column) for column in sums.T))

    @property
    def relative_error(self) -> float:
        """|w - v| / |w|; 0 for a matrix of zeros."""
        return math.sqrt(self.squared_error / self.squared_weights) if self.squared_weights else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between w and v; 1 where one of them is zero."""
        norms = math.sqrt(self.squared_weights) * math.sqrt(self.squared_quantized)
        return self.dot / norms if norms else 1.0


class Quantized(NamedTuple):
    """Rows in the MatMulNBits layout.

    `codes` uint8 [out, groups, block bytes], `scales` float32 [out, groups], `zero_points` packed uint8
    [out, ceil(groups * bits / 8)] or None where symmetric. `sums` float64 [out, 4]: those of `Fit`, row by row.
    """

    codes: Bytes
    scales: Floats
    zero_points: Bytes | None
    sums: Doubles

    @property
    def fit(self) -> Fit:
        """What quantizing did to these rows."""
        return Fit.of_rows(self.sums)


def pack(values: Bytes, bits: int) -> Bytes:
    """Put codes uint8 [..., n] into bytes uint8 [..., ceil(n * bits / 8)].

    At 4 bits the first of two codes is the low nibble, the second the high one; an odd last code has a zero above it.
    At 8 bits the codes are the bytes, and the result is `values` itself.
    """
    if bits == 8:
        return values
    even = values if values.shape[-1] % 2 == 0 else np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    packed: Bytes = np.left_shift(even[..., 1::2], np.uint8(4))
    packed |= even[..., 0::2]
    return packed


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The first `count` codes uint8 [..., count] of bytes uint8 [..., n]; the inverse of `pack`."""
    if bits == 8:
        return packed[..., :count]
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0::2])
    np.right_shift(packed, 4, out=codes[..., 1::2])
    return codes[..., :count]


def dequantize(codes: Bytes, scales: Floats, zero_points: Bytes | None, bits: int, width: int) -> Floats:
    """The weights float32 [..., width] of rows in the MatMulNBits layout.

    `codes` uint8 [..., groups, block bytes], `scales` float32 [..., groups], `zero_points` packed uint8
    [..., ceil(groups * bits / 8)], or None where the matrix is symmetric. Rows stand for themselves, so a whole matrix
    [out, ...] can be read, or just what `codes[ids], scales[ids], zero_points[ids]` gathers. The arithmetic is float32,
    one rounding, as onnxruntime has it. Raises GlmExportError where the shapes do not belong together.
    """
    groups, block_bytes = codes.shape[-2:]
    block = block_bytes * 8 // bits
    fits = scales.shape == codes.shape[:-1] and groups == -(-width // max(block, 1))
    if zero_points is not None:
        fits &= zero_points.shape == (*scales.shape[:-1], _packed_length(groups, bits))
    if not fits:
        found = f"codes {codes.shape}, scales {scales.shape}, zero points {getattr(zero_points, 'shape', None)}"
        raise GlmExportError(f"quantized rows of {width} inputs at {bits} bits do not fit together: {found}.")
    centred = unpack(codes, bits, block).astype(np.float32)
    if zero_points is None:
        centred -= np.float32(1 << (bits - 1))
    else:
        centred -= unpack(zero_points, bits, groups)[..., None]
    centred *= scales[..., None]
    return centred.reshape(*codes.shape[:-2], groups * block)[..., :width]


def to_qdq(codes: Bytes, scales: Floats, zero_points: Bytes | None, spec: Affine, width: int) -> QdqMatrix:
    """Turn a whole matrix from the MatMulNBits layout (shapes as in `dequantize`) into the qdq layout.

    Codes: the matrix transposed, [width, out], row-major; at 4 bits each two neighbours of that flat order share a
    byte, low nibble first, across the ends of rows where `out` is odd. Scales float32 [groups, out], or [out] with one
    per channel; zero points of the same shape, packed like the codes. Raises GlmExportError where `spec` is another.
    """
    groups, block_bytes = codes.shape[-2:]
    block = spec.block_size(width)
    if block_bytes * 8 != block * spec.bits or (zero_points is None) != spec.symmetric:
        raise GlmExportError(f"codes {codes.shape} of {width} inputs were not quantized as {spec}.")
    flat = unpack(codes.reshape(len(codes), groups * block_bytes), spec.bits, width)
    transposed = _transposed(flat).reshape(-1)
    if spec.symmetric:
        # q - middle in two's complement is q with its top bit flipped
        transposed = transposed ^ np.uint8(spec.middle)
    packed = pack(transposed, spec.bits)
    points = None if zero_points is None else unpack(zero_points, spec.bits, groups)
    if spec.per_channel:
        one = None if points is None else pack(np.ascontiguousarray(points[:, 0]), spec.bits)
        return QdqMatrix(packed, np.ascontiguousarray(scales[:, 0]), one)
    point_bytes = None if points is None else pack(np.ascontiguousarray(points.T).reshape(-1), spec.bits)
    return QdqMatrix(packed, np.ascontiguousarray(scales.T), point_bytes)


def dequantize_qdq(matrix: QdqMatrix, spec: Affine, out: int, width: int) -> Floats:
    """The weights float32 [out, width] of a matrix in the qdq layout."""
    codes = unpack(matrix.codes, spec.bits, out * width).reshape(width, out)
    if spec.symmetric:
        centred = (codes ^ np.uint8(spec.middle)).astype(np.float32) - np.float32(spec.middle)
    else:
        centred = codes.astype(np.float32)
    scales = matrix.scales.reshape(-1, out)
    block = width if spec.per_channel else spec.block_size(width)
    if matrix.zero_points is not None:
        points = unpack(matrix.zero_points, spec.bits, scales.size).reshape(scales.shape)
        centred -= np.repeat(points, block, axis=0)[:width]
    centred *= np.repeat(scales, block, axis=0)[:width]
    return _transposed(centred)


def _transposed(matrix: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """A contiguous copy of the transpose. In bands it takes a tenth of the time: numpy's own copy misses the cache."""
    transposed = np.empty(matrix.shape[::-1], matrix.dtype)
    for first in range(0, len(matrix), 16):
        transposed[:, first : first + 16] = matrix[first : first + 16].T
    return transposed


def _packed_length(count: int, bits: int) -> int:
    return (count * bits + 7) // 8
