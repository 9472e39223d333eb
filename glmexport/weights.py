"""The weights of a checkpoint directory: listed by name, read by byte offset, never more than what is asked for.

Nothing is mapped: the touched pages of a mapped file would count as memory of this process.
"""

from __future__ import annotations

import math
import os
import re
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from glmexport.direct_file import OffsetFile, beyond_cache
from glmexport.errors import CheckpointError
from glmexport.untrusted import few, file_size, quoted, read_json, reading
from glmexport.weight_files import TensorInfo, span, tensors_of

WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)  # what a checkpoint can hold, in the order of preference
_PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}")


class Weights:
    """The tensors of one checkpoint by name. Opening reads headers only; reading is thread-safe.

    A context manager: leaving it closes the files; a later read opens them again.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], files: Mapping[Path, int]) -> None:
        """Take tensors as found; `files` gives each file's size in bytes, to notice one that changes under us."""
        self._tensors = dict(tensors)
        direct = beyond_cache(sum(files.values()))
        self._readers = {path: _OffsetReader(path, size, direct) for path, size in files.items()}
        self.state_when_opened = self.state()

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
            return cls({info.name: info for info in tensors_of(path)}, {path: file_size(path)})
        listed = read_index(path)
        shards = [directory / shard for shard in sorted(set(listed.values()))]
        missing = [shard.name for shard in shards if not os.path.lexists(shard)]
        if missing:
            raise CheckpointError(
                f"{path} names {len(missing)} weight file(s) that are not there: {few(missing)}; "
                "download them again, or remove the index if it belongs to other files."
            )
        return cls(_merge(path, listed, shards), {shard: file_size(shard) for shard in shards})

    @classmethod
    def none(cls) -> Weights:
        """No tensors at all, for callers that need only a checkpoint's config."""
        return cls({}, {})

    @property
    def files(self) -> tuple[Path, ...]:
        """Every weight file."""
        return tuple(self._readers)

    def state(self) -> dict[str, list[int]]:
        """Size in bytes and time of the last change (ns) of every weight file, by name; to tell whether they changed.

        Raises CheckpointError where one is gone.
        """
        found = {}
        for path in self._readers:
            with reading(path):
                status = path.stat()
            found[path.name] = [status.st_size, status.st_mtime_ns]
        return found

    def changed(self) -> tuple[str, ...]:
        """Names of weight files that are no longer what they were when they were opened. Raises as `state`."""
        return tuple(name for name, state in self.state().items() if self.state_when_opened.get(name) != state)

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
        tensor = self._read(info, info.shape, info.offset)
        if info.crc32 is not None:
            _check_sum(info, zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data))
        return tensor

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

    def read_bands(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        """The whole tensor in consecutive bands of at most `rows` rows.

        Raises CheckpointError, after the last band where the bytes do not have the checksum that the file gives.
        """
        info = self.info(name)
        crc = 0
        for start in range(0, info.shape[0], rows):
            band = self.read_rows(name, start, min(start + rows, info.shape[0]))
            if info.crc32 is not None:
                crc = zlib.crc32(band.view(torch.uint8).numpy().data, crc)
            yield band
        _check_sum(info, crc)

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
        elements = math.prod(shape) if info.stride is None else span(shape, info.stride)
        if not elements:
            return torch.empty(shape, dtype=dtype)
        buffer = self._readers[info.file].read(offset, elements * dtype.itemsize)
        flat = torch.from_numpy(buffer).view(dtype)
        if info.stride is None:
            return flat.reshape(shape)
        return flat.as_strided(shape, info.stride).contiguous()


def _check_sum(info: TensorInfo, found: int) -> None:
    if info.crc32 is not None and found != info.crc32:
        raise CheckpointError(
            f"{info.file} is corrupt: the bytes of {quoted(info.name)} do not have the checksum that the file gives; "
            f"download it again."
        )


class _OffsetReader:
    """Reads of one file by offset: opened at the first read, by any number of threads at once."""

    def __init__(self, path: Path, size: int, direct: bool) -> None:
        """direct: whether to read past the page cache."""
        self._path = path
        self._size = size
        self._direct = direct
        self._lock = threading.Lock()
        self._file: OffsetFile | None = None

    def read(self, offset: int, count: int) -> NDArray[np.uint8]:
        """The `count` bytes from `offset` on, in memory of their own; CheckpointError if they cannot be had."""
        with reading(self._path):
            with self._lock:
                self._file = file = self._file or OffsetFile(self._path, self._direct)
            if file.size() != self._size:
                raise CheckpointError(f"{self._path} changed its size while it was in use; start again.")
            found = file.read(offset, count)
        if len(found) < count:
            raise CheckpointError(
                f"{self._path} ended {count - len(found)} bytes early while it was read; download it again."
            )
        return found

    def close(self) -> None:
        """Close the file if it is open."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


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


def _merge(index: Path, listed: Mapping[str, str], shards: Sequence[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    twice = []
    for shard in shards:
        for info in tensors_of(shard):
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
