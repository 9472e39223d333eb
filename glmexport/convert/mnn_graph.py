"""One graph of a bundle -> one `.mnn` model with its weights beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from glmexport.convert.mnn_sources import Source
from glmexport.convert.plain_graph import PlainGraph, Product, stand_in_bias
from glmexport.errors import ExportError
from glmexport.mnn.converter import run_converter
from glmexport.mnn.file import Convolution, MnnFile, read_mnn, with_matrices, with_sizes, with_uuid
from glmexport.mnn.matrix import FLOAT32, MnnMatrix, integer_parts
from glmexport.onnx_files import Array, ByteSink

CONVERT = ("-f", "ONNX", "--bizCode", "glm", "--saveExternalData")
"""No `--transformerFuse`, which makes `presents` unreadable; nothing about bits: the products are written here."""


@dataclass(frozen=True)
class Laid:
    """Where a matrix lies beside the model. product: of the graph; stored: its form."""

    product: Product
    stored: MnnMatrix
    offset: int


@dataclass(frozen=True)
class Converted:
    """What the converter made of the stand-ins. rest: bytes beside the model that are no product's, and kept: where."""

    file: MnnFile
    rest: bytes
    kept: tuple[int, ...]
    numbers: Mapping[str, int]


def convert_stand_ins(plain: PlainGraph, scratch: Path, log: Path) -> Converted:
    """Have the converter make a model of the graph with stand-ins.

    scratch: a directory for files of no use afterwards. log: takes what the converter prints. Raises ExportError where
    anything about the result is not as it must be.
    """
    source, model, beside = (scratch / f"{plain.model.graph.name}.{end}" for end in ("onnx", "mnn", "mnn.weight"))
    onnx.save(plain.with_stand_ins(), source)
    options = [*CONVERT, "--modelFile", str(source.resolve()), "--MNNModel", "{model.mnn}"]
    run_converter(options, {"model.mnn": model, "model.mnn.weight": beside}, log)
    try:
        weights = beside.read_bytes()
        file = read_mnn(model.read_bytes(), len(weights))
        numbers = _numbers(file, plain.products, weights)
        file = with_sizes(file, {product.stand_in: product.outputs for product in plain.products})
    except ExportError as error:
        raise ExportError(f"{plain.model.graph.name}: {error} What the converter printed is in {log}.") from error
    finally:
        for path in (source, model, beside):
            path.unlink(missing_ok=True)
    rest, kept = b"", []
    for stored in file.kept:
        kept.append(len(rest))
        rest += weights[stored.offset : stored.offset + stored.length]
    return Converted(file, rest, tuple(kept), numbers)


def _numbers(file: MnnFile, products: tuple[Product, ...], weights: bytes) -> dict[str, int]:
    """Matrix -> number of the operator that multiplies with what stood for it."""
    wanted = {(product.stand_in, product.inputs): product for product in products}
    found = {(one.outputs, one.inputs): one for one in file.convolutions}
    if wanted.keys() != found.keys() or len(file.convolutions) != len(products):
        sizes = sorted((one.outputs, one.inputs) for one in file.convolutions)
        raise ExportError(f"the converter made products of {sizes} where {sorted(wanted)} were expected.")
    return {product.matrix: _checked(found[size], product, weights).number for size, product in wanted.items()}


def _checked(convolution: Convolution, product: Product, weights: bytes) -> Convolution:
    start, length = convolution.bias
    expected = stand_in_bias(product) if product.bias is not None else np.zeros(product.stand_in, np.float32)
    if weights[start : start + length] != expected.tobytes():
        raise ExportError(f"the converter did not put the bias of {product.matrix} into its product.")
    return convolution


def write_weights(
    converted: Converted,
    plain: PlainGraph,
    sources: Mapping[str, Source],
    sink: ByteSink,
    advance: Callable[[int], None],
) -> tuple[Laid, ...]:
    """Write the file beside the model. sources: of every product's matrix. advance: takes bytes as they are written.

    One band of rows is in memory at a time, and the scales of one matrix. Raises ExportError for weights that the form
    cannot hold.
    """
    sink.write(memoryview(converted.rest))
    position, laid = len(converted.rest), []
    for product in plain.products:
        source = sources[product.matrix]
        stored = source.stored
        laid.append(Laid(product, stored, position))
        bias = np.zeros(product.outputs, np.float32) if product.bias is None else plain.vectors[product.bias]
        if stored.is_integers:
            parts = integer_parts(stored, source.integers(), bias)
        else:
            parts = _float_parts(source, product, bias)
        for part in parts:
            sink.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            advance(part.nbytes)
        position += stored.total_bytes
    return tuple(laid)


def _float_parts(source: Source, product: Product, bias: Array) -> Iterator[Array]:
    for rows in source.bands():
        yield _as_floats(rows, source.stored, product)
    yield np.ascontiguousarray(bias, np.float32)


def _as_floats(rows: Array, stored: MnnMatrix, product: Product) -> Array:
    if stored.bits == FLOAT32:
        return rows
    with np.errstate(over="ignore"):  # infinities that were numbers are found below
        half = rows.astype(np.float16)
    if not np.array_equal(np.isfinite(half), np.isfinite(rows)):
        raise ExportError(f"{product.matrix} has weights beyond what float16 holds; give --bits none, 8 or 4.")
    return half


def model_bytes(converted: Converted, laid: tuple[Laid, ...], digest: str) -> bytes:
    """The model itself. digest: of the file beside it, from which, and from the model, its uuid follows."""
    matrices = {converted.numbers[one.product.matrix]: one.stored for one in laid}
    offsets = {converted.numbers[one.product.matrix]: one.offset for one in laid}
    return with_uuid(with_matrices(converted.file, matrices, offsets, converted.kept), digest.encode())
