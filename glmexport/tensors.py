"""Tensors about to be written: each says what it will be and gives its bytes slice by slice when asked.

Passes wrap one tensor in another (selected rows, rounded, quantized), so a chain of passes reads and writes each byte
once, and nothing is read before it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from glmexport.onnx_files import FOUR_BITS, Array, ExternalTensor, as_bytes, read_band
from glmexport.vocabulary import VocabularyMap

SLICE_BYTES = 16 << 20
"""Weights are cast, quantized and written in slices of about this many bytes, which stay in the outer cache."""


class Tensor(Protocol):
    """name: of the initializer. dtype: numpy's name, or `int4` / `uint4` (two elements a byte). shape: as stored."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def slices(self) -> Iterator[Array]:
        """Consecutive contiguous bands along the first axis of what is stored; the caller must not change them."""
        ...


class Matrix(Tensor, Protocol):
    """A float tensor of a model; where `transposed`, a matrix stored [in, out] that the checkpoint has [out, in]."""

    @property
    def transposed(self) -> bool: ...

    def bands(self) -> Iterator[Array]:
        """Consecutive float32 bands of rows in the checkpoint's orientation [out, in], of any strides."""
        ...


def rows_per_slice(width: int) -> int:
    """Rows of `width` float32 elements in about SLICE_BYTES."""
    return max(SLICE_BYTES // max(4 * width, 1), 1)


def matrix_shape(matrix: Matrix) -> tuple[int, int]:
    """(outputs, inputs) of a matrix, however it is stored."""
    first, second = matrix.shape
    return (second, first) if matrix.transposed else (first, second)


@dataclass(frozen=True)
class ArrayTensor:
    """A small tensor in memory."""

    name: str
    value: Array

    @property
    def dtype(self) -> str:
        """Of the array."""
        return str(self.value.dtype.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.value.shape

    def slices(self) -> Iterator[Array]:
        """The array."""
        yield self.value


@dataclass(frozen=True)
class FileTensor:
    """A tensor that lies in a file of an existing bundle; read by offset. direct: past the page cache."""

    directory: Path
    place: ExternalTensor
    transposed: bool = False
    direct: bool = False

    @property
    def name(self) -> str:
        """Of the initializer."""
        return self.place.name

    @property
    def dtype(self) -> str:
        """As stored."""
        return self.place.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.place.shape

    def slices(self) -> Iterator[Array]:
        """Bands as they are stored. Raises BundleError where the file is too short."""
        place = as_bytes(self.place) if self.dtype in FOUR_BITS else self.place
        rows = place.shape[0]
        step = max(SLICE_BYTES * rows // max(place.length, 1), 1)
        for start in range(0, rows, step):
            yield read_band(self.directory, place, start, min(start + step, rows), self.direct)

    def bands(self) -> Iterator[Array]:
        """Bands in the checkpoint's orientation; a transposed matrix is read whole. Raises BundleError."""
        if not self.transposed:
            yield from (rows.astype(np.float32, copy=False) for rows in self.slices())
            return
        inputs, outputs = self.shape
        whole = read_band(self.directory, self.place, 0, inputs, self.direct).astype(np.float32, copy=False)
        step = rows_per_slice(inputs)
        for start in range(0, outputs, step):
            yield whole[:, start : start + step].T


@dataclass(frozen=True)
class SelectedRows:
    """The rows of a [vocab, …] tensor that a slimmed vocabulary keeps."""

    tensor: Tensor
    vocabulary: VocabularyMap
    transposed: bool = False  # what has its rows selected is never stored [in, out]

    @property
    def name(self) -> str:
        """As before."""
        return self.tensor.name

    @property
    def dtype(self) -> str:
        """As before."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """With the rows that are kept."""
        return (self.vocabulary.size, *self.tensor.shape[1:])

    def slices(self) -> Iterator[Array]:
        """The kept rows, in order; every row is read, so that checksums of the source can be compared."""
        start = 0
        for band in self.tensor.slices():
            kept = self.vocabulary.select(start, start + len(band), band)
            start += len(band)
            if len(kept):
                yield kept

    def bands(self) -> Iterator[Array]:
        """As `slices`, in float32."""
        return (rows.astype(np.float32, copy=False) for rows in self.slices())
