"""The matrices of a bundle on their way into MNN: what each becomes there, and its weights in bands of rows.

Integers of a quantized bundle go over as they are, with their scales: nothing is rounded a second time. MNN's blocks
are equal and multiples of 16 inputs, so a group goes over as one block or as several with the same scale. Where there
are zero points, z becomes the lowest value, -z * scale in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from glmexport.affine import Floats
from glmexport.bundle import Bundle
from glmexport.convert.plain_graph import PlainGraph, Product
from glmexport.errors import ExportError
from glmexport.mnn.matrix import FLOAT16, Integers, MnnMatrix
from glmexport.mnn.rounding import BLOCK_STEP, block_that_holds, quantized
from glmexport.quantized_rows import QuantizedRows
from glmexport.tensors import FileTensor, Matrix, rows_per_slice

CHANNEL = 0
"""The block that stands for all inputs of an output."""


@dataclass(frozen=True)
class FloatSource:
    """A float matrix of a bundle or checkpoint. stored: what it becomes."""

    tensor: Matrix
    stored: MnnMatrix

    def bands(self) -> Iterator[Floats]:
        """Float32 rows in their order."""
        for rows in self.tensor.bands():
            yield np.ascontiguousarray(rows, np.float32)

    def integers(self) -> Iterator[Integers]:
        """What is stored of them, where that is integers. Raises ExportError for weights that are no numbers."""
        for rows in self.bands():
            try:
                yield quantized(rows, self.stored)
            except ExportError as error:
                raise ExportError(f"{self.tensor.name} cannot be stored: {error}") from error


@dataclass(frozen=True)
class QuantizedSource:
    """A quantized matrix of a bundle. stored: the form that holds its integers."""

    rows: QuantizedRows
    stored: MnnMatrix

    def bands(self) -> Iterator[Floats]:
        """Float32 rows in their order."""
        for ids in self._ids():
            yield self.rows.rows(ids)
            self.rows.let_go()

    def integers(self) -> Iterator[Integers]:
        """What is stored of them: the bundle's own integers and scales."""
        stored, affine = self.stored, self.rows.affine
        group = affine.block_size(stored.inputs)
        of_block = np.arange(stored.blocks) * stored.block // group
        for ids in self._ids():
            codes, scales, points = self.rows.integers(ids)
            block_scales = scales[:, of_block]
            if stored.symmetric:
                parameters = block_scales[..., None]
            else:
                zero = np.float32(affine.middle) if points is None else points[:, of_block].astype(np.float32)
                parameters = np.stack([-zero * block_scales, block_scales], -1)
            yield Integers(codes, np.ascontiguousarray(parameters))
            self.rows.let_go()

    def _ids(self) -> Iterator[npt.NDArray[np.int64]]:
        step = rows_per_slice(self.stored.inputs)
        for start in range(0, self.stored.outputs, step):
            yield np.arange(start, min(start + step, self.stored.outputs))


Source = FloatSource | QuantizedSource


def float_source(bundle: Bundle, graph: str, plain: PlainGraph, product: Product, bits: int, block: int) -> FloatSource:
    """A float matrix of the bundle. bits: to store it with. block: inputs that share a scale, or CHANNEL."""
    transposed = product.matrix in set(bundle.graph(graph)["transposed"])
    tensor = FileTensor(bundle.directory, plain.places[product.matrix], transposed)
    return FloatSource(tensor, float_form(product, bits, block))


def float_form(product: Product, bits: int, block: int) -> MnnMatrix:
    """What a float matrix becomes."""
    size = (product.inputs if block == CHANNEL else block) if bits < FLOAT16 else 0
    return MnnMatrix(product.outputs, product.inputs, bits, size)


def quantized_source(bundle: Bundle, graph: str, plain: PlainGraph, product: Product) -> QuantizedSource:
    """A quantized matrix of the bundle. Raises ExportError where no equal blocks of MNN's hold its groups."""
    record = bundle.graph(graph)["matrices"][product.matrix]
    layout = bundle.form.quantization.format if bundle.form.quantization else ""
    shape = (product.outputs, product.inputs)
    rows = QuantizedRows(bundle.directory, plain.places, product.matrix, record, shape, layout)
    affine = rows.affine
    block = block_that_holds(affine, product.inputs)
    if block is None:
        raise ExportError(
            f"{product.matrix} has groups of {affine.block_size(product.inputs)} of its {product.inputs} inputs, which "
            f"MNN's equal blocks of a multiple of {BLOCK_STEP} cannot hold without rounding again; give "
            "--checkpoint to round the checkpoint's weights instead, or convert the float32 bundle with --bits."
        )
    return QuantizedSource(rows, MnnMatrix(product.outputs, product.inputs, affine.bits, block, affine.symmetric))
