"""Weights and embeddings written front to back, a band of rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from glmexport.affine import Affine, Bytes, Floats, Quantized
from glmexport.ahead import read_ahead
from glmexport.errors import GlmExportError, RecipeError
from glmexport.mnn_llm.engine_graph import Place, StoredNorm
from glmexport.mnn_llm.stored_weights import FLOAT16_BITS, StoredMatrix, quantized_parts
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
    if place.stored.quantized:
        yield from quantized_parts(place.stored, _quantized(name, place.stored, source, method), bias)
        return
    with closing(read_ahead(source.bands(name))) as bands:
        for band in bands:
            yield _half(name, band) if place.stored.bits == FLOAT16_BITS else as_bytes(band, "<f4")
    yield as_bytes(bias, "<f4")


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


def _quantized(name: str, stored: StoredMatrix, source: Source, method: str) -> Iterator[Quantized]:
    if name in source.integers:
        yield from source.quantized_bands(name)
        return
    affine = Affine(stored.affine.bits, stored.affine.group_size, symmetric=False, method=method)
    with closing(read_ahead(source.bands(name))) as bands:
        for band in bands:
            try:
                yield quantize(band, affine)
            except GlmExportError as error:
                raise GlmExportError(f"{name} cannot be quantized: {error}") from error
