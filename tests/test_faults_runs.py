"""Runs that meet, runs that are killed, and real file systems that are full or not to be written to."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from derived_bundles import Result, assert_intact, assert_one_sentence, contents, glmexport, untouched
from faults import AT_MOST, DERIVING, slow, split, spread

from glmexport import bundle_writer, draft_writer
from glmexport.bundle_writer import BundleWriter
from glmexport.checkpoint import open_checkpoint
from glmexport.errors import BundleError
from glmexport.splitter import SplitOptions
from glmexport.splitter import split as split_checkpoint

pytestmark = pytest.mark.usefixtures("without_equivalence")

# Runs that meet


def test_two_runs_into_the_same_output(small_checkpoint, bundle, output, whole, monkeypatch):
    """The second, whatever it is to make, is told of the first, which goes on unharmed."""
    ready, go, lint = threading.Event(), threading.Event(), draft_writer.lint_graph

    def waiting(*arguments):
        ready.set()
        assert go.wait(60)
        return lint(*arguments)

    def first() -> None:
        with open_checkpoint(small_checkpoint) as source:
            split_checkpoint(source, output, SplitOptions(14))

    monkeypatch.setattr(draft_writer, "lint_graph", waiting)
    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert ready.wait(60)
        before = {path: path.stat().st_ino for path in output.parent.rglob("*")}
        for options in ((), ("--resume",), ("--force",)):
            assert_one_sentence(split(small_checkpoint, output, *options), "Another run is writing to", str(output))
        for name, options in DERIVING.items():
            result = glmexport(name, bundle, "-o", output, "-q", *options)
            assert_one_sentence(result, "Another run is writing to", str(output))
        assert {path: path.stat().st_ino for path in output.parent.rglob("*")} == before
    finally:
        go.set()
        thread.join()
    assert contents(output) == whole


@pytest.mark.parametrize("ending", ["commit", "failure"])
def test_a_run_that_begins_just_when_another_ends_does_not_touch_a_third(tmp_path, monkeypatch, ending):
    """Between opening the partial directory and locking it, the first run ends and another begins in its place."""
    output = tmp_path / "bundle"
    first = BundleWriter(output).__enter__()
    first.write_bytes("file", b"of the first")
    flock = fcntl.flock
    third: list[BundleWriter] = []

    def late(handle: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        if ending == "commit":
            first.commit({})
            output.rename(tmp_path / "moved away")
        first.__exit__(None, None, None)
        third.append(BundleWriter(output).__enter__())
        third[0].write_bytes("file", b"of the third")
        flock(handle, how)

    monkeypatch.setattr(bundle_writer.fcntl, "flock", late)
    with pytest.raises(BundleError), BundleWriter(output):
        pass
    assert third[0].path("file").read_bytes() == b"of the third"
    third[0].commit({})
    third[0].__exit__(None, None, None)
    assert (output / "file").read_bytes() == b"of the third"


# Killed


KILLED = """
import os, signal, sys
from pathlib import Path
import glmexport.bundle_writer as writer, glmexport.derive, glmexport.passes.quantize_weights
from glmexport.cli.main import run

def child(moment, arguments):
    events = 0
    def counting(owner, name):
        original = getattr(owner, name)
        def counted(*given, **options):
            nonlocal events
            events += 1
            if events == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **options)
        setattr(owner, name, counted)
    for owner, name in (
        (writer.HashingFile, "write"), (writer.HashingFile, "sync"), (os, "fsync"), (os, "link"),
        (Path, "rename"), (Path, "unlink"), (Path, "mkdir"),
    ):
        counting(owner, name)
    sys.argv = ["glmexport", *arguments]
    run()
    return events

for line in sys.stdin:
    moment, *arguments = line.rstrip("\\n").split("\\t")
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        os.write(write, str(child(int(moment), arguments)).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    print(os.read(read, 100).decode() or f"killed by {os.WTERMSIG(status)}", flush=True)
    os.close(read)
"""


@pytest.fixture(scope="module")
def killable() -> Iterator[Callable[..., str]]:
    """Runs commands, each in a process that is killed at its n-th write, sync, link, rename and the like.

    Gives `killed by 9`, or how many of these there were.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )

    def call(moment: int, *arguments: object) -> str:
        process.stdin.write("\t".join(map(str, (moment, *arguments))) + "\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    yield call
    process.communicate()


@AT_MOST
@pytest.mark.parametrize("command", ["embed", *slow("slim", "quantize")])
@pytest.mark.parametrize(
    "replaces", [pytest.param(False, id="new"), pytest.param(True, id="replaced", marks=pytest.mark.slow)]
)
def test_a_pass_that_is_killed_at_any_moment(bundle, output, killable, command, replaces, at_most):
    """The bundle it reads is whole, one that it was to replace is there, and the next run succeeds."""
    arguments = (command, bundle, "-o", output, "-q", "--force", *DERIVING[command])
    events = int(killable(0, *arguments))
    done = contents(output)
    with untouched(bundle):
        for moment in spread(events, at_most):
            if not replaces:
                shutil.rmtree(output, ignore_errors=True)
            assert killable(moment, *arguments) in ("killed by 9", *map(str, range(moment)))
            names = {path.name for path in output.parent.iterdir()}
            if output.exists():
                assert_intact(output)
            assert not replaces or names & {output.name, f".{output.name}.replaced"}, "what was there is gone"
        assert killable(0, *arguments).isdecimal()
        assert contents(output) == done
        assert [path.name for path in output.parent.iterdir()] == [output.name]


# Real disks


MOUNTED = """
import json, os, shutil, subprocess, sys, traceback
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from derived_bundles import Result, contents, glmexport
disk = Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=True)
checkpoint = Path(shutil.copytree(sys.argv[3], disk / "checkpoint"))
place = disk / "place"
place.mkdir()

def run(name, output=place / "bundle", *options):
    try:
        done = glmexport("split", checkpoint, "-o", output, "--opset", "14", "-q", *options)
    except BaseException:
        done = Result(-1, "", traceback.format_exc())
    found = {str(path.relative_to(place)) for path in place.rglob("*")}
    whole = contents(output) == expected if done.status == 0 else None
    print(json.dumps([name, *done, sorted(found), whole]), flush=True)
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.with_name(f".{output.name}.partial"), ignore_errors=True)

expected = {}
glmexport("split", checkpoint, "-o", place / "bundle", "--opset", "14", "-q")
expected = contents(place / "bundle")
shutil.rmtree(place / "bundle")
size = sum(map(len, expected.values()))
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
run("too small from the start")
shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12)  # so it was when the run began
for kilobytes in range(8, size // 1024 + 120, 48):
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", place], check=True)
    run(f"{kilobytes} kB")
subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=6", place], check=True)
run("few inodes")
subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=1000", place], check=True)
run("room", place / "bundle", "--resume")
subprocess.run(["umount", "--lazy", place], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], check=True)
run("read-only")
run("read-only, deeper", place / "deep" / "bundle")
subprocess.run(["umount", place], check=True)
(place / "file").touch()
run("below a file", place / "file" / "bundle")
os.chmod(disk, 0o755)
os.chmod(place, 0o555)
os.setegid(65534)
os.seteuid(65534)
run("not allowed")
os.seteuid(0)
os.chmod(place, 0o777)
(checkpoint / "pytorch_model.bin").chmod(0)
os.seteuid(65534)
run("weights not to be read")
os.seteuid(0)
(checkpoint / "pytorch_model.bin").chmod(0o444)
checkpoint.chmod(0o555)
os.seteuid(65534)
run("allowed")
"""


@pytest.fixture(scope="module")
def mounted(small_checkpoint) -> list[tuple[str, Result, list[str], bool | None]]:
    """(what was wrong with the disk, how split ended, what is there, whether the bundle is whole); see `MOUNTED`.

    In a process with mounts of its own, which are gone when it is.
    """
    disk = Path("/mnt")  # whoever is not root cannot look into pytest's own directories
    if shutil.which("unshare") is None or os.geteuid() != 0 or not disk.is_dir():
        pytest.skip("mounts file systems, which only root may")
    tests = str(Path(__file__).parent)
    command = ["unshare", "--mount", sys.executable, "-c", MOUNTED, tests, str(disk), str(small_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr:
        pytest.skip("mounts file systems, which is not allowed here")
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, done.stdout.splitlines())
    return [(name, Result(status, out, err), found, whole) for name, status, out, err, found, whole in rows]


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_time(mounted):
    """A real one, of every size from one with no room for a file to one with room for the bundle."""
    rows = [row for row in mounted if row[0].endswith("kB")]
    refused = [row for row in rows if row[1].status]
    assert len(refused) > 2
    for name, result, found, _ in refused:
        assert_one_sentence(result, "could not be written: the disk is full; free some of it or choose another output.")
        assert bool(found) == ("go on with: glmexport split" in result.stderr), name
        assert not found or ".bundle.partial/.journal.jsonl" in found
    assert {bool(found) for _, _, found, _ in refused} == {True, False}
    assert len(refused) < len(rows), "with room enough it succeeds"
    assert all(whole for _, result, _, whole in rows if not result.status)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("too small from the start", "MB free and the bundle needs"),
        ("few inodes", "the disk is full"),
        ("read-only", "Read-only file system"),
        ("read-only, deeper", "Read-only file system"),
        ("not allowed", "Permission denied"),
        ("weights not to be read", "pytorch_model.bin cannot be read (Permission denied)"),
        ("below a file", "Not a directory"),
    ],
)
def test_an_output_that_cannot_be_written(mounted, what, words):
    ((result, found, _),) = [row[1:] for row in mounted if row[0] == what]
    assert_one_sentence(result, words)
    assert not [name for name in found if not name.startswith(".bundle.partial")] or found == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["room", "allowed"])
def test_the_next_run_with_a_good_disk_succeeds(mounted, what):
    ((result, _, whole),) = [row[1:] for row in mounted if row[0] == what]
    assert result.status == 0, result
    assert whole
