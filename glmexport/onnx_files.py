"""ONNX files with external data: write weights beside a graph, read them back, and stamp them into a skeleton."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from glmexport import names
from glmexport.direct_file import OffsetFile
from glmexport.errors import BundleError

ALIGNMENT = 4096
"""Every tensor starts at a multiple of this many bytes, a page, so that runtimes can map it."""

MAX_GRAPH_BYTES = 64 << 20
"""A thousand times what a graph file has, whose weights lie beside it."""

COMPARE_BYTES = 16 << 20
"""Stored tensors are compared in bands of about this many bytes."""

FOUR_BITS = {"int4": TensorProto.INT4, "uint4": TensorProto.UINT4}
"""Element types that lie two a byte, the first in the low half."""

_STORED = {
    **{number: name for name, number in FOUR_BITS.items()},
    **{
        onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name)): name
        for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
    },
}
"""Data types that external tensors may have, by their number in ONNX."""

Array = npt.NDArray[Any]


class ByteSink(Protocol):
    """What external data is written to."""

    def write(self, data: memoryview) -> None: ...


@dataclass(frozen=True)
class ExternalTensor:
    """Where one initializer lies: a file name beside the graph, offset and length in bytes, dtype, shape.

    dtype: numpy's name, or `int4` / `uint4`, which are stored two elements a byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


class ExternalDataWriter:
    """Writes tensors one after the other, each at an aligned offset, each byte once."""

    def __init__(self, sink: ByteSink, location: str) -> None:
        self._sink = sink
        self._location = location
        self._position = 0
        self.tensors: list[ExternalTensor] = []

    def add(self, name: str, dtype: str, shape: tuple[int, ...], slices: Iterable[Array]) -> None:
        """Append a tensor given as consecutive contiguous slices of its row-major little-endian bytes.

        Raises BundleError where the slices do not add up to `shape`.
        """
        padding = -self._position % ALIGNMENT
        if padding:
            self._write(bytes(padding))
        offset = self._position
        for part in slices:
            self._write(np.ascontiguousarray(part).data.cast("B"))
        length, expected = self._position - offset, stored_bytes(dtype, shape)
        if length != expected:
            raise BundleError(
                f"{name}: {length} bytes of weights were produced, {expected} expected for {list(shape)}."
            )
        self.tensors.append(ExternalTensor(name, dtype, shape, self._location, offset, length))

    def _write(self, data: bytes | memoryview) -> None:
        self._sink.write(memoryview(data))
        self._position += len(data)


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a file; 4-bit elements lie two a byte."""
    count = math.prod(shape)
    return -(-count // 2) if dtype in FOUR_BITS else count * np.dtype(dtype).itemsize


def aligned_size(lengths: Iterable[int]) -> int:
    """Bytes of an external data file that holds tensors of these lengths in this order."""
    position = 0
    for length in lengths:
        position += -position % ALIGNMENT + length
    return position


def external_initializer(tensor: ExternalTensor) -> TensorProto:
    """The initializer that points to `tensor`."""
    proto = TensorProto(name=tensor.name, dims=tensor.shape, data_location=TensorProto.EXTERNAL)
    proto.data_type = FOUR_BITS.get(tensor.dtype) or onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    entries = {"location": tensor.location, "offset": tensor.offset, "length": tensor.length}
    for key, value in entries.items():
        proto.external_data.add(key=key, value=str(value))
    return proto


def stamp(
    skeleton: onnx.ModelProto, graph_name: str, renames: Mapping[str, str], inline: Mapping[str, Array]
) -> onnx.ModelProto:
    """A copy of `skeleton` with its weight slots renamed and its small values filled in.

    renames: slot name -> initializer name, for every slot. inline: small values that are kept in the graph file itself,
    by initializer name; the rest is left to be added as external data.
    """
    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    model.graph.name = graph_name
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name in renames:
                node.input[i] = renames[name]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in inline.items())
    return model


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph at `path` without its external data. Raises BundleError where it is not an ONNX model."""
    try:
        size = path.stat().st_size
        model = onnx.load(path, load_external_data=False) if size <= MAX_GRAPH_BYTES else onnx.ModelProto()
    except OSError as error:
        raise BundleError(f"{path} could not be read ({error.strerror}); copy or split the bundle again.") from error
    except MemoryError:
        raise
    except Exception as error:  # protobuf raises one of several errors of its own, depending on its implementation
        raise BundleError(
            f"{names.shown(path)} is not a readable ONNX model; the file is damaged, split again."
        ) from error
    if size > MAX_GRAPH_BYTES:
        raise BundleError(f"{path} has {size} bytes, expected at most {MAX_GRAPH_BYTES}; split the bundle again.")
    if not model.HasField("graph"):
        raise BundleError(f"{names.shown(path)} holds no ONNX graph; the file is damaged, split again.")
    return model


def external_tensors(model: onnx.ModelProto, where: str) -> list[ExternalTensor]:
    """Every external initializer of `model`. Raises BundleError (naming `where`) for entries that are not numbers."""
    found = []
    for proto in model.graph.initializer:
        if proto.data_location != TensorProto.EXTERNAL:
            continue
        entries = {str(entry.key): str(entry.value) for entry in proto.external_data}  # bytes where it is not UTF-8
        offset, length = entries.get("offset", "0"), entries.get("length", "")
        if not all(number.isascii() and number.isdecimal() and len(number) < 20 for number in (offset, length)):
            raise BundleError(
                f"{where}: the external data of {proto.name} has offset {offset!r} and length {length!r}, "
                f"expected whole numbers; the graph was not written by glmexport, or is damaged."
            )
        dtype, location = _STORED.get(proto.data_type), entries.get("location", "")
        if dtype is None or min(proto.dims, default=0) < 0:
            raise BundleError(
                f"{where}: {proto.name} has the data type {proto.data_type} and the shape "
                f"{list(proto.dims)[:8]}, which no weight has; the graph was not written by glmexport, or is damaged."
            )
        found.append(ExternalTensor(proto.name, dtype, tuple(proto.dims), location, int(offset), int(length)))
    return found


def hidden_data(model: onnx.ModelProto) -> str | None:
    """What a model has beside nodes, initializers and plain attributes, in words: any of it could point to any file."""
    if model.functions or model.training_info or model.graph.sparse_initializer:
        return "functions, training or sparse weights"
    for node in model.graph.node:
        for one in node.attribute:
            if one.HasField("g") or one.graphs or one.tensors or one.HasField("sparse_tensor"):
                return f"{node.op_type} nodes that hold graphs or several tensors"
            if one.t.data_location == TensorProto.EXTERNAL:
                return f"{node.op_type} nodes with external data"
    return None


def as_bytes(tensor: ExternalTensor) -> ExternalTensor:
    """The same place seen as a flat row of bytes: the way to read 4-bit elements."""
    return dataclasses.replace(tensor, dtype="uint8", shape=(tensor.length,))


def read_band(directory: Path, tensor: ExternalTensor, start: int, stop: int, direct: bool = False) -> Array:
    """Rows `start` to `stop` (exclusive, along the first axis) of an external tensor, in memory of their own.

    Read by offset, not mapped: touched pages of a mapped file count as memory of the process. direct: past the page
    cache. Raises BundleError where the file cannot be read or is shorter than the tensor says.
    """
    dtype = np.dtype(tensor.dtype)
    row = int(np.prod(tensor.shape[1:], dtype=np.int64)) * dtype.itemsize
    size = (stop - start) * row
    try:
        with closing(OffsetFile(directory / tensor.location, direct)) as file:
            found = file.read(tensor.offset + start * row, size)
    except OSError as error:
        raise BundleError(f"{tensor.location} could not be read ({error.strerror}); copy the bundle again.") from error
    if len(found) < size:
        raise BundleError(f"{tensor.location} ends inside {tensor.name}; copy or split the bundle again.")
    return found.view(dtype).reshape(stop - start, *tensor.shape[1:])


def rows_of(array: Array) -> Callable[[int, int], Array]:
    """Rows `start` to `stop` of an array in memory, for `holds`."""
    return lambda start, stop: array[start:stop]


def holds(
    directory: Path,
    tensor: ExternalTensor,
    shape: tuple[int, ...],
    rows: Callable[[int, int], Array],
    direct: bool = False,
) -> bool:
    """Whether an external tensor of `shape` equals `rows(start, stop)` bit for bit, band by band.

    It is float32, or float16 of the same numbers. rows: gives float32 rows `start` to `stop` (exclusive). Raises
    BundleError where the file is too short.
    """
    if tensor.shape != shape or tensor.dtype not in ("float32", "float16"):
        return False
    band = max(COMPARE_BYTES // max(tensor.length // shape[0], 1), 1)
    for start in range(0, shape[0], band):
        stop = min(start + band, shape[0])
        expected = np.ascontiguousarray(rows(start, stop))
        found = read_band(directory, tensor, start, stop, direct).astype(np.float32, copy=False)
        if not np.array_equal(found.view(np.uint32), expected.view(np.uint32)):
            return False
    return True
