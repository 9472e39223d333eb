"""Small untrusted files of a checkpoint: read with a limit, parsed strictly, every complaint a CheckpointError."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from glmexport.errors import CheckpointError

HEADER_LIMIT = 8 << 20  # bytes of JSON or pickle; a hundred times what a 6B model needs
_LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; CheckpointError if it is anything else."""
    refuse_size(path, file_size(path), HEADER_LIMIT)
    with reading(path):
        return parse_json(path.read_bytes(), str(path))


def read_small_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes that is no git-lfs pointer; CheckpointError otherwise."""
    refuse_size(path, file_size(path), limit)
    with reading(path):
        data = path.read_bytes()
    refuse_pointer(data, str(path))
    return data


def parse_json(data: bytes, origin: str) -> dict[str, Any]:
    """The JSON object in `data`; CheckpointError, which names `origin`, if it is anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is given twice")
        return result

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    refuse_pointer(data, origin)
    try:
        value = load_json(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"{origin} is not a JSON object ({reason}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin} holds a {type(value).__name__}; expected a JSON object; download it again.")
    return value


def load_json(text: str, **hooks: Any) -> Any:
    """What `json.loads` gives. Raises ValueError and RecursionError, also for halves of characters: UTF-8 has none."""
    value = json.loads(text, **hooks)
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it holds half of a character") from error
    return value


def quoted(value: object) -> str:
    """An untrusted value, short and printable, for a message."""
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    return repr(value if len(value) <= 120 else value[:117] + "...")


def few(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(quoted(name) for name in names[:limit]) + more


def file_size(path: Path) -> int:
    """Bytes of a regular file; CheckpointError if it is none."""
    with reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise CheckpointError(f"{path} is not a regular file; expected a file of the checkpoint there.")
    return status.st_size


def refuse_size(path: Path, size: int, limit: int) -> None:
    """Raise CheckpointError where `size` bytes are more than `limit`."""
    if size > limit:
        raise CheckpointError(f"{path} has {size} bytes where at most {limit} are expected; download it again.")


def refuse_pointer(data: bytes, origin: str) -> None:
    """Raise CheckpointError where `data` begin as a git-lfs pointer does."""
    if data.startswith(_LFS_POINTER):
        raise CheckpointError(f"{origin} is a git-lfs pointer instead of the file itself; run `git lfs pull` there.")


def damaged(path: Path, reason: str) -> NoReturn:
    """Raise the CheckpointError of a truncated or corrupt file."""
    raise CheckpointError(f"{path} is truncated or corrupt: {reason}; download it again.")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the file system says into CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); check the path.") from error


@contextmanager
def parsing(path: Path) -> Iterator[None]:
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
