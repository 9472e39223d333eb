"""The bundle as it is written: in a hidden directory beside its place, hashed, synced, renamed; never changed."""

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
from pathlib import Path
from types import TracebackType
from typing import Any

from glmexport import names
from glmexport.bundle import FileRecord, LinkedFile
from glmexport.direct_file import DirectFile
from glmexport.errors import BundleError

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
_COPY_BYTES = 8 << 20


class BundleWriter:
    """Builds a bundle in a hidden directory beside `output`; `commit` makes it appear complete, or it never does.

    Use it as a context manager: leaving it without `commit`, for whatever reason, removes what was written. A run
    killed outright leaves `.<name>.partial`, which is cleared by the next run.
    """

    def __init__(self, output: Path, *, force: bool = False, copy: bool = False) -> None:
        """copy: what `link` is given, always.

        Raises BundleError where `output` exists and may not be replaced, or another run is writing to it.
        """
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link at the output itself
        check_output(self.output, force=force)
        self.files: dict[str, FileRecord] = {}
        self._force, self._copy = force, copy
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

    def link(self, name: str, file: LinkedFile) -> None:
        """Share a file of another bundle; where the file system cannot, copy it.

        Raises BundleError where a copy does not have the hash that its bundle's manifest says.
        """
        with _sentences(self.output):
            if not self._copy and _linked(file.path, self._partial / name):
                self.files[name] = file.record
                return
        with self.create(name) as copy, file.path.open("rb", buffering=0) as source:
            while data := source.read(_COPY_BYTES):
                copy.write(memoryview(data))
        if self.files[name] != file.record:
            raise BundleError(f"{file.path} was changed while it was copied; start again.")

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


def _linked(source: Path, target: Path) -> bool:
    """Make a hard link; False where the file system has none, or not between these places."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


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
        self._file = DirectFile(path)
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
        try:
            if self._error is None:
                self._file.flush()
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
