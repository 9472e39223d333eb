"""Weights and embeddings written front to back, a band of rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from glmexport.affine import GROUP_SIZES, Affine, Bytes, Floats, Quantized, unpack
from glmexport.ahead import read_ahead
from glmexport.errors import GlmExportError, RecipeError
from glmexport.mnn.matrix import FLOAT16, Integers, MnnMatrix, integer_parts
from glmexport.mnn_llm.engine_graph import Place, StoredNorm
from glmexport.quantize_kernels import quantize
from glmexport.raw_rows import decode_rows, encode_rows

WEIGHT, BIAS = ".weight", ".bias"


class Source(Protocol):
    """Tensors by the checkpoint's names; see `source.PackageSource`."""

    @property
    def integers(self) -> Any: ...
    def vector(self, name: str) -> Floats: ...
    def bands(self, name: str) -> Iterator[Floats]: ...
    def quantized_bands(self, name: str) -> Iterator[Quantized]: ...


def place_bytes(place: Place, source: Source, method: str) -> Iterator[Bytes]:
    """What stands at a place of the weight file, in pieces.

    method: how to round where the source is not quantized already. Raises RecipeError for weights that float16 cannot
    hold, GlmExportError for those that no scale can, and what reading raises.
    """
    rows = place.stored.width if isinstance(place.stored, StoredNorm) else place.stored.outputs
    bias = source.vector(place.name + BIAS) if place.has_bias else np.zeros(rows, np.float32)
    name = place.name + WEIGHT
    if isinstance(place.stored, StoredNorm):
        yield as_bytes(source.vector(name), "<f4")
        yield as_bytes(bias, "<f4")
        return
    if place.stored.is_integers:
        bands = _quantized(name, place.stored, source, method)
        yield from integer_parts(place.stored, (as_mnn_has_them(band, place.stored) for band in bands), bias)
        return
    with closing(read_ahead(source.bands(name))) as floats:
        for part in floats:
            yield _half(name, part) if place.stored.bits == FLOAT16 else as_bytes(part, "<f4")
    yield as_bytes(bias, "<f4")


def as_mnn_has_them(rows: Quantized, matrix: MnnMatrix) -> Integers:
    """Rows in the layout of MatMulNBits as MNN stores them: a block has the scale and zero point of its group."""
    group, bits = rows.codes.shape[2] * 8 // matrix.bits, matrix.bits
    codes = unpack(rows.codes.reshape(len(rows.codes), -1), bits, matrix.inputs)
    of_block = np.arange(matrix.blocks) * matrix.block // group
    scales = rows.scales[:, of_block]
    if rows.zero_points is None:
        points = np.full_like(scales, 1 << (bits - 1))
    else:
        points = unpack(rows.zero_points, bits, rows.codes.shape[1])[:, of_block].astype(np.float32)
    return Integers(codes, np.stack((scales * -points, scales), axis=-1))


def sixteen_bits(band: Floats, dtype: str) -> tuple[Bytes, bool]:
    """(rows as float16 or bfloat16, whether they are the same numbers)."""
    stored = encode_rows(band, dtype)
    return as_bytes(stored, stored.dtype.newbyteorder("<").str), bool((decode_rows(stored, dtype) == band).all())


def as_bytes(array: npt.NDArray[Any], dtype: str) -> Bytes:
    """The array's elements, one after the other."""
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)


def _half(name: str, band: Floats) -> Bytes:
    part, exact = sixteen_bits(band, "float16")
    if not exact:
        raise RecipeError(
            f"{name} holds weights that float16 cannot: give --bits 32 for the same numbers, or --bits 8 or 4."
        )
    return part


def _quantized(name: str, matrix: MnnMatrix, source: Source, method: str) -> Iterator[Quantized]:
    if name in source.integers:
        yield from source.quantized_bands(name)
        return
    group_size = matrix.block if matrix.block in GROUP_SIZES else "channel"
    affine = Affine(matrix.bits, group_size, symmetric=False, method=method)
    with closing(read_ahead(source.bands(name))) as bands:
        for band in bands:
            try:
                yield quantize(band, affine)
            except GlmExportError as error:
                raise GlmExportError(f"{name} cannot be quantized: {error}") from error
