"""A float32 matrix as the tensors of its quantized form, quantized band by band while they are written."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from glmexport.affine import Affine, Fit, Layout, Quantized, to_qdq
from glmexport.ahead import read_ahead
from glmexport.errors import GlmExportError
from glmexport.onnx_files import Array
from glmexport.quantize_kernels import quantize
from glmexport.quantized_rows import CODES, SCALES, ZERO_POINTS, part_forms, part_name
from glmexport.recipe import policy_record
from glmexport.tensors import Matrix, Tensor, matrix_shape

TURN_BYTES = 16 << 20


@dataclass(frozen=True)
class _Part:
    """One of the tensors; scales and zero points are known when the codes were made, which come first."""

    owner: QuantizedMatrix
    part: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return part_name(self.owner.name, self.part)

    def slices(self) -> Iterator[Array]:
        yield from self.owner.codes() if self.part == CODES else [self.owner.rest(self.part)]


class QuantizedMatrix:
    """A matrix, how to quantize it, and what came of it.

    tensors: codes, scales and, where asymmetric, zero points, in the order in which they must be written. The names end
    in these words; shapes are those of `affine`'s layouts.
    """

    def __init__(self, matrix: Matrix, affine: Affine, layout: Layout) -> None:
        self.name, self.affine, self.layout = matrix.name, affine, layout
        self.outputs, self.inputs = matrix_shape(matrix)
        self._matrix = matrix
        self._rest: Future[dict[str, Array]] = Future()
        self._fit: Fit | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is written."""
        forms = part_forms(self.affine, self.outputs, self.inputs, self.layout)
        return tuple(_Part(self, part, dtype, shape) for part, (dtype, shape) in forms.items())

    def codes(self) -> Iterator[Array]:
        """The codes' bytes, made once. Raises GlmExportError for weights that cannot be quantized."""
        try:
            yield from self._codes()
        except BaseException as error:
            if not self._rest.done():
                self._rest.set_exception(error)
            raise

    def _codes(self) -> Iterator[Array]:
        scales: list[Array] = []
        points: list[Array] = []
        sums: list[Array] = []
        whole: Array | None = None
        start = 0
        for rows in self._quantized():
            sums.append(rows.sums)
            scales.append(rows.scales)
            if rows.zero_points is not None:
                points.append(rows.zero_points)
            if self.layout == "matmulnbits":
                yield rows.codes
                continue
            if whole is None:  # filled in place: the head's, joined from bands, would be in memory twice
                whole = np.empty((self.outputs, *rows.codes.shape[1:]), rows.codes.dtype)
            whole[start : start + len(rows.codes)] = rows.codes
            start += len(rows.codes)
        self._fit = Fit.of_rows(np.concatenate(sums))
        all_points = np.concatenate(points) if points else None
        if whole is None:
            self._keep(np.concatenate(scales), all_points)
        else:
            yield from self._turned(whole, np.concatenate(scales), all_points)

    def rest(self, part: str) -> Array:
        """Scales or zero points; waits for the codes, which another thread may be making. Handed out and forgotten."""
        return self._rest.result().pop(part)

    def measure(self) -> Fit:
        """Quantize without keeping anything, for what it does to the weights."""
        return Fit.of_rows(np.concatenate([rows.sums for rows in self._quantized()]))

    def record(self) -> dict[str, Any]:
        """What the manifest says of the matrix, once it was written."""
        fit = self._fit or Fit()
        return {
            **policy_record(self.affine),
            "bytes": self.affine.sizes(self.outputs, self.inputs, self.layout).total,
            "relative_error": fit.relative_error,
            "cosine": fit.cosine,
        }

    def _quantized(self) -> Iterator[Quantized]:
        for band in read_ahead(self._matrix.bands()):
            try:
                yield quantize(band, self.affine)
            except GlmExportError as error:
                raise GlmExportError(f"{self.name} cannot be quantized: {error}") from error

    def _turned(self, codes: Array, scales: Array, points: Array | None) -> Iterator[Array]:
        """The qdq layout, some groups of inputs at a time: turning it whole would take several copies."""
        groups, block = scales.shape[1], self.affine.block_size(self.inputs)
        step = max(TURN_BYTES // (self.outputs * block), 1) * 2  # even: their zero points end with a byte
        turned_scales: list[Array] = []
        turned_points: list[Array] = []
        for start in range(0, groups, step):
            stop = min(start + step, groups)
            cut = slice(start * self.affine.bits // 8, -(-stop * self.affine.bits // 8))
            part = to_qdq(
                codes[:, start:stop],
                scales[:, start:stop],
                None if points is None else points[:, cut],
                self.affine,
                min(stop * block, self.inputs) - start * block,
            )
            yield part.codes
            turned_scales.append(part.scales)
            if part.zero_points is not None:
                turned_points.append(part.zero_points)
        if self.affine.per_channel:  # the same ones, however many inputs were asked for
            del turned_scales[1:], turned_points[1:]
        self._keep(np.concatenate(turned_scales), np.concatenate(turned_points) if turned_points else None)

    def _keep(self, scales: Array, points: Array | None) -> None:
        self._rest.set_result({SCALES: scales} if points is None else {SCALES: scales, ZERO_POINTS: points})
