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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from glmexport import names
from glmexport.bundle import FileRecord, LinkedFile, files_below, manifest_text, sha256_of
from glmexport.direct_file import DirectFile, page_block
from glmexport.errors import BundleError, GlmExportError
from glmexport.journal import JOURNAL, Finished, Journal

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
_COPY_BYTES = 8 << 20
_Filled: TypeAlias = tuple[NDArray[np.uint8], int]  # a block, and how many of its bytes are to be written
_ADVICE = {
    errno.ENOSPC: ("the disk is full", "free some of it or choose another output"),
    errno.EDQUOT: ("the disk quota is used up", "free some of it or choose another output"),
    errno.EMFILE: (os.strerror(errno.EMFILE), "raise the limit (`ulimit -n`)"),
    errno.ENOMEM: ("there is not enough memory", "close other programs"),
}

KEPT = "The finished graphs are kept; go on with --resume."
"""The note that an error carries where a later run can go on."""


class BundleWriter:
    """Builds a bundle in a hidden directory beside `output`; `commit` makes it appear complete, or it never does.

    Use it as a context manager. Leaving it without `commit` removes what was written, with one exception: where
    `identity` was given and a graph is finished, `.<name>.partial` stays for a later run to go on with (`resume`), and
    the error carries the note KEPT. That holds for whatever a later run may be spared: Ctrl-C, a full disk, a file
    that cannot be read, too little memory. Where what the bundle is made from is found to be wrong, only what an
    earlier run had finished stays. A run that is killed outright leaves the directory too; one without `resume` clears
    it.
    """

    def __init__(
        self,
        output: Path,
        *,
        force: bool = False,
        copy: bool = False,
        identity: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        """copy: what `link` is given, always. identity: all that the bytes follow from, for a run to be resumed.

        Raises BundleError where `output` exists and may not be replaced, another run is writing to it, or what is to
        be resumed was begun with another identity.
        """
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link at the output itself
        check_output(self.output, force=force)
        self.files: dict[str, FileRecord] = {}
        self._force, self._copy = force, copy
        self._partial = _partial_of(self.output)
        self._journal = None if identity is None else Journal(self._partial, identity)
        self._resume = resume
        self.resumed = False
        self._lock: int | None = None
        self._committed = False
        self._made: list[Path] = []
        # syncing takes as long as writing: the next file is made meanwhile
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncs: list[Future[None]] = []
        self._unsynced: list[HashingFile] = []

    def __enter__(self) -> BundleWriter:
        with sentences(self.output):
            try:
                self._occupy()
                check_output(self.output, force=self._force)  # again: another run may just have ended
                self._take_up()
            except BaseException:
                self._leave(kept=self._resume and unfinished(self.output))
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._syncer.shutdown(cancel_futures=True)  # from here on no other graph is finished
        for file in self._unsynced:
            file.close()
        finished = self._journal is not None and bool(self._journal.finished)
        kept = finished and (self.resumed or (error is not None and _may_pass(error)))
        if kept and error is not None:
            error.add_note(KEPT)
        self._leave(kept=kept)

    def _occupy(self) -> None:
        """Make the directory and lock it. Raises BundleError where another run has it, OSError."""
        self._made = [parent for parent in (self._partial, *self._partial.parents) if not parent.exists()]
        while self._lock is None:
            self._partial.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # it is emptied: no link
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # a run that ended between these lines has renamed or removed what was opened, and a third may have
                # made the directory anew
                if _is_at(lock, self._partial):
                    self._lock = lock
            except BlockingIOError as error:
                self._made = []
                raise BundleError(
                    f"Another run is writing to {self.output}; wait for it or choose another output."
                ) from error
            finally:
                if self._lock is None:
                    os.close(lock)

    def _leave(self, *, kept: bool) -> None:
        """Remove what was made, unless it is kept, complete or another run's, and unlock it."""
        if self._lock is not None and not kept and not self._committed:
            _remove(self._partial)
        if not self._committed:
            with suppress(OSError):  # what holds something by now stays
                for made in self._made:
                    if made.exists():
                        made.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def finished(self, graph: str) -> dict[str, Any] | None:
        """The manifest's entry of a graph that an earlier run finished, if its files still have their hashes."""
        journal = self._journal
        done = journal.finished.get(graph) if journal and self.resumed else None
        if journal is None or done is None:
            return None
        with sentences(self.output):
            if any(sha256_of(self._partial / name) != record.sha256 for name, record in done.files.items()):
                for name in done.files:
                    (self._partial / name).unlink()
                del journal.finished[graph]
                return None
        self.files.update(done.files)
        return done.entry

    def finish(self, graph: str, files: Iterable[str], entry: dict[str, Any]) -> None:
        """Note that a graph is finished, once its files are synced."""
        if self._journal is None:
            return
        journal, before = self._journal, tuple(self._syncs)
        done = Finished({name: self.files[name] for name in files}, entry)

        def note() -> None:
            for sync in before:
                sync.result()  # where that failed, nothing behind it counts
            journal.add(graph, done)

        self._syncs.append(self._syncer.submit(note))

    def _take_up(self) -> None:
        """Clear what an earlier run left, but for what it finished, if that is to be gone on with."""
        self.resumed = self._resume and self._journal is not None and self._journal.resume()
        keep: set[str] = set()
        if self._journal is not None and self.resumed:
            keep.add(JOURNAL)  # until another one stands in its place
            for graph, done in list(self._journal.finished.items()):
                if all(_has_size(self._partial / name, record.bytes) for name, record in done.files.items()):
                    keep |= done.files.keys()
                else:
                    del self._journal.finished[graph]
        _empty(self._partial, keep)
        if self._journal is not None:
            self._journal.rewrite()

    @contextmanager
    def create(self, name: str) -> Iterator[HashingFile]:
        """A new file that is hashed as it is written and recorded at the end; `commit` waits until it is synced."""
        with sentences(self.output):
            for sync in self._syncs:
                if sync.done():
                    sync.result()  # not hours later
            file = HashingFile(self._place(name))
            try:
                yield file
                self.files[name] = file.finish()
            except BaseException:
                file.close()
                raise
            self._unsynced.append(file)
            self._syncs.append(self._syncer.submit(file.sync))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        with self.create(name) as file:
            file.write(memoryview(data))

    def link(self, name: str, file: LinkedFile) -> None:
        """Share a file of another bundle, or of this one; where the file system cannot, copy it.

        Raises BundleError where a copy does not have the hash that its bundle's manifest says.
        """
        with sentences(self.output):
            if not self._copy and _linked(file.path, self._place(name)):
                self.files[name] = file.record
                return
        with self.create(name) as sink, file.path.open("rb", buffering=0) as source:
            while data := source.read(_COPY_BYTES):
                sink.write(memoryview(data))
        if self.files[name] != file.record:
            raise BundleError(f"{file.path} was changed while it was copied; start again.")

    def path(self, name: str) -> Path:
        """Where a file lies until the commit."""
        return self._partial / name

    def _place(self, name: str) -> Path:
        """The same, in a folder that there is."""
        path = self._partial / name
        path.parent.mkdir(exist_ok=True)
        return path

    def commit(self, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest (the record of files is added to it) and put the bundle in its place."""
        document = {**manifest, "files": {name: dataclasses.asdict(self.files[name]) for name in sorted(self.files)}}
        with sentences(self.output):
            for sync in self._syncs:
                sync.result()
            with (self._partial / names.MANIFEST).open("w", encoding="utf-8") as file:
                file.write(manifest_text(document))
                file.flush()
                os.fsync(file.fileno())
            check_output(self.output, force=self._force)  # again: hours may have passed
            self._put_in_place()
        return self.output

    def _put_in_place(self) -> None:
        """Rename the complete directory. Raises OSError, and then all is as it was before."""
        replaced = self.output.with_name(f".{self.output.name}.replaced")
        moved = False
        try:
            if self._journal is not None:
                self._journal.remove()
            for folder in {self._partial / Path(name).parent for name in self.files}:
                _sync_directory(folder)
            _sync_directory(self._partial)
            if self.output.exists():
                _remove(replaced)
                self.output.rename(replaced)
                moved = True
            self._partial.rename(self.output)
        except BaseException:
            with suppress(OSError):
                if moved:
                    replaced.rename(self.output)
                if self._journal is not None:
                    self._journal.rewrite()
            raise
        self._committed = True  # whatever happens from here on, the bundle is there
        _sync_directory(self.output.parent)
        _remove(replaced)


def unfinished(output: Path) -> bool:
    """Whether an earlier run to `output` left something to go on with."""
    return (_partial_of(output) / JOURNAL).is_file()


def _may_pass(error: BaseException) -> bool:
    """Whether a later run may be spared what ended this one: nothing that glmexport found wrong with what it reads."""
    found_wrong = isinstance(error, GlmExportError) and not isinstance(error, BundleError)
    return not found_wrong or isinstance(error.__cause__, OSError)


def _partial_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


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
    with sentences(output):
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise BundleError(f"{output} exists and is not a directory; choose another output.")
        if not output.exists():
            return
        if not force:
            raise BundleError(f"{output} exists already; choose another output, or --force to replace a bundle.")
        foreign = sorted({*files_below(output)} - _own_files(output / names.MANIFEST))
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
    """A new file, hashed by one thread and written by another, so that both overlap with whatever makes the bytes.

    Blocks go round: `write` fills a free one, the hashing thread passes it on, the writing thread frees it.
    """

    BLOCK_BYTES = 8 << 20
    BLOCKS = 8

    def __init__(self, path: Path) -> None:
        self._file = DirectFile(path)
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._error: BaseException | None = None
        self._free: queue.SimpleQueue[NDArray[np.uint8] | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[_Filled | None] = queue.SimpleQueue()
        self._hashed: queue.SimpleQueue[_Filled | None] = queue.SimpleQueue()
        for _ in range(self.BLOCKS):
            self._free.put(None)  # made when it is needed, which for most files is one
        self._block: NDArray[np.uint8] | None = None
        self._used = 0
        self._threads = [
            threading.Thread(target=work, name=f"{what} {path.name}", daemon=True)
            for what, work in (("hash", self._hash), ("write", self._write))
        ]
        for thread in self._threads:
            thread.start()

    def write(self, data: memoryview) -> None:
        """Take bytes, which may change afterwards; raises what an earlier write met, an OSError or whatever it was."""
        new, taken = np.frombuffer(data, np.uint8), 0
        while taken < len(new):
            if self._block is None:
                free = self._free.get()
                self._block = page_block(self.BLOCK_BYTES) if free is None else free
            if self._error is not None:
                raise self._error
            count = min(len(new) - taken, self.BLOCK_BYTES - self._used)
            self._block[self._used : self._used + count] = new[taken : taken + count]
            self._used += count
            taken += count
            if self._used == self.BLOCK_BYTES:
                self._hand_over()

    def finish(self) -> FileRecord:
        """Wait for every byte to be written; raises OSError where that failed."""
        self._hand_over()
        self._join()
        self._free = queue.SimpleQueue()  # the blocks' memory, as the file may wait long to be synced
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
        """Stop the threads, if they still run, and close the file."""
        if any(thread.is_alive() for thread in self._threads):
            self._error = self._error or OSError(errno.ECANCELED, "the run was stopped")
            self._join()
        self._file.close()

    def _hand_over(self) -> None:
        if self._block is not None:
            self._filled.put((self._block, self._used))
            self._block, self._used = None, 0

    def _join(self) -> None:
        self._filled.put(None)
        for thread in self._threads:
            thread.join()

    def _hash(self) -> None:
        for block, count in iter(self._filled.get, None):
            self._unless_failed(self._digest.update, block, count)
            self._hashed.put((block, count))
        self._hashed.put(None)

    def _write(self) -> None:
        for block, count in iter(self._hashed.get, None):
            self._unless_failed(self._file.write, block, count)
            self._bytes += count
            self._free.put(block)

    def _unless_failed(self, deed: Callable[[memoryview], object], block: NDArray[np.uint8], count: int) -> None:
        """Blocks go round after a failure too, so that `write` never waits for one in vain."""
        if self._error is None:
            try:
                deed(block[:count].data)
            except BaseException as error:  # raised where the bytes come from; this thread must not end before
                self._error = error


@contextmanager
def sentences(output: Path) -> Iterator[None]:
    """Turn what the file system says into one sentence, a BundleError about the output."""
    try:
        yield
    except OSError as error:
        reason, advice = _ADVICE.get(error.errno or 0, (error.strerror or str(error), "choose another output"))
        raise BundleError(f"{output} could not be written: {reason}; {advice}.") from error


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def _empty(directory: Path, keep: Collection[str] = ()) -> None:
    """Remove what an earlier run left, the manifest first: a directory that lost other files must not look complete."""
    (directory / names.MANIFEST).unlink(missing_ok=True)
    for name in [*files_below(directory)]:
        if name not in keep:
            (directory / name).unlink()
    folder = directory / names.ORT
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _remove(directory: Path) -> None:
    """Remove a directory of ours, if it is there, the manifest first (see `_empty`)."""
    with suppress(OSError):
        (directory / names.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _is_at(handle: int, path: Path) -> bool:
    """Whether what was opened is still what lies there."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # some file systems do not sync directories; the rename is atomic all the same
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
