"""Files that cannot be read, or change while they are: one sentence that names the file, and no harm is done."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from derived_bundles import assert_intact, assert_one_sentence, contents, glmexport, untouched
from faults import (
    AT_MOST,
    ON_LINUX,
    assert_goes_on,
    assert_nothing_left,
    assert_stopped,
    at_moment,
    os_error,
    slow,
    split,
    spread,
    unreadable,
)

from glmexport import direct_file, weights

pytestmark = pytest.mark.usefixtures("without_equivalence")

# Reading


def fails_at(monkeypatch: pytest.MonkeyPatch, call: int) -> Callable[[], int]:
    """Have the n-th read of weights fail; gives how many there were."""
    reads, read = itertools.count(1), os.preadv
    latest = 0

    def reading(*arguments: Any) -> int:
        nonlocal latest
        latest = next(reads)
        if latest == call:
            raise os_error(errno.EIO)
        return read(*arguments)

    monkeypatch.setattr(direct_file.os, "preadv", reading)
    return lambda: latest


@AT_MOST
@pytest.mark.parametrize("fmt", ["bin", "safetensors-sharded", *slow("bin-sharded", "safetensors")])
def test_a_read_error_at_any_tensor(tmp_path, output, monkeypatch, fmt, at_most):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", fmt=fmt, tokenizer=False)
    with monkeypatch.context() as patch:
        count = fails_at(patch, 0)
        assert split(checkpoint, output).status == 0
    whole = contents(output)
    shutil.rmtree(output)
    assert count() > 20
    with untouched(checkpoint):
        for call in spread(count(), at_most):
            with monkeypatch.context() as patch:
                fails_at(patch, call)
                result = split(checkpoint, output)
            assert_stopped(result, output, "cannot be read (Input/output error)", str(checkpoint))
            assert_goes_on(checkpoint, output, whole)


READING_A_BUNDLE = {
    "inspect": ("inspect",),
    "check": ("inspect", "--check", "-q"),
    "tokenize": ("tokenize", "12+34="),
    "generate": ("generate", "12+34=", "--max-tokens", "2", "-q"),
    "slim": ("slim", "-q", "-o"),
    "embed": ("embed", "-q", "-o"),
    "quantize": ("quantize", "--bits", "4", "-q", "-o"),
}


def after(arguments: tuple[object, ...], bundle: Path, output: Path) -> list[object]:
    """A command over a bundle: the bundle after its name, the output at its end."""
    return [arguments[0], bundle, *arguments[1:], *([output] if arguments[-1] == "-o" else [])]


@ON_LINUX
@pytest.mark.parametrize("error", [None, *slow(errno.EACCES)], ids=["read", "open"])
@pytest.mark.parametrize("command", READING_A_BUNDLE)
def test_a_file_of_a_bundle_that_cannot_be_read(bundle, output, monkeypatch, command, error):
    """Each time that one is opened; the sentence, or the report of a check, names a file of the bundle."""
    arguments = after(READING_A_BUNDLE[command], bundle, output)
    with unreadable(monkeypatch, bundle, 0, error) as opened:
        assert glmexport(*arguments).status == 0
    shutil.rmtree(output, ignore_errors=True)
    assert opened
    with untouched(bundle):
        for call in range(1, len(opened) + 1):
            with unreadable(monkeypatch, bundle, call, error) as now:  # graphs are opened by two threads, in any order
                result = glmexport(*arguments)
            path = now[call - 1]
            if command == "check" and result.status == 1:
                assert path.name in result.stdout
            else:
                assert_one_sentence(result, path.name)
            if output.exists():  # made, before its sizes were to be compared with the old one's
                assert (call, path.name) == (len(opened), "manifest.json")
                assert_intact(output)
                shutil.rmtree(output)
            assert_nothing_left(output)


@ON_LINUX
@pytest.mark.parametrize("error", [None, *slow(errno.EACCES)], ids=["read", "open"])
def test_verify_where_a_file_cannot_be_read(bundle, checkpoint, monkeypatch, error):
    arguments = ("verify", bundle, checkpoint, "--steps", 1, "-q")
    with unreadable(monkeypatch, bundle, 0, error) as opened:
        assert glmexport(*arguments).status == 0
    names = [path.name for path in opened]
    first = {name: names.index(name) + 1 for name in names}
    last = {name: len(names) - names[::-1].index(name) for name in names}
    for call in sorted((first if error is None else last).values()):
        with unreadable(monkeypatch, bundle, call, error) as now:
            result = glmexport(*arguments)
        if result.status == 1:
            assert now[call - 1].name in result.stdout
        else:
            assert_one_sentence(result, now[call - 1].name)


@pytest.mark.parametrize("error", [None, *slow(errno.EACCES)], ids=["read", "open"])
@pytest.mark.parametrize("fmt", ["bin", "safetensors-sharded"])
def test_a_file_of_a_checkpoint_that_cannot_be_read(tmp_path, output, monkeypatch, fmt, error):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", fmt=fmt)
    with unreadable(monkeypatch, checkpoint, 0, error) as opened:
        assert split(checkpoint, output).status == 0
    shutil.rmtree(output)
    assert {path.suffix for path in opened} >= {".json", ".model", f".{fmt.partition('-')[0]}"}
    for call, path in enumerate(opened, 1):
        with unreadable(monkeypatch, checkpoint, call, error):
            result = split(checkpoint, output)
        if assert_stopped(result, output, path.name):
            shutil.rmtree(output.with_name(f".{output.name}.partial"))


# Files that change meanwhile


MOMENTS = ("glmexport.splitter.check_patch", "glmexport.splitter.heads_equal", "glmexport.draft_writer.lint_graph")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", ["truncate", "remove", "replace", *slow("grow")])
@pytest.mark.parametrize("fmt", ["bin", *slow("safetensors-sharded")])
def test_a_shard_that_is_cut_or_replaced_while_it_is_read(tmp_path, output, monkeypatch, fmt, change, moment):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", fmt=fmt, tokenizer=False)
    shard = sorted(path for path in checkpoint.iterdir() if path.suffix in (".bin", ".safetensors"))[-1]
    size = shard.stat().st_size

    def happen() -> None:
        if change == "truncate":
            os.truncate(shard, size // 2)
        elif change == "grow":
            os.truncate(shard, size + 1)
        elif change == "remove":
            shard.unlink()
        else:
            other = shard.with_name("other")
            other.write_bytes(bytes(size))
            other.rename(shard)

    at_moment(monkeypatch, moment, happen)
    result = split(checkpoint, output)
    if change != "remove":
        assert_one_sentence(result, shard.name)
        assert_nothing_left(output)  # nobody can go on with what was made of another file
    else:
        assert_stopped(result, output, shard.name)  # it may come back


@pytest.mark.parametrize("moment", MOMENTS[:2])  # at the last one a model as small as this has been read
def test_bytes_of_a_bin_that_change_while_it_is_read_do_not_have_their_checksum(tmp_path, output, monkeypatch, moment):
    """Even where its time stays what it was."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer=False)
    path = checkpoint / "pytorch_model.bin"
    with weights.Weights.open(checkpoint) as opened:
        place = opened.info("transformer.layers.1.mlp.dense_4h_to_h.weight").offset

    def happen() -> None:
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(place + 9)
            byte = file.read(1)
            file.seek(place + 9)
            file.write(bytes((byte[0] ^ 4,)))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    at_moment(monkeypatch, moment, happen)
    assert_one_sentence(split(checkpoint, output), path.name, "checksum", "mlp.dense_4h_to_h.weight")
    assert_nothing_left(output)


@pytest.mark.parametrize("moment", MOMENTS)
def test_bytes_of_a_safetensors_file_that_change_while_it_is_read_change_its_time(
    tmp_path, output, monkeypatch, moment
):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", fmt="safetensors", tokenizer=False)
    path = checkpoint / "model.safetensors"

    def happen() -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")

    at_moment(monkeypatch, moment, happen)
    assert_one_sentence(split(checkpoint, output), path.name, "changed while it was read")
    assert_nothing_left(output)


@pytest.mark.parametrize("name", ["config.json", "ice_text.model"])
def test_small_files_that_change_meanwhile_do_not_matter_they_were_read_before(tmp_path, output, monkeypatch, name):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    assert split(checkpoint, output).status == 0
    before = contents(output)
    shutil.rmtree(output)
    at_moment(monkeypatch, MOMENTS[-1], lambda: (checkpoint / name).write_bytes(b"other"))
    result = split(checkpoint, output)
    if result.status:
        assert_one_sentence(result, name)
        assert_nothing_left(output)
    else:
        assert contents(output) == before
