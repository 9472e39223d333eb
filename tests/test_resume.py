"""A split that is killed anywhere and gone on with ends in the bytes of one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from glmexport import journal
from glmexport.bundle import check_files, open_bundle
from glmexport.checkpoint import open_checkpoint
from glmexport.errors import BundleError, CheckpointError
from glmexport.form import RAW, EmbeddingForm
from glmexport.journal import JOURNAL
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.splitter import SplitOptions, split

KILLED = """
import os, signal, sys
from pathlib import Path
import glmexport.journal, glmexport.bundle_writer as writer
import torch
torch.set_num_threads(1)
from glmexport.checkpoint import open_checkpoint
from glmexport.form import RAW, EmbeddingForm
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.splitter import SplitOptions, split
checkpoint, output = map(Path, sys.argv[1:3])
passes = (EmbedPass(EmbeddingForm(RAW, "bfloat16")),)

def run(moment, resume):
    events = 0
    def counting(owner, name):
        original = getattr(owner, name)
        def counted(*arguments, **options):
            nonlocal events
            events += 1
            if events == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        setattr(owner, name, counted)
    for owner, name in (
        (writer.HashingFile, "write"), (writer.HashingFile, "sync"), (glmexport.journal.Journal, "add"),
        (os, "fsync"), (Path, "rename"), (Path, "unlink"),
    ):
        counting(owner, name)
    with open_checkpoint(checkpoint) as source:
        split(source, output, SplitOptions(14, passes=passes), resume=resume)
    return events

for line in sys.stdin:
    moment, resume = map(int, line.split())
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, str(run(moment, bool(resume))).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    print(os.read(read, 100).decode() if status == 0 else f"killed by {os.WTERMSIG(status)}", flush=True)
    os.close(read)
"""


@pytest.fixture(scope="module")
def reference(small_checkpoint, tmp_path_factory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("reference") / "bundle"
    run(small_checkpoint, path)
    return hashes(path)


def run(checkpoint: Path, output: Path, *, opset: int = 14, dtype: str = "float32", **options) -> list[str]:
    notices: list[str] = []
    passes = (EmbedPass(EmbeddingForm(RAW, "bfloat16")),)
    with open_checkpoint(checkpoint) as source:
        split(source, output, SplitOptions(opset, passes=passes, dtype=dtype), notice=notices.append, **options)
    return [notice for notice in notices if "unfinished" in notice]


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


class Runs:
    """Runs of one split, each in a process of its own that ends at a certain write, sync, rename or the like."""

    def __init__(self, checkpoint: Path, output: Path) -> None:
        command = [sys.executable, "-c", KILLED, str(checkpoint), str(output)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, moment: int, *, resume: bool = False) -> str:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{moment} {int(resume)}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def runs(small_checkpoint, tmp_path):
    made = Runs(small_checkpoint, tmp_path / "bundle")
    yield made
    made.close()


@pytest.mark.parametrize(("seed", "times"), [(0, 2), pytest.param(1, 30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(runs, tmp_path, reference, seed, times):
    output = tmp_path / "bundle"
    moments = random.Random(seed)
    events = int(runs(0))
    assert hashes(output) == reference
    taken_over = 0
    for _ in range(times):
        shutil.rmtree(output)
        resume = False
        while not output.exists():  # killed again and again, but later each time, so that it ends
            moment = moments.randint(1, events)
            assert runs(moment, resume=resume) in ("killed by 9", *map(str, range(moment)))
            noted = tmp_path / ".bundle.partial" / JOURNAL
            taken_over += noted.exists() and len(noted.read_text().splitlines()) > 1
            resume = True
        assert hashes(output) == reference
        shutil.rmtree(tmp_path / ".bundle.partial", ignore_errors=True)
        shutil.rmtree(tmp_path / ".bundle.replaced", ignore_errors=True)
    assert taken_over, "no run was killed after it had finished a graph"


@pytest.fixture(scope="module")
def killed(small_checkpoint, tmp_path_factory) -> Path:
    """The partial directory of a run that was killed when it was nearly done."""
    place = tmp_path_factory.mktemp("killed")
    made = Runs(small_checkpoint, place / "bundle")
    events = int(made(0))
    shutil.rmtree(place / "bundle")
    assert made(events - 8) == "killed by 9"
    made.close()
    partial = place / ".bundle.partial"
    assert len((partial / JOURNAL).read_text().splitlines()) > 3
    return partial


@pytest.fixture
def begun(killed, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(killed, tmp_path / ".bundle.partial")


def test_finished_graphs_are_not_written_again(begun, small_checkpoint, tmp_path, reference):
    before = {path.name: path.stat().st_ino for path in begun.iterdir()}
    assert run(small_checkpoint, tmp_path / "bundle", resume=True) == []
    assert hashes(tmp_path / "bundle") == reference
    assert (tmp_path / "bundle" / "glm_block_0.onnx.data").stat().st_ino == before["glm_block_0.onnx.data"]


def test_a_finished_graph_that_was_changed_is_written_again(begun, small_checkpoint, tmp_path, reference):
    data = bytearray((begun / "glm_block_0.onnx.data").read_bytes())
    data[100] ^= 1
    (begun / "glm_block_0.onnx.data").write_bytes(data)
    (begun / "glm_block_1.onnx").write_bytes(b"")
    run(small_checkpoint, tmp_path / "bundle", resume=True)
    assert hashes(tmp_path / "bundle") == reference


@pytest.mark.parametrize("damage", ["", "{", "\x00\n", '["a"]\n{}\n'])
def test_a_damaged_journal_is_none(begun, small_checkpoint, tmp_path, reference, damage):
    (begun / JOURNAL).write_text(damage)
    (notice,) = run(small_checkpoint, tmp_path / "bundle", resume=True)
    assert "begun anew" in notice
    assert hashes(tmp_path / "bundle") == reference


def test_a_journal_of_something_else_is_refused(begun, small_checkpoint, tmp_path):
    (begun / JOURNAL).write_text(journal._line({"identity": 3}))
    with pytest.raises(BundleError, match="was begun with something else"):
        run(small_checkpoint, tmp_path / "bundle", resume=True)


def test_lines_that_were_cut_off_do_not_count(begun, small_checkpoint, tmp_path, reference):
    lines = (begun / JOURNAL).read_text().splitlines()
    (begun / JOURNAL).write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])
    run(small_checkpoint, tmp_path / "bundle", resume=True)
    assert hashes(tmp_path / "bundle") == reference


def test_other_options_are_refused_with_what_differs(begun, small_checkpoint, tmp_path):
    with pytest.raises(BundleError, match=r"was begun with something else: bundle\.history.*bundle\.opset: 14, now 17"):
        run(small_checkpoint, tmp_path / "bundle", resume=True, opset=17)
    with pytest.raises(BundleError, match=r"bundle\.dtype: 'float32', now 'float16'"):
        run(small_checkpoint, tmp_path / "bundle", resume=True, dtype="float16")
    assert begun.is_dir(), "and what is there stays"
    run(small_checkpoint, tmp_path / "bundle", resume=True)


def test_another_checkpoint_is_refused_with_what_differs(begun, small_checkpoint, tmp_path):
    copy = shutil.copytree(small_checkpoint, tmp_path / "copy")
    weights = copy / "pytorch_model.bin"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(BundleError, match=r"checkpoint\.pytorch_model\.bin: \[\d+, \d+\], now \[\d+, 1\]"):
        run(copy, tmp_path / "bundle", resume=True)


def test_without_resume_it_starts_anew(begun, small_checkpoint, tmp_path, reference):
    node = (begun / "glm_block_0.onnx.data").stat().st_ino
    run(small_checkpoint, tmp_path / "bundle")
    assert hashes(tmp_path / "bundle") == reference
    assert (tmp_path / "bundle" / "glm_block_0.onnx.data").stat().st_ino != node or not begun.exists()


def test_nothing_to_resume_is_said(small_checkpoint, tmp_path, reference):
    (notice,) = run(small_checkpoint, tmp_path / "bundle", resume=True)
    assert "no unfinished run" in notice
    assert hashes(tmp_path / "bundle") == reference


def test_a_checkpoint_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer=False)
    changing = "glmexport.draft_writer.lint_graph"

    def change(*_: object) -> list[str]:
        os.utime(checkpoint / "pytorch_model.bin", ns=(1, 1))
        return []

    monkeypatch.setattr(changing, change)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin changed while it was read"):
        run(checkpoint, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


INTERRUPTED = """
import os, signal, sys
from glmexport.journal import Journal
add, left = Journal.add, 2
def interrupting(self, *arguments):
    global left
    add(self, *arguments)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGINT)
Journal.add = interrupting
from glmexport.cli.main import run
run()
"""


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(small_checkpoint, tmp_path):
    arguments = ["split", str(small_checkpoint), "-o", str(tmp_path / "the bundle"), "--opset", "14"]
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert (
        f"go on with: glmexport split {small_checkpoint} -o '{tmp_path}/the bundle' --opset 14 --resume" in done.stderr
    )
    (partial,) = tmp_path.iterdir()
    assert len((partial / JOURNAL).read_text().splitlines()) >= 3
    command = [sys.executable, "-m", "glmexport", *arguments, "--resume"]
    subprocess.run(command, check=True, capture_output=True)
    assert not [complaint for _, complaint in check_files(open_bundle(tmp_path / "the bundle")) if complaint]
    assert json.loads((tmp_path / "the bundle" / "manifest.json").read_text())["opset"] == 14
