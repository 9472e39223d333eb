"""The benchmark has a row of plausible numbers for every step and leaves nothing; how large they are is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SIZES = ("--blocks", "2", "--hidden", "32", "--heads", "2", "--vocab", "512")
QUICK = ("split-float32", "load-float32", "quantize-int4")
ALL = (
    *("split-float32", "verify-float32", "load-float32", "quantize-int4"),
    *(
        "split-weights-float16",
        "split-float16",
        "split-int4",
        "verify-int4",
        "load-int4",
        "split-int4-rtn",
        "split-int8",
    ),
)


@pytest.fixture
def bench(monkeypatch):
    """benchmarks/run.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run

    return run


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "run.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def assert_complete(done: subprocess.CompletedProcess[str], document: dict, steps: tuple[str, ...]) -> None:
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in document["steps"]] == list(steps)
    assert [line.split()[0] for line in done.stdout.splitlines()[1:] if line.split()[0] in ALL] == list(steps)
    for row in document["steps"]:
        floor = row["floor"]
        assert row["status"] == 0
        for number in (row["wall"], row["cpu"], row["peak"], row["ratio"], floor["seconds"], floor["read_bytes"]):
            assert number > 0
        assert floor["read_speed"] > 0
        assert row["ratio"] == pytest.approx(row["wall"] / floor["seconds"])
        writes = row["step"].startswith(("split", "quantize"))
        assert (floor["written_bytes"] > 0) is writes
        assert (floor["write_speed"] is not None) is writes
        assert row["peak"] > 20_000_000, "a process with numpy in it"


def test_a_small_run_is_complete_and_leaves_nothing(tmp_path):
    work, report = tmp_path / "work", tmp_path / "bench.json"
    options = ("--work", work, "--only", ",".join(QUICK), "--json", report, "--opset", 17)
    done = run_script("--synthesize", tmp_path / "checkpoint", *SIZES, *options)
    document = json.loads(report.read_text("utf-8"))
    assert_complete(done, document, QUICK)
    assert list(work.iterdir()) == []
    assert document["bytes"] == sum(path.stat().st_size for path in (tmp_path / "checkpoint").iterdir())
    assert document["steps"][0]["floor"]["read_bytes"] == document["bytes"]
    assert document["tools"]["onnxruntime"]


@pytest.mark.slow
def test_every_step_is_measured(tmp_path):
    work, report = tmp_path / "work", tmp_path / "bench.json"
    done = run_script(
        *("--synthesize", tmp_path / "checkpoint", *SIZES), *("--work", work, "--json", report, "--opset", 17)
    )
    assert_complete(done, json.loads(report.read_text("utf-8")), ALL)
    assert list(work.iterdir()) == []


def test_what_cannot_be_measured_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([tmp_path / "empty"], "is no checkpoint"),
        ([], "either a checkpoint or --synthesize"),
        ([tmp_path, "--synthesize", tmp_path / "x"], "either a checkpoint or --synthesize"),
        ([tmp_path, "--only", "split-int4,frobnicate"], "knows no frobnicate"),
    ):
        done = run_script(*arguments, "--work", tmp_path / "work")
        assert done.returncode == 2
        assert words in done.stderr.splitlines()[-1]


def test_a_command_that_fails_ends_it_with_a_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    options = ("--work", tmp_path / "work", "--only", "load-int4", "--json", "-")
    done = run_script(tmp_path / "checkpoint", *options)
    assert done.returncode == 2
    assert "ended with status 2; run it by itself to see why." in done.stderr
    assert json.loads(done.stdout)["steps"] == []
    assert list((tmp_path / "work").iterdir()) == []


# The floor


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("count", [0, 1, 4096, 2 * 4096 + 5, 3 * 4096 * 2])
def test_the_floor_writes_as_many_bytes_as_it_is_told(bench, tmp_path, monkeypatch, direct, count):
    monkeypatch.setattr(bench, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(bench, "PIECE_BYTES", 2 * 4096)
    pieces = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: (pieces.append(path.stat().st_size), unlink(path)))
    bench.write(count, tmp_path, direct)
    assert sum(pieces) == count
    assert all(size <= 2 * 4096 for size in pieces)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_direct_writing_gets_the_bytes_all_the_same(bench, tmp_path, monkeypatch):
    real = os.write

    def refuse(handle: int, data: memoryview) -> int:
        if bench.fcntl.fcntl(handle, bench.fcntl.F_GETFL) & bench.DIRECT:
            raise OSError(22, "no")
        return real(handle, data)

    monkeypatch.setattr(os, "write", refuse)
    sizes = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: (sizes.append(path.stat().st_size), unlink(path)))
    bench.write(3 << 20, tmp_path, True)
    assert sizes == [3 << 20]


def test_the_floor_reads_every_file_and_writes_beside_it(bench, tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(files):
        path.write_bytes(os.urandom(100_000 + number))
    floor = bench.measure_floor(files, 50_000, tmp_path)
    assert (floor.read_bytes, floor.written_bytes) == (200_001, 50_000)
    assert floor.seconds >= max(floor.read_seconds, floor.write_seconds) > 0
    assert bench.measure_floor(files, 0, tmp_path).write_speed is None
    assert sorted(tmp_path.iterdir()) == files


# measure.py


def test_a_command_is_measured(bench, tmp_path):
    path = tmp_path / "file"
    code = f"import os; x = b'7' * 100_000_000; f = open({str(path)!r}, 'wb'); f.write(x[:5_000_000]); os.fsync(f)"
    done = bench.measure([sys.executable, "-c", code])
    assert done.status == 0
    assert done.peak > 100_000_000
    assert done.wall > 0
    assert done.cpu > 0
    assert done.read is None or done.read >= 0
    assert bench.measure([sys.executable, "-c", "raise SystemExit(3)"]).status == 3


def test_the_peak_is_of_one_command_and_not_of_those_before_it():
    script = "import sys; sys.path.insert(0, 'benchmarks'); from measure import measure\n"
    script += "measure([sys.executable, '-c', 'x = b\"7\" * 400_000_000'])\n"
    script += "print(measure([sys.executable, '-c', 'pass']).peak)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000_000


def test_the_script_prints_one_line_and_keeps_the_status():
    script = ROOT / "benchmarks" / "measure.py"
    command = [sys.executable, script, sys.executable, "-c", "raise SystemExit(7)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert done.stderr.startswith("status 7  wall ")
    assert " GB" in done.stderr
