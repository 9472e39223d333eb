"""Writing large new files past the page cache.

A bundle is far larger than the page cache of the machines it is made on. Written the ordinary way, each byte is copied
into the cache, pushes a page of the checkpoint out of it, and waits there for its turn; measured here, that takes more
processor time than casting the weights and writes at half the disk's speed. Where the file system cannot do without the
cache (network and memory file systems may not, macOS never), the same bytes are written through it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path

_ALIGNMENT = 4096  # of address, length and offset of a direct write; what file systems ask for is this or less
_DIRECT: int = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A new file, written front to back: `write` fills a buffer and writes it when full, `flush` writes the rest."""

    BUFFER_BYTES = 8 << 20

    def __init__(self, path: Path) -> None:
        """Raises OSError, FileExistsError among them."""
        self._handle = _open(path)
        self._buffer = mmap.mmap(-1, self.BUFFER_BYTES)  # pages are aligned
        self._filled = 0

    def write(self, data: memoryview) -> int:
        """Take bytes (a flat memoryview) and return how many: all of them. Raises OSError where writing fails."""
        taken = 0
        while taken < len(data):
            count = min(len(data) - taken, self.BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = data[taken : taken + count]
            self._filled += count
            taken += count
            if self._filled == self.BUFFER_BYTES:
                self._write_out(self._filled)
                self._filled = 0
        return taken

    def flush(self) -> None:
        """Write what the buffer still holds; nothing can be written afterwards. Raises OSError."""
        whole = self._filled - self._filled % _ALIGNMENT
        self._write_out(whole)
        _through_the_cache(self._handle)  # the rest is no whole page
        self._write_all(memoryview(self._buffer)[whole : self._filled])
        self._filled = 0

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._handle

    def close(self) -> None:
        """Close the file; what was not flushed is lost. Closing twice is harmless."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            with suppress(BufferError):  # the traceback of a failed write may hold a view of it still
                self._buffer.close()

    def _write_out(self, count: int) -> None:
        self._write_all(memoryview(self._buffer)[:count])

    def _write_all(self, data: memoryview) -> None:
        while data:
            try:
                written = os.write(self._handle, data)
            except OSError as error:
                if error.errno != errno.EINVAL or not _is_direct(self._handle):
                    raise
                # a file system that takes the flag and not the write, or a rest that a short write left unaligned
                _through_the_cache(self._handle)
                continue
            data = data[written:]


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    if _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # refused for the flag, but made all the same
    return os.open(path, flags, 0o666)


def _is_direct(handle: int) -> bool:
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & _DIRECT)


def _through_the_cache(handle: int) -> None:
    if _DIRECT:
        fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~_DIRECT)
