"""Pages of mapped files: memory that the system counts for a process, and that the files hold already."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

MAPPED = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ *(.*)")
"""A line of Linux's /proc/…/smaps that begins an entry (proc_pid_smaps(5)): first byte, byte after the last, path;
lines of numbers follow it."""


def drop_mapped_pages(files: Iterable[Path]) -> None:
    """Have the process hold none of what it has mapped of these files; what is read again comes from them once more.

    What is mapped to be changed and was changed stays. Does nothing where the system has no such lists (all but Linux).
    """
    if not sys.platform.startswith("linux"):
        return
    paths = {os.path.realpath(file) for file in files}
    try:
        listed = Path("/proc/self/smaps").read_text("utf-8", "surrogateescape")
    except OSError:
        return
    system = ctypes.CDLL(None)
    for start, end in unchanged_ranges(listed, paths):
        # what fails leaves the pages where they are
        system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_DONTNEED))


def unchanged_ranges(listed: str, paths: set[str]) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of what is mapped of these paths without a page of its own, from smaps."""
    found: tuple[int, int] | None = None
    for line in listed.splitlines():
        entry = MAPPED.fullmatch(line)
        if entry:
            found = (int(entry[1], 16), int(entry[2], 16)) if entry[3] in paths else None
        elif found and line.split() == ["Anonymous:", "0", "kB"]:
            yield found
