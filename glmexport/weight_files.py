"""The formats of weight files: which tensors lie where, from headers alone.

Headers are untrusted: every length, shape and offset in them is checked against the size of the file before anything is
allocated.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from glmexport.errors import CheckpointError
from glmexport.untrusted import (
    HEADER_LIMIT,
    damaged,
    file_size,
    parse_json,
    parsing,
    quoted,
    reading,
    refuse_pointer,
    refuse_size,
)

_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MAX_DIMENSIONS = 8
_PICKLE_PROTOCOL = 3  # torch.save's default is 2; torch's weights-only reader does not take 4 and later
_MAX_SHARED_RESULTS = 24  # see _scan_pickle
_LEGACY_TORCH = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # the pickled magic number it begins with
# All that the pickle of a state dict names; torch's own allow-list is wider (it has `bytearray`, which allocates).
_PICKLE_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    *(
        f"torch {kind}Storage"
        for kind in ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")
    ),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    dtype: torch's name of it, such as `float16` or `int8`.
    stride: in elements; None for a contiguous row-major tensor.
    offset: byte in `file` of the tensor's first element.
    nbytes: bytes of its elements, which is what `Weights.read` allocates.
    crc32: of these bytes, where the file says it: a .bin's records have checksums, safetensors files have none.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    offset: int
    nbytes: int
    crc32: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        dtype = getattr(torch, self.dtype)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{self.dtype} is no torch dtype")
        return dtype


def tensors_of(path: Path) -> list[TensorInfo]:
    size = file_size(path)
    with reading(path), path.open("rb") as file:
        head = file.read(64)
        if not head:
            raise CheckpointError(f"{path} is empty; download it again.")
        refuse_pointer(head, str(path))
        if path.name.endswith(".safetensors"):
            return _safetensors(path, file, size)
        if head.startswith(b"PK\x03\x04"):
            return _torch_zip(path, file, size)
    if head.startswith(_LEGACY_TORCH):
        raise CheckpointError(
            f"{path} is in torch's format from before version 1.6, which cannot be read in parts; "
            "load it with torch and save it again with torch.save."
        )
    raise CheckpointError(f"{path} is not a file that torch.save wrote (no zip archive); download it again.")


def _safetensors(path: Path, file: IO[bytes], size: int) -> list[TensorInfo]:
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        damaged(path, f"its {size} bytes are fewer than its header announces")
    refuse_size(path, length, HEADER_LIMIT)
    header = parse_json(file.read(length), f"The header of {path}")
    header.pop("__metadata__", None)
    tensors = [_safetensors_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    end = 8 + length
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:  # the format allows neither holes nor overlaps
            damaged(path, f"the data of {quoted(info.name)} do not begin where the data before them end")
        end += info.nbytes
    if end != size:
        damaged(path, f"it has {size} bytes where its header describes {end}")
    return tensors


def _safetensors_entry(path: Path, name: str, entry: object, base: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        damaged(path, f"the entry of {quoted(name)} is not an object with dtype, shape and data_offsets")
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path} holds {quoted(name)} with dtype {quoted(entry['dtype'])}; expected one of "
            f"{', '.join(_SAFETENSORS_DTYPES)}."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        damaged(path, f"the shape or the offsets of {quoted(name)} are no lists of sizes")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        damaged(path, f"the shape of {quoted(name)} does not fit the number of its bytes")
    return TensorInfo(name, path, _dtype_name(dtype), tuple(shape), None, base + offsets[0], nbytes)


def _torch_zip(path: Path, file: IO[bytes], size: int) -> list[TensorInfo]:
    """Find the tensors of a `torch.save` file through torch's weights-only reader, which is given no data to read.

    torch gets a stand-in archive with the same pickle and empty storages, so that it neither allocates data nor parses
    an untrusted archive; the offset it reports for a storage then says which record of the real archive that is.
    """
    with parsing(path):
        entries = zipfile.ZipFile(_CappedReads(file)).infolist()
    records = {entry.filename: entry for entry in entries}
    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(records) != len(entries) or len(roots) != 1:
        raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote; download it again.")
    root = roots[0]
    if f"{root}/constants.pkl" in records:
        raise CheckpointError(f"{path} is a TorchScript program; expected a state dict saved with torch.save.")

    def record(name: str) -> bytes:
        start, length = _record_span(path, file, size, records[f"{root}/{name}"])
        refuse_size(path, length, HEADER_LIMIT)
        file.seek(start)
        return file.read(length)

    if f"{root}/byteorder" in records and record("byteorder") != b"little":
        raise CheckpointError(f"{path} was saved on a big-endian machine; save it again on a little-endian one.")
    pickled = record("data.pkl")
    _scan_pickle(path, pickled)
    storages = [name.removeprefix(f"{root}/") for name in records if re.fullmatch(r"\d+", name.rpartition("/data/")[2])]
    standin, standin_records = _standin_archive(pickled, storages)
    with parsing(path), FakeTensorMode():
        state = torch.load(standin, weights_only=True)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a state dict from names to tensors.")
    tensors = []
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} holds {quoted(name)} of type {type(value).__name__}; expected a flat dict from names to "
                "tensors: save the model's state_dict() alone."
            )
        with parsing(path):
            key = standin_records[value.untyped_storage()._checkpoint_offset or 0]
        entry = records[f"{root}/{key}"]
        start, length = _record_span(path, file, size, entry)
        info = _torch_entry(path, name, value, start, length)
        if info.stride is None and info.nbytes == length:
            info = replace(info, crc32=entry.CRC or None)  # 0: saved without checksums
        tensors.append(info)
    return tensors


def _torch_entry(path: Path, name: str, tensor: torch.Tensor, start: int, length: int) -> TensorInfo:
    dtype, shape, stride = tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())
    nbytes = math.prod(shape) * dtype.itemsize
    first = int(tensor.storage_offset()) * dtype.itemsize
    # `nbytes > length`: strides of 0 give a tensor any size
    if len(shape) > _MAX_DIMENSIONS or min((*shape, *stride, first)) < 0 or nbytes > length:
        damaged(path, f"the shape of {quoted(name)} does not fit the number of its bytes")
    if first + span(shape, stride) * dtype.itemsize > length:
        damaged(path, f"{quoted(name)} reaches beyond its data")
    kept_stride = None if not nbytes or _row_major(shape, stride) else stride
    return TensorInfo(name, path, _dtype_name(dtype), shape, kept_stride, start + first, nbytes)


def _standin_archive(pickled: bytes, storages: Sequence[str]) -> tuple[io.BytesIO, dict[int, str]]:
    """An archive as torch.save writes it, with empty storages, and which record begins at which of its offsets."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name in storages:
            archive.writestr(f"archive/{name}", b"")
        # 30: the fixed part of a zip entry's own header, before its name
        offsets = {entry.header_offset + 30 + len(entry.filename): entry.filename for entry in archive.infolist()}
    buffer.seek(0)
    return buffer, {offset: name.removeprefix("archive/") for offset, name in offsets.items()}


def _record_span(path: Path, file: IO[bytes], size: int, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Start and length in bytes of a zip record's data in the file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise CheckpointError(
            f"{path} holds the compressed record {quoted(entry.filename)}; torch.save stores records as they are, "
            "so unpack the archive and save the weights again."
        )
    with parsing(path):
        file.seek(entry.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    start = entry.header_offset + 30 + name_length + extra_length
    if signature != b"PK\x03\x04" or start + entry.file_size > size:
        damaged(path, f"the record {quoted(entry.filename)} is not where the archive's directory says")
    return start, entry.file_size


def _scan_pickle(path: Path, data: bytes) -> None:
    """Refuse what no state dict's pickle does, before torch's reader sees it.

    Beyond foreign names that is sharing: a tuple that holds the same tuple twice, 50 levels deep, takes for ever to
    hash or to print. torch.save shares strings, types and, for tied parameters, whole tensors; only these may be
    fetched again, and the last kind only a few times.
    """
    kind = ""
    memo: dict[object, str] = {}
    shared = 0
    with parsing(path):
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "PROTO" and int(argument or 0) > _PICKLE_PROTOCOL:
                raise CheckpointError(
                    f"{path} was saved with pickle protocol {argument}, expected at most {_PICKLE_PROTOCOL}; save it "
                    "again with torch.save and its default protocol."
                )
            if opcode.name == "GLOBAL" and argument not in _PICKLE_GLOBALS:
                raise CheckpointError(
                    f"{path} asks for {quoted('.'.join(str(argument).split(' ')))}, which no plain state dict needs; "
                    "it was not executed. Expected tensors only: save the model's state_dict() alone."
                )
            if opcode.name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = kind
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                source = memo.get(argument, "")
                shared += source == "REDUCE"
                if source not in ("BINUNICODE", "SHORT_BINSTRING", "GLOBAL", "REDUCE") or shared > _MAX_SHARED_RESULTS:
                    damaged(path, "its pickle shares objects as torch.save never does")
            kind = opcode.name


class _CappedReads(io.BufferedIOBase):
    """A file that refuses to be read in large pieces: what the zip reader reads is sized by the untrusted file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._file.read(HEADER_LIMIT + 1 if size is None or size < 0 else min(size, HEADER_LIMIT + 1))
        if len(data) > HEADER_LIMIT:
            raise ValueError("its directory is too large")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a strided tensor, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
