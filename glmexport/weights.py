"""The weights of a checkpoint directory: listed by name, read by byte offset, never more than what is asked for.

Nothing is mapped: the touched pages of a mapped file would count as memory of this process. Headers are untrusted:
every length, shape and offset in them is checked against the size of the file before anything is allocated.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickletools
import re
import stat
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

from glmexport.errors import CheckpointError

WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)  # what a checkpoint can hold, in the order of preference

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

_HEADER_LIMIT = 8 << 20  # bytes of JSON or pickle; a hundred times what a 6B model needs
_MAX_DIMENSIONS = 8
_MAX_SHARED_RESULTS = 24  # see _scan_pickle

_LFS_POINTER = b"version https://git-lfs"
_LEGACY_TORCH = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # the pickled magic number it begins with
_PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}")

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
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        dtype = getattr(torch, self.dtype)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{self.dtype} is no torch dtype")
        return dtype


class Weights:
    """The tensors of one checkpoint by name. Opening reads headers only; reading is thread-safe.

    A context manager: leaving it closes the files; a later read opens them again.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], files: Mapping[Path, int]) -> None:
        """Take tensors as found; `files` gives each file's size in bytes, to notice one that changes under us."""
        self._tensors = dict(tensors)
        self._readers = {path: _OffsetReader(path, size) for path, size in files.items()}

    @classmethod
    def open(cls, directory: Path) -> Weights:
        """List the tensors of the checkpoint in `directory`.

        The first of `WEIGHT_FILES` that exists decides the format. With an index, the index says which shard a name is
        read from. A tensor in a shard that the index does not list is usable under its name all the same: loading
        libraries load whole shards, so it is part of the model, and whoever knows the model reports unknown names.

        Raises CheckpointError: no weight file, a damaged or unsupported file, missing shards, listed tensors that are
        in no shard, one name in two shards.
        """
        for name in WEIGHT_FILES:
            path = directory / name
            if os.path.lexists(path):
                break
        else:
            raise CheckpointError(
                f"{directory} has no weight file: expected one of {', '.join(WEIGHT_FILES)}; download the weights too."
            )
        if not name.endswith(".json"):
            return cls({info.name: info for info in _tensors_of(path)}, {path: _file_size(path)})
        listed = read_index(path)
        shards = [directory / shard for shard in sorted(set(listed.values()))]
        missing = [shard.name for shard in shards if not os.path.lexists(shard)]
        if missing:
            raise CheckpointError(
                f"{path} names {len(missing)} weight file(s) that are not there: {few(missing)}; "
                "download them again, or remove the index if it belongs to other files."
            )
        return cls(_merge(path, listed, shards), {shard: _file_size(shard) for shard in shards})

    @classmethod
    def none(cls) -> Weights:
        """No tensors at all, for callers that need only a checkpoint's config."""
        return cls({}, {})

    @property
    def files(self) -> tuple[Path, ...]:
        """Every weight file."""
        return tuple(self._readers)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together; tensors that share storage count once each."""
        return sum(info.nbytes for info in self._tensors.values())

    def names(self) -> tuple[str, ...]:
        """Every tensor name, in the order of the files."""
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Where `name` lies; CheckpointError if there is no such tensor."""
        if name not in self._tensors:
            raise CheckpointError(f"The checkpoint has no tensor {quoted(name)}.")
        return self._tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor: contiguous, in its stored dtype, in memory of its own. Raises CheckpointError."""
        info = self.info(name)
        return self._read(info, info.shape, info.offset)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) along the first axis, like `read(name)[start:stop]`.

        Reads exactly these bytes of a contiguous tensor, and the bytes they span of a non-contiguous one. Raises
        CheckpointError, and ValueError for rows that the tensor does not have.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"{name} of shape {list(info.shape)} has no rows {start} to {stop}")
        row = info.stride[0] if info.stride is not None else math.prod(info.shape[1:])
        return self._read(info, (stop - start, *info.shape[1:]), info.offset + start * row * info.torch_dtype.itemsize)

    def close(self) -> None:
        """Close every file that reading has opened."""
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read(self, info: TensorInfo, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        dtype = info.torch_dtype
        elements = math.prod(shape) if info.stride is None else _span(shape, info.stride)
        if not elements:
            return torch.empty(shape, dtype=dtype)
        buffer: NDArray[np.uint8] = np.empty(elements * dtype.itemsize, dtype=np.uint8)
        self._readers[info.file].read_into(buffer.data, offset)
        flat = torch.from_numpy(buffer).view(dtype)
        if info.stride is None:
            return flat.reshape(shape)
        # clone: `contiguous()` would keep the whole span alive where a slice happens to be contiguous
        return flat.as_strided(shape, info.stride).clone(memory_format=torch.contiguous_format)


class _OffsetReader:
    """Reads of one file by offset: opened at the first read, one read at a time."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._lock = threading.Lock()
        self._file: io.FileIO | None = None

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on; CheckpointError if they cannot be had."""
        with self._lock, _reading(self._path):
            if self._file is None:
                self._file = io.FileIO(self._path)
            if os.fstat(self._file.fileno()).st_size != self._size:
                raise CheckpointError(f"{self._path} changed its size while it was in use; start again.")
            self._file.seek(offset)
            done = 0
            while done < len(target):  # a single read gives at most 2 GiB
                count = self._file.readinto(target[done:])
                if not count:
                    raise CheckpointError(
                        f"{self._path} ended {len(target) - done} bytes early while it was read; download it again."
                    )
                done += count

    def close(self) -> None:
        """Close the file if it is open."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; CheckpointError if it is anything else."""
    _refuse_size(path, _file_size(path), _HEADER_LIMIT)
    with _reading(path):
        return _parse_json(path.read_bytes(), str(path))


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index file, tensor name -> name of a weight file beside it; CheckpointError if damaged.

    File names are plain names with the suffix that the index's own name announces: nothing outside the directory, and
    nothing that is not a weight file, can be asked for.
    """
    suffix = ".safetensors" if path.name.endswith(".safetensors.index.json") else ".bin"
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} needs a `weight_map` object from tensor names to file names; fetch it again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _PLAIN_FILE_NAME.fullmatch(file) or not file.endswith(suffix):
            raise CheckpointError(
                f"{path} says that {quoted(name)} is in {quoted(file)}; expected the plain name of a {suffix} file "
                "in the same directory."
            )
    return weight_map


def read_small_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes that is no git-lfs pointer; CheckpointError otherwise."""
    _refuse_size(path, _file_size(path), limit)
    with _reading(path):
        data = path.read_bytes()
    _refuse_pointer(data, str(path))
    return data


def quoted(value: object) -> str:
    """An untrusted value, short and printable, for a message."""
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    return repr(value if len(value) <= 120 else value[:117] + "...")


def few(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(quoted(name) for name in names[:limit]) + more


def _merge(index: Path, listed: Mapping[str, str], shards: Sequence[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    twice = []
    for shard in shards:
        for info in _tensors_of(shard):
            if listed.get(info.name, shard.name) != shard.name:
                continue
            if info.name in tensors:
                twice.append(info.name)
            tensors[info.name] = info
    if twice:
        raise CheckpointError(f"Several weight files of {index} hold the same unlisted tensors: {few(twice)}.")
    absent = [f"{name} ({file})" for name, file in listed.items() if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{index} lists {len(absent)} tensor(s) that the named files do not hold: {few(absent, 20)}; "
            "index and weight files are of different downloads, fetch them again."
        )
    return tensors


def _tensors_of(path: Path) -> list[TensorInfo]:
    size = _file_size(path)
    with _reading(path), path.open("rb") as file:
        head = file.read(64)
        if not head:
            raise CheckpointError(f"{path} is empty; download it again.")
        _refuse_pointer(head, str(path))
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
        _damaged(path, f"its {size} bytes are fewer than its header announces")
    _refuse_size(path, length, _HEADER_LIMIT)
    header = _parse_json(file.read(length), f"The header of {path}")
    header.pop("__metadata__", None)
    tensors = [_safetensors_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    end = 8 + length
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:  # the format allows neither holes nor overlaps
            _damaged(path, f"the data of {quoted(info.name)} do not begin where the data before them end")
        end += info.nbytes
    if end != size:
        _damaged(path, f"it has {size} bytes where its header describes {end}")
    return tensors


def _safetensors_entry(path: Path, name: str, entry: object, base: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        _damaged(path, f"the entry of {quoted(name)} is not an object with dtype, shape and data_offsets")
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path} holds {quoted(name)} with dtype {quoted(entry['dtype'])}; expected one of "
            f"{', '.join(_SAFETENSORS_DTYPES)}."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        _damaged(path, f"the shape or the offsets of {quoted(name)} are no lists of sizes")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        _damaged(path, f"the shape of {quoted(name)} does not fit the number of its bytes")
    return TensorInfo(name, path, _dtype_name(dtype), tuple(shape), None, base + offsets[0], nbytes)


def _torch_zip(path: Path, file: IO[bytes], size: int) -> list[TensorInfo]:
    """Find the tensors of a `torch.save` file through torch's weights-only reader, which is given no data to read.

    torch gets a stand-in archive with the same pickle and empty storages, so that it neither allocates data nor parses
    an untrusted archive; the offset it reports for a storage then says which record of the real archive that is.
    """
    with _parsing(path):
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
        _refuse_size(path, length, _HEADER_LIMIT)
        file.seek(start)
        return file.read(length)

    if f"{root}/byteorder" in records and record("byteorder") != b"little":
        raise CheckpointError(f"{path} was saved on a big-endian machine; save it again on a little-endian one.")
    pickled = record("data.pkl")
    _scan_pickle(path, pickled)
    storages = [name.removeprefix(f"{root}/") for name in records if re.fullmatch(r"\d+", name.rpartition("/data/")[2])]
    standin, standin_records = _standin_archive(pickled, storages)
    with _parsing(path), FakeTensorMode():
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
        with _parsing(path):
            key = standin_records[value.untyped_storage()._checkpoint_offset or 0]
        start, length = _record_span(path, file, size, records[f"{root}/{key}"])
        tensors.append(_torch_entry(path, name, value, start, length))
    return tensors


def _torch_entry(path: Path, name: str, tensor: torch.Tensor, start: int, length: int) -> TensorInfo:
    dtype, shape, stride = tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())
    nbytes = math.prod(shape) * dtype.itemsize
    first = int(tensor.storage_offset()) * dtype.itemsize
    # `nbytes > length`: strides of 0 give a tensor any size
    if len(shape) > _MAX_DIMENSIONS or min((*shape, *stride, first)) < 0 or nbytes > length:
        _damaged(path, f"the shape of {quoted(name)} does not fit the number of its bytes")
    if first + _span(shape, stride) * dtype.itemsize > length:
        _damaged(path, f"{quoted(name)} reaches beyond its data")
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
    with _parsing(path):
        file.seek(entry.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    start = entry.header_offset + 30 + name_length + extra_length
    if signature != b"PK\x03\x04" or start + entry.file_size > size:
        _damaged(path, f"the record {quoted(entry.filename)} is not where the archive's directory says")
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
    with _parsing(path):
        for opcode, argument, _ in pickletools.genops(data):
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
                    _damaged(path, "its pickle shares objects as torch.save never does")
            kind = opcode.name


class _CappedReads(io.BufferedIOBase):
    """A file that refuses to be read in large pieces: what the zip reader reads is sized by the untrusted file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._file.read(_HEADER_LIMIT + 1 if size is None or size < 0 else min(size, _HEADER_LIMIT + 1))
        if len(data) > _HEADER_LIMIT:
            raise ValueError("its directory is too large")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _parse_json(data: bytes, origin: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is given twice")
        return result

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    _refuse_pointer(data, origin)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"{origin} is not a JSON object ({reason}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin} holds a {type(value).__name__}; expected a JSON object; download it again.")
    return value


def _file_size(path: Path) -> int:
    with _reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise CheckpointError(f"{path} is not a regular file; expected a file of the checkpoint there.")
    return status.st_size


def _refuse_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise CheckpointError(f"{path} has {size} bytes where at most {limit} are expected; download it again.")


def _refuse_pointer(data: bytes, origin: str) -> None:
    if data.startswith(_LFS_POINTER):
        raise CheckpointError(f"{origin} is a git-lfs pointer instead of the file itself; run `git lfs pull` there.")


def _damaged(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path} is truncated or corrupt: {reason}; download it again.")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); check the path.") from error


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Turn whatever a library raises over untrusted bytes into CheckpointError: on those it can be anything."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"{path} is truncated or corrupt ({reason or type(error).__name__}); download it again."
        ) from error


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
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
