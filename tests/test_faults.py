"""Disks that fill up, operations that fail, memory that runs out: one sentence, and no harm is done."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from derived_bundles import assert_intact, assert_one_sentence, contents, glmexport, untouched
from faults import (
    AT_MOST,
    DERIVING,
    ON_LINUX,
    Faults,
    assert_goes_on,
    assert_nothing_left,
    assert_stopped,
    journal_of,
    os_error,
    slow,
    split,
    spread,
    stop_after_the_first_graph,
    within,
)

from glmexport.bundle_writer import BundleWriter, HashingFile
from glmexport.direct_file import DirectFile

pytestmark = pytest.mark.usefixtures("without_equivalence")

# Operations that fail


@AT_MOST
@ON_LINUX
@pytest.mark.parametrize(
    ("operation", "number", "words"),
    [
        ("write", errno.ENOSPC, "the disk is full"),
        pytest.param("write", errno.EDQUOT, "the disk quota is used up", marks=pytest.mark.slow),
        ("fsync", errno.EIO, "Input/output error"),
        ("rename", errno.EIO, "Input/output error"),
        ("mkdir", errno.EROFS, "Read-only file system"),
        ("open", errno.EMFILE, "Too many open files"),
    ],
)
def test_any_operation_that_fails_at_any_time(
    small_checkpoint, output, whole, monkeypatch, operation, number, words, at_most
):
    """Every write, sync, rename and the like in turn; finished graphs or nothing is left, and the next run succeeds."""
    faults = Faults(monkeypatch, os, operation, output.parent)
    assert split(small_checkpoint, output).status == 0
    shutil.rmtree(output)
    count, refused = faults.calls, 0
    assert count
    with untouched(small_checkpoint):
        for call in spread(count, at_most):
            faults.at(call, os_error(number))
            result = split(small_checkpoint, output)
            faults.off()
            if result.status == 0:  # directories are synced where that can be done
                assert contents(output) == whole, call
                shutil.rmtree(output)
                continue
            refused += 1
            assert_stopped(result, output, str(output), words)
            assert_goes_on(small_checkpoint, output, whole)
    assert refused


@pytest.mark.parametrize("call", [1, 2, 3, *slow(4, 5)])
def test_the_journal_cannot_be_written(small_checkpoint, output, whole, monkeypatch, call):
    """What is not noted is not finished: with the first line, or the first graph's, there is nothing to keep."""
    with monkeypatch.context() as patch:
        Faults(patch, sys.modules["glmexport.journal"], "_write").at(call, os_error(errno.ENOSPC))
        kept = assert_stopped(split(small_checkpoint, output), output, str(output), "the disk is full")
    assert kept == (call > 2)
    assert_goes_on(small_checkpoint, output, whole)


@AT_MOST
@ON_LINUX
@pytest.mark.parametrize("command", ["embed", *slow("slim", "quantize")])
@pytest.mark.parametrize("operation", ["write", "fsync", "rename", "link", "open"])
def test_any_operation_of_a_pass_that_fails_at_any_time(bundle, output, monkeypatch, command, operation, at_most):
    arguments = (command, bundle, "-o", output, "-q", *DERIVING[command])
    faults = Faults(monkeypatch, os, operation, bundle if operation == "link" else output.parent)
    assert glmexport(*arguments).status == 0
    shutil.rmtree(output)
    with untouched(bundle):
        for call in spread(faults.calls, at_most):
            faults.at(call, os_error(errno.EIO))
            result = glmexport(*arguments)
            faults.off()
            if result.status == 0:
                assert_intact(output)
                shutil.rmtree(output)
            else:
                assert_one_sentence(result, str(output), "Input/output error")
                assert_nothing_left(output)


# Runs that are gone on with


@AT_MOST
@ON_LINUX
@pytest.mark.parametrize(
    ("operation", "number"),
    [
        ("write", errno.ENOSPC),
        ("rename", errno.EIO),
        *(pytest.param(operation, errno.EIO, marks=pytest.mark.slow) for operation in ("fsync", "open")),
    ],
)
def test_a_run_that_is_gone_on_with_may_fail_too(
    small_checkpoint, output, whole, monkeypatch, operation, number, at_most
):
    """What was finished before is never lost, whenever that is, and the run after that goes on with it."""
    partial = stop_after_the_first_graph(small_checkpoint, output, monkeypatch)
    finished = (partial / "embedding.onnx.data").stat().st_ino
    kept = output.parent.parent / "kept"
    kept.mkdir()
    link_all(partial, kept)
    with monkeypatch.context() as patch:
        faults = Faults(patch, os, operation, output.parent)
        assert split(small_checkpoint, output, "--resume").status == 0
        for call in spread(faults.calls, at_most):
            shutil.rmtree(output, ignore_errors=True)
            partial.mkdir(exist_ok=True)
            link_all(kept, partial)
            faults.at(call, os_error(number))
            result = split(small_checkpoint, output, "--resume")
            faults.off()
            if result.status:
                assert_one_sentence(result, str(output))
                assert not output.exists()
                assert journal_of(output).is_file(), call
                assert split(small_checkpoint, output, "--resume").status == 0
            assert contents(output) == whole
            assert (output / "embedding.onnx.data").stat().st_ino == finished, "taken over"


def link_all(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.name.startswith("."):
            shutil.copy2(path, target)
        else:
            os.link(path, target / path.name)


def test_what_belongs_to_another_run_is_refused_and_stays(small_checkpoint, output, monkeypatch):
    partial = stop_after_the_first_graph(small_checkpoint, output, monkeypatch)
    before = contents(partial)
    result = glmexport("split", small_checkpoint, "-o", output, "--opset", "17", "--resume", "-q")
    assert_one_sentence(result, "was begun with something else")
    assert "kept" not in result.stderr
    assert contents(partial) == before


@pytest.mark.parametrize("kind", ["pipe", "directory", "link"])
def test_a_journal_that_is_no_file_is_not_waited_for(small_checkpoint, output, whole, tmp_path, monkeypatch, kind):
    stop_after_the_first_graph(small_checkpoint, output, monkeypatch)
    journal, elsewhere = journal_of(output), tmp_path / "elsewhere"
    journal.rename(elsewhere)
    if kind == "pipe":
        os.mkfifo(journal)
    elif kind == "directory":
        journal.mkdir()
    else:
        journal.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    with within(10):
        result = split(small_checkpoint, output, "--resume")
    if kind == "directory":
        assert_one_sentence(result, str(output))
    else:
        assert result.status == 0, result
        assert contents(output) == whole
    assert elsewhere.read_bytes() == before


def test_a_journal_that_names_files_elsewhere_touches_none(small_checkpoint, output, whole, tmp_path, monkeypatch):
    """Files that do not fit their line are removed, so they must be the bundle's own."""
    from glmexport.journal import _line

    stop_after_the_first_graph(small_checkpoint, output, monkeypatch)
    victim = output.parent / "victim"
    victim.write_bytes(b"precious")
    lines = journal_of(output).read_text().splitlines(keepends=True)
    files = {f"../{victim.name}": [8, "0" * 64], "embedding.onnx": [0, ""]}
    for graph in ("embedding", "../victim"):
        journal_of(output).write_text(lines[0] + _line({"graph": graph, "files": files, "entry": {}}))
        assert split(small_checkpoint, output, "--resume").status == 0
        assert contents(output) == whole
        assert victim.read_bytes() == b"precious"
        output.rename(output.with_name(f".{output.name}.partial"))
        shutil.rmtree(tmp_path / graph.strip("./"), ignore_errors=True)


# Memory


OUT_OF_MEMORY = {
    "python": lambda: MemoryError(),
    "torch": lambda: allocation_error(),
    "system": lambda: os_error(errno.ENOMEM),
}


def allocation_error() -> RuntimeError:
    """What torch raises; its class is that of many other errors."""
    try:
        torch.empty(1 << 50, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("a petabyte of memory")


@pytest.mark.parametrize("kind", ["torch", *slow("python")])
@pytest.mark.parametrize(
    "moment",
    [
        "glmexport.checkpoint_draft.skeleton_for",
        "glmexport.weights.Weights.read",
        "glmexport.onnx_files.ExternalDataWriter.add",
        *slow(
            "glmexport.splitter.check_patch",
            "glmexport.draft_writer.lint_graph",
            "glmexport.weights.Weights.read_rows",
        ),
    ],
)
def test_memory_that_runs_out_at_any_stage(small_checkpoint, output, whole, monkeypatch, moment, kind):
    def out_of_memory(*_: object, **__: object) -> None:
        raise OUT_OF_MEMORY[kind]()

    with untouched(small_checkpoint):
        with monkeypatch.context() as patch:
            patch.setattr(moment, out_of_memory)
            assert_stopped(split(small_checkpoint, output), output, "memory")
        assert_goes_on(small_checkpoint, output, whole)


@pytest.mark.parametrize("kind", ["python", *slow("system")])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_memory_that_runs_out_in_the_thread_that_writes(small_checkpoint, output, whole, monkeypatch, kind, call):
    with monkeypatch.context() as patch:
        Faults(patch, DirectFile, "write").at(call, OUT_OF_MEMORY[kind]())
        with within(20):
            assert_stopped(split(small_checkpoint, output), output, "memory")
    assert_goes_on(small_checkpoint, output, whole)


@pytest.mark.parametrize("call", [1, 3])
def test_memory_that_runs_out_while_many_buffers_wait(tmp_path, monkeypatch, call):
    """More of them than there are to go round: who fills them must not wait for ever."""
    monkeypatch.setattr(HashingFile, "BLOCK_BYTES", 4096)
    Faults(monkeypatch, DirectFile, "write").at(call, MemoryError())

    def write() -> None:
        with BundleWriter(tmp_path / "bundle") as writer, writer.create("data") as file:
            for _ in range(4 * HashingFile.BLOCKS):
                file.write(memoryview(bytes(4096)))

    with within(10), pytest.raises(MemoryError):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["glmexport.quantized.quantize", "glmexport.tensors.read_band"])
def test_memory_that_runs_out_in_a_kernel_or_the_thread_that_reads_ahead(bundle, output, monkeypatch, moment):
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(moment, out_of_memory)
    with untouched(bundle), within(20):
        assert_one_sentence(glmexport("quantize", bundle, "-o", output, "--bits", "4", "-q"), "memory")
    assert_nothing_left(output)


@pytest.mark.parametrize("command", ["generate", "verify"])
@pytest.mark.parametrize("moment", ["open", "run"])
def test_memory_that_runs_out_in_onnxruntime(bundle, checkpoint, monkeypatch, command, moment):
    """It is no verdict on a bundle either."""
    import onnxruntime

    arguments = ("generate", bundle, "12", "-q") if command == "generate" else ("verify", bundle, checkpoint, "-q")
    if command == "verify":
        assert glmexport(*arguments).status == 0, "traced once, as onnxsim needs onnxruntime too"

    def out_of_memory(*_: object, **__: object) -> None:
        raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException("std::bad_alloc")

    if moment == "open":
        monkeypatch.setattr(onnxruntime, "InferenceSession", out_of_memory)
    else:
        monkeypatch.setattr(onnxruntime.InferenceSession, "run", out_of_memory)
    assert_one_sentence(glmexport(*arguments), "There is not enough memory")


# Clocks


@pytest.mark.parametrize("moment", [-(1 << 31), *slow(0, 1, 1 << 33)], ids=["1901", "1970", "a second later", "2242"])
def test_files_of_any_time(small_checkpoint, output, whole, tmp_path, moment):
    """Also a run that is gone on with, and a bundle that seems younger than what is made of it."""
    checkpoint = shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    for path in (checkpoint, *checkpoint.iterdir()):
        os.utime(path, (moment, moment))
    with untouched(checkpoint):
        assert split(checkpoint, output).status == 0
        assert contents(output) == whole
        for path in (output, *output.iterdir()):
            os.utime(path, (moment, moment))
        assert glmexport("verify", output, checkpoint, "--steps", 1, "-q").status == 0
        assert glmexport("inspect", output, "--check", "-q").status == 0
        assert glmexport("embed", output, "-o", output.with_name("embedded"), "-q").status == 0
        assert split(checkpoint, output, "--force").status == 0
        assert contents(output) == whole


def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day goes back by an hour whenever it is asked; clocks that never go back stand still."""
    ticks = itertools.count()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(ticks))
    for name in ("monotonic", "perf_counter", "process_time", "thread_time"):
        monkeypatch.setattr(time, name, lambda: 1000.0)


@pytest.mark.parametrize("stopped", [False, True], ids=["whole", "resumed"])
def test_a_clock_that_stands_still_or_goes_back_does_not_matter(small_checkpoint, output, whole, monkeypatch, stopped):
    if stopped:
        stop_after_the_first_graph(small_checkpoint, output, monkeypatch)
    backwards(monkeypatch)
    assert split(small_checkpoint, output, *(["--resume"] if stopped else [])).status == 0
    assert contents(output) == whole
    result = glmexport("verify", output, small_checkpoint, "--steps", 1)
    assert (result.status, "Traceback" in result.stderr) == (0, False), result.stdout


def test_so_it_is_with_speeds(bundle, monkeypatch):
    backwards(monkeypatch)
    result = glmexport("generate", bundle, "12+34=", "--max-tokens", "3", "--greedy", "--stats")
    assert (result.status, "tokens" in result.stderr) == (0, True), result.stderr
    result = glmexport("generate", bundle, "12+34=", "--max-tokens", "3", "--greedy", "--json")
    assert all(value >= 0 for value in json.loads(result.stdout)["stats"].values() if isinstance(value, int | float))
