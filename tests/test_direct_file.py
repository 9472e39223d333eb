"""Direct files hold the bytes that were written, whatever their sizes and whatever the file system refuses."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glmexport import direct_file
from glmexport.direct_file import DirectFile, OffsetFile, page_block


def write(path, content: bytes, size: int = 8192) -> None:
    block = page_block(size)
    file = DirectFile(path)
    for start in range(0, len(content), size):
        part = content[start : start + size]
        block[: len(part)] = np.frombuffer(part, np.uint8)
        file.write(block[: len(part)].data)
    file.close()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 20480, 50001])
def test_any_size(tmp_path, size):
    content = os.urandom(size)
    write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not direct_file._DIRECT, reason="the system has no direct writes")
def test_a_file_system_that_refuses_the_flag(tmp_path, monkeypatch):
    opened, flags_seen = os.open, []

    def refusing(path, flags, mode=0o777):
        flags_seen.append(flags)
        if flags & direct_file._DIRECT:
            os.close(opened(path, flags & ~direct_file._DIRECT, mode))  # Linux makes the file and then refuses
            raise OSError(errno.EINVAL, "no direct writes here")
        return opened(path, flags, mode)

    monkeypatch.setattr(direct_file.os, "open", refusing)
    write(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert len(flags_seen) == 2


@pytest.mark.skipif(not direct_file._DIRECT, reason="the system has no direct writes")
def test_a_file_system_that_refuses_the_write(tmp_path, monkeypatch):
    written, refused = os.write, []

    def refusing(handle, data):
        if direct_file._is_direct(handle):
            refused.append(len(data))
            raise OSError(errno.EINVAL, "no direct writes here")
        return written(handle, data)

    monkeypatch.setattr(direct_file.os, "write", refusing)
    content = os.urandom(30000)
    write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content
    assert refused == [8192]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    written = os.write
    monkeypatch.setattr(direct_file.os, "write", lambda handle, data: written(handle, data[:4096]))
    content = os.urandom(50001)
    write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_other_errors_are_raised(tmp_path, monkeypatch, code):
    def failing(handle, data):
        raise OSError(code, "failed")

    monkeypatch.setattr(direct_file.os, "write", failing)
    file = DirectFile(tmp_path / "file")
    with pytest.raises(OSError, match="failed"):
        file.write(page_block(4096).data)
    file.close()
    file.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("offset") / "file"
    path.write_bytes(np.random.default_rng(5).bytes(3_000_001))
    return path


@pytest.mark.parametrize("direct", [False, True])
@settings(max_examples=40, deadline=None)
@given(offset=st.integers(0, 3_100_000), count=st.integers(0, 3_200_000))
@example(offset=0, count=3_000_001)
@example(offset=64, count=1 << 20)
@example(offset=4096, count=(1 << 20) + 1)
def test_reading_by_offset(large, direct, offset, count):
    file = OffsetFile(large, direct)
    found = file.read(offset, count)
    assert file.size() == 3_000_001
    file.close()
    file.close()
    assert found.tobytes() == large.read_bytes()[offset : offset + count]
    assert found.flags.writeable


@pytest.mark.skipif(not direct_file._DIRECT, reason="the system has no direct reads")
@pytest.mark.parametrize("refused", ["flag", "read", "short"])
def test_a_file_system_that_refuses_direct_reads(large, monkeypatch, refused):
    opened, read = os.open, os.preadv
    handles = []

    def opening(path, flags, mode=0o777):
        if flags & direct_file._DIRECT:
            if refused == "flag":
                raise OSError(errno.EINVAL, "no direct reads here")
            handles.append(opened(path, flags, mode))
            return handles[-1]
        return opened(path, flags, mode)

    def reading(handle, buffers, offset):
        if handle in handles and refused == "read":
            raise OSError(errno.EINVAL, "no direct reads here")
        if handle in handles:
            return read(handle, [buffers[0][:8192]], offset)
        return read(handle, buffers, offset)

    monkeypatch.setattr(direct_file.os, "open", opening)
    monkeypatch.setattr(direct_file.os, "preadv", reading)
    file = OffsetFile(large, direct=True)
    assert file.read(100, 2 << 20).tobytes() == large.read_bytes()[100 : 100 + (2 << 20)]
    file.close()
