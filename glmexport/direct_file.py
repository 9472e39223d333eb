"""Large files past the page cache: new ones written front to back, existing ones read by offset.

Checkpoint and bundle are larger than the page cache of the machines that they are used on. The ordinary way each byte
is copied into the cache, pushes another out of it, and waits there for its turn; measured here, that takes more
processor time than casting the weights, writes at half the disk's speed and reads at a quarter of it. Where the file
system cannot do without the cache (network and memory file systems may not, macOS never), they go through it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CACHED_SHARE = 0.5
"""What together is larger than this share of the memory is read past the page cache, which could not keep it anyway."""

_ALIGNMENT = 4096  # of address, length and offset of a direct write; what file systems ask for is this or less
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_CLOSE_ON_EXEC: int = getattr(os, "O_CLOEXEC", 0)
_DIRECT_READ_BYTES = 1 << 20  # below that a disk takes longer to begin than to read


def beyond_cache(total: int) -> bool:
    """Whether files of so many bytes together are to be read past the page cache."""
    return total > CACHED_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def page_block(size: int) -> NDArray[np.uint8]:
    """New memory of `size` bytes that begins at a page, as reading and writing past the cache ask for.

    numpy has large pages put behind it where there are any; without, touching it first takes longer than filling it.
    """
    whole: NDArray[np.uint8] = np.empty(size + _ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % _ALIGNMENT
    return whole[start : start + size]


class DirectFile:
    """A new file, written front to back in blocks, each of whole pages but the last."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, FileExistsError among them."""
        self._handle = _open(path)

    def write(self, block: memoryview) -> None:
        """Append a block, the beginning of a `page_block`; one of another size than whole pages must be the last.

        Raises OSError.
        """
        whole = len(block) - len(block) % _ALIGNMENT
        with block[:whole] as pages:
            self._write_all(pages)
        if whole < len(block):
            _through_the_cache(self._handle)  # the rest is no whole page
            with block[whole:] as rest:
                self._write_all(rest)

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._handle

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _write_all(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                with data[done:] as rest:
                    done += os.write(self._handle, rest)
            except OSError as error:
                if error.errno != errno.EINVAL or not _is_direct(self._handle):
                    raise
                # a file system that takes the flag and not the write, or a rest that a short write left unaligned
                _through_the_cache(self._handle)


class OffsetFile:
    """An existing file, read by offset by any number of threads at once."""

    def __init__(self, path: Path, direct: bool) -> None:
        """direct: whether to read past the page cache, which pays for large reads of what is not in it.

        Raises OSError.
        """
        self._handle = os.open(path, os.O_RDONLY | _CLOSE_ON_EXEC)
        self._direct = -1
        if direct and _DIRECT:
            with suppress(OSError):  # a file system that cannot
                self._direct = os.open(path, os.O_RDONLY | _CLOSE_ON_EXEC | _DIRECT)

    def size(self) -> int:
        """Bytes of the file now. Raises OSError."""
        return os.fstat(self._handle).st_size

    def read(self, offset: int, count: int) -> NDArray[np.uint8]:
        """The `count` bytes from `offset` on, fewer where the file ends; in memory of their own. Raises OSError."""
        if self._direct >= 0 and count >= _DIRECT_READ_BYTES:
            before = offset % _ALIGNMENT
            pages = page_block(-(-(before + count) // _ALIGNMENT) * _ALIGNMENT)
            with suppress(OSError):  # read errors among them: the other way tells them
                if os.preadv(self._direct, [pages.data], offset - before) >= before + count:
                    return pages[before : before + count]
        found: NDArray[np.uint8] = np.empty(count, np.uint8)
        done = 0
        while done < count and (read := os.preadv(self._handle, [found.data[done:]], offset + done)):  # 2 GiB at most
            done += read
        return found[:done]

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        for handle in (self._handle, self._direct):
            if handle >= 0:
                os.close(handle)
        self._handle = self._direct = -1


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOSE_ON_EXEC
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
