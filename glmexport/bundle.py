"""The bundle: a directory with `manifest.json`, written beside its place and renamed, never changed afterwards."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, get_type_hints

from glmexport import names
from glmexport.config import ModelConfig, SpecialIds
from glmexport.errors import BundleError
from glmexport.interface import ARGMAX_MODES

SCHEMA = 1
MAX_COUNT = 1 << 62
MAX_MANIFEST_BYTES = 16 << 20
MAX_NAME = 200
HASH_CHUNK = 1 << 22

DataT = TypeVar("DataT")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and the parsed manifest.

    graphs: one entry a graph, in the order in which data flows (see README, "The manifest").
    files: every file but the manifest itself.
    """

    directory: Path
    manifest: Mapping[str, Any]
    config: ModelConfig
    graphs: tuple[Mapping[str, Any], ...]
    files: Mapping[str, FileRecord]

    @property
    def opset(self) -> int:
        """Opset of every graph."""
        return int(self.manifest["opset"])

    @property
    def argmax(self) -> str:
        """What the LM head gives: `none` (logits), `also` or `only`."""
        return str(self.manifest["argmax"])

    def path(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.directory / name


def looks_like_bundle(directory: Path) -> bool:
    """Whether a directory holds a manifest of ours."""
    return (directory / names.MANIFEST).is_file()


def open_bundle(directory: Path) -> Bundle:
    """Read and check the manifest. Raises BundleError where it is absent, damaged, or names files outside."""
    path = directory / names.MANIFEST
    if not directory.is_dir() or not path.is_file():
        raise BundleError(f"{directory} is not a bundle (no {names.MANIFEST}); make one with `glmexport split`.")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_MANIFEST_BYTES}.")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["schema"] != SCHEMA:
            raise BundleError(
                f"{path} has schema {manifest['schema']!r:.80}, expected {SCHEMA}; it was written by another version "
                f"of glmexport ({manifest.get('glmexport')!r:.80}): use that version or split again."
            )
        config, graphs, files = _parts_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{path} is not a manifest that glmexport wrote ({type(error).__name__}: {error}); copy or split again."
        ) from error
    except OSError as error:
        raise BundleError(f"{path} could not be read: {error.strerror}.") from error
    for name in files:
        plain = Path(name).name == name and name.isprintable() and 0 < len(name) < MAX_NAME
        if not plain or name in (".", "..", names.MANIFEST):
            raise BundleError(f"{path} lists the file {name!r:.80}, expected plain names of files beside the manifest.")
    unlisted = sorted({graph[key] for graph in graphs for key in ("file", "data")} - set(files))
    if unlisted:
        raise BundleError(f"{path} has graphs in files that it does not list: {', '.join(unlisted)}; split again.")
    # the number is compared first: a damaged one could ask for a list of any length
    if len(graphs) != config.num_blocks + 2 or not all(map(_is_graph, graphs, names.graph_names(config.num_blocks))):
        raise BundleError(
            f"{path} lists {len(graphs)} graphs, expected {names.EMBEDDING}, {config.num_blocks} blocks and "
            f"{names.HEAD} in this order, each with files of its name; split again."
        )
    return Bundle(directory, manifest, config, graphs, files)


def _parts_of(manifest: Any) -> tuple[ModelConfig, tuple[dict[str, Any], ...], dict[str, FileRecord]]:
    """Config, graphs and files, each value of the type that it must have. Raises ValueError, KeyError or TypeError."""
    _demand(manifest, architecture=str, opset=int, argmax=str, tied=bool, model=dict, graphs=list, files=dict)
    model = manifest["model"]
    config = _typed(ModelConfig, {**model, "special_ids": _typed(SpecialIds, model["special_ids"])})
    if manifest["argmax"] not in ARGMAX_MODES:
        raise ValueError(f"argmax is {manifest['argmax']!r:.80}, expected one of {', '.join(ARGMAX_MODES)}")
    if min(config.vocab_size, config.hidden_size, config.num_blocks, config.num_heads, config.inner_size) < 1:
        raise ValueError("a size of the model is not positive")
    for graph in manifest["graphs"]:
        _demand(graph, name=str, kind=str, file=str, data=str, weights=str, parameters=int, inputs=list, outputs=list)
        _demand(graph, transposed=list)
        if not all(isinstance(name, str) for name in graph["transposed"]):
            raise TypeError("transposed holds something else than names")
        if not 0 <= graph["parameters"] < MAX_COUNT or not graph["weights"].isprintable():
            raise ValueError(f"{graph['name']!r:.80} has parameters or weights that no graph has")
        for tensor in (*graph["inputs"], *graph["outputs"]):
            _demand(tensor, name=str, dtype=str, shape=list)
    for entry in manifest["files"].values():
        _demand(entry, bytes=int, sha256=str)
        if not 0 <= entry["bytes"] < MAX_COUNT:
            raise ValueError("a file has a size that no file has")
    if not manifest["architecture"].isprintable() or not 0 < config.layernorm_epsilon < 1:
        raise ValueError("the architecture or the layernorm epsilon is none")
    files = {name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    return config, tuple(manifest["graphs"]), files


def _is_graph(entry: Mapping[str, Any], name: str) -> bool:
    return (entry["name"], entry["file"], entry["data"]) == (name, names.graph_file(name), names.data_file(name))


def _demand(entry: Any, **kinds: type) -> None:
    for key, kind in kinds.items():
        if type(entry[key]) is not kind:
            raise TypeError(f"{key} is {entry[key]!r:.80}, expected {kind.__name__}")


def _typed(kind: type[DataT], values: dict[str, Any]) -> DataT:
    """A dataclass from JSON values; each must be of exactly the type of its field."""
    _demand(values, **get_type_hints(kind))
    return kind(**values)


def check_files(bundle: Bundle) -> Iterator[tuple[str, str | None]]:
    """Compare every file with the manifest; yields (name, complaint or None) as each is done, surplus files last."""
    for name, record in bundle.files.items():
        path = bundle.path(name)
        if path.is_symlink() or not path.is_file():
            yield name, f"{name} is {'a link' if path.is_symlink() else 'missing'}."
        elif path.stat().st_size != record.bytes:
            yield name, f"{name} has {path.stat().st_size} bytes, the manifest says {record.bytes}."
        elif sha256_of(path) != record.sha256:
            yield name, f"{name} was changed: its SHA-256 is not the manifest's."
        else:
            yield name, None
    surplus = sorted(entry.name for entry in bundle.directory.iterdir())
    for name in surplus:
        if name not in bundle.files and name != names.MANIFEST:
            yield name, f"{name} is not in the manifest."


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file, read in slices. Raises BundleError where reading fails."""
    digest = hashlib.sha256()
    buffer = bytearray(HASH_CHUNK)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    except OSError as error:
        raise BundleError(f"{path} could not be read: {error.strerror}.") from error
    return digest.hexdigest()


class BundleWriter:
    """Builds a bundle in a hidden directory beside `output`; `commit` makes it appear complete, or it never does.

    Use it as a context manager: leaving it without `commit`, for whatever reason, removes what was written. A run
    killed outright leaves `.<name>.partial`, which is cleared by the next run.
    """

    def __init__(self, output: Path, *, force: bool = False) -> None:
        """Raises BundleError where `output` exists and may not be replaced, or another run is writing to it."""
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link at the output itself
        check_output(self.output, force=force)
        self.files: dict[str, FileRecord] = {}
        self._force = force
        self._partial = self.output.with_name(f".{self.output.name}.partial")
        self._lock: int | None = None
        self._committed = False
        self._made: list[Path] = []
        # syncing takes as long as writing: the next file is made meanwhile
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncs: list[Future[None]] = []

    def __enter__(self) -> BundleWriter:
        with _sentences(self.output):
            self._made = [parent for parent in self.output.parents if not parent.exists()]
            self._partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._partial, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(self._lock)
                raise BundleError(
                    f"Another run is writing to {self.output}; wait for it or choose another output."
                ) from error
            _empty(self._partial)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._syncer.shutdown(cancel_futures=True)
        if not self._committed:  # afterwards a directory of that name is another run's
            _remove(self._partial)
            with suppress(OSError):  # a parent may hold something else by now
                for parent in self._made:
                    parent.rmdir()
        if self._lock is not None:
            os.close(self._lock)

    @contextmanager
    def create(self, name: str) -> Iterator[HashingFile]:
        """A new file that is hashed as it is written and recorded at the end; `commit` waits until it is synced."""
        with _sentences(self.output):
            file = HashingFile(self._partial / name)
            try:
                yield file
                self.files[name] = file.finish()
            except BaseException:
                file.close()
                raise
            self._syncs.append(self._syncer.submit(file.sync))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        with self.create(name) as file:
            file.write(memoryview(data))

    def path(self, name: str) -> Path:
        """Where a file lies until the commit."""
        return self._partial / name

    def commit(self, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest (the record of files is added to it) and put the bundle in its place."""
        document = {**manifest, "files": {name: dataclasses.asdict(self.files[name]) for name in sorted(self.files)}}
        with _sentences(self.output):
            for sync in self._syncs:
                sync.result()
            with (self._partial / names.MANIFEST).open("w", encoding="utf-8") as file:
                json.dump(document, file, ensure_ascii=False, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            _sync_directory(self._partial)
            check_output(self.output, force=self._force)  # again: hours may have passed
            replaced = self.output.with_name(f".{self.output.name}.replaced")
            if self.output.exists():
                _remove(replaced)
                self.output.rename(replaced)
            try:
                self._partial.rename(self.output)
            except OSError:
                if replaced.exists():
                    replaced.rename(self.output)
                raise
            self._committed = True
            _sync_directory(self.output.parent)
            _remove(replaced)
        return self.output


def check_output(output: Path, *, force: bool) -> None:
    """Raise BundleError unless a bundle may be put there: nothing exists, or with `force` a bundle or empty folder."""
    with _sentences(output):
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise BundleError(f"{output} exists and is not a directory; choose another output.")
        if not output.exists():
            return
        if not force:
            raise BundleError(f"{output} exists already; choose another output, or --force to replace a bundle.")
        foreign = sorted({entry.name for entry in output.iterdir()} - _own_files(output / names.MANIFEST))
        if foreign:
            raise BundleError(
                f"{output} is neither empty nor a bundle alone, it holds {', '.join(foreign[:3]):.80}; --force does "
                f"not replace it: move that away or choose another output."
            )


def _own_files(manifest: Path) -> set[str]:
    """Names of the files that are a bundle's by its manifest, whatever version of glmexport wrote it."""
    try:
        document = json.loads(manifest.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    if not (isinstance(document, dict) and {"glmexport", "schema"} <= document.keys()):
        return set()
    files = document.get("files")
    return {*files, names.MANIFEST} if isinstance(files, dict) else {names.MANIFEST}


class HashingFile:
    """A new file written and hashed by a thread of its own, so that both overlap with whatever makes the bytes.

    `write` hands over a buffer that must not change afterwards; at most `DEPTH` buffers wait.
    """

    DEPTH = 4

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._queue: queue.Queue[memoryview | None] = queue.Queue(self.DEPTH)
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name=f"write {path.name}", daemon=True)
        self._thread.start()

    def write(self, data: memoryview) -> None:
        """Queue bytes; raises the OSError that an earlier write met."""
        self._queue.put(data.cast("B"))
        if self._error is not None:
            raise self._error

    def finish(self) -> FileRecord:
        """Wait for every byte to be written; raises OSError where that failed."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return FileRecord(self._bytes, self._digest.hexdigest())

    def sync(self) -> None:
        """Have the system put every byte on the disk, and close the file; raises OSError where that failed."""
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def close(self) -> None:
        """Stop the thread, if it still runs, and close the file."""
        if self._thread.is_alive():
            self._error = self._error or OSError(errno.ECANCELED, "the run was stopped")
            self._queue.put(None)
            self._thread.join()
        self._file.close()

    def _work(self) -> None:
        while (data := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keep emptying the queue, so that the other side never waits for a place in it
            try:
                self._digest.update(data)
                while data:
                    written = self._file.write(data)
                    self._bytes += written
                    data = data[written:]
            except OSError as error:
                self._error = error


@contextmanager
def _sentences(output: Path) -> Iterator[None]:
    """Turn what the file system says into one sentence."""
    try:
        yield
    except OSError as error:
        reason = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}.get(
            error.errno or 0, error.strerror or str(error)
        )
        raise BundleError(f"{output} could not be written: {reason}; nothing was left there.") from error


def _empty(directory: Path) -> None:
    """Remove what an earlier run left, the manifest first: a directory that lost other files must not look complete."""
    (directory / names.MANIFEST).unlink(missing_ok=True)
    for stale in directory.iterdir():
        stale.unlink()


def _remove(directory: Path) -> None:
    """Remove a directory of ours, if it is there, the manifest first (see `_empty`)."""
    with suppress(OSError):
        (directory / names.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems do not sync directories; the rename is atomic all the same
            os.fsync(handle)
    finally:
        os.close(handle)
