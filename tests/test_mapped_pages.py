"""Pages of mapped files: dropped where the file holds the same, kept where they were changed."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from glmexport.mapped_pages import drop_mapped_pages, unchanged_ranges

PAGES = 64
SMAPS = """\
7f0000000000-7f0000002000 rw-p 04820000 fe:00 2181486                    /data/a b/glm_block_9.onnx.data
Rss:                   8 kB
Anonymous:             0 kB
AnonHugePages:         0 kB
VmFlags: rd wr mr mw me ac sd
7f0000002000-7f0000003000 rw-p 00000000 fe:00 2181486                    /data/a b/glm_block_9.onnx.data
Rss:                   4 kB
Anonymous:             4 kB
7f0000003000-7f0000004000 r--p 00000000 fe:00 2181487                    /data/other.data
Anonymous:             0 kB
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
Anonymous:             0 kB
7ffc00000000-7ffc00001000 rw-p 00000000 00:00 0                          [stack]
Anonymous:             4 kB
"""


def test_only_what_is_unchanged_of_these_files_is_found():
    found = [*unchanged_ranges(SMAPS, {"/data/a b/glm_block_9.onnx.data"})]
    assert found == [(0x7F0000000000, 0x7F0000002000)]
    assert [*unchanged_ranges(SMAPS, {"", "/data/glm_block_9.onnx.data"})] == [(0x7F0000004000, 0x7F0000005000)]
    assert not [*unchanged_ranges("", {"/data"})]
    assert not [*unchanged_ranges("no list\nAnonymous: 0 kB\n", {"list"})]


def held(path: Path) -> int:
    """Bytes of a mapped file that are in memory."""
    entries = re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text())
    ours = [entry for entry in entries if entry.splitlines()[0].endswith(f" {path}")]
    assert ours, "the file is mapped"
    return sum(int(re.search(r"\nRss: +(\d+) kB", entry)[1]) * 1024 for entry in ours)


@pytest.mark.skipif(sys.platform != "linux", reason="the lists are Linux's")
@pytest.mark.parametrize("change", [False, True])
def test_pages_of_a_file_go_and_come_back(tmp_path, change):
    path = (tmp_path / "weights of a block.data").resolve()
    numbers = np.random.default_rng(0).integers(0, 256, PAGES * mmap.PAGESIZE, np.uint8)
    path.write_bytes(numbers.tobytes())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        assert mapped[:] == numbers.tobytes()
        if change:
            mapped[mmap.PAGESIZE] = numbers[mmap.PAGESIZE] = 255 - numbers[mmap.PAGESIZE]
        assert held(path) == len(numbers)
        drop_mapped_pages([tmp_path / "another file.data"])
        assert held(path) == len(numbers)
        drop_mapped_pages([path])
        assert held(path) == (len(numbers) if change else 0)
        assert mapped[:] == numbers.tobytes()
