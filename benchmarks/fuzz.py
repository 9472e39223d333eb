"""Damage checkpoints, bundles and small files at random and run the command line over them.

    python benchmarks/fuzz.py --seconds 1800 --seed 1
    python benchmarks/fuzz.py --seed 1 --kind manifest --number 812 --keep DIR    # one case again, kept to look at

Whatever is damaged, a command ends in success, in a failed check, or in one sentence. It never shows a traceback,
crashes, hangs, takes memory beyond a bound, changes what it reads, or runs what lies in a file. Commands run in a
process of their own whose address space is limited; it is started again after a crash or a hang.

tests/test_fuzz.py runs the same kinds of damage for some seconds, drawn by hypothesis. A case here is a function of
seed, kind and number alone.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, NamedTuple, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from damage import CANARY, Case, Chance, Command, Damage, lay_out, prepare
from damage_kinds import KINDS

MEMORY_BYTES = 3 << 30
"""Address space that a command may take beyond what the process has when its libraries are loaded."""
HELD_BYTES = 600 << 20
"""Memory that a command may come to hold beyond that: the models are tiny, the largest file read whole has 64 MiB."""
SECONDS = 20.0
"""Longer is a hang; the longest command takes a fraction of a second."""
READY = "ready"


class Outcome(NamedTuple):
    """How a command ended. problem: a traceback, crash or hang. held: bytes that it came to hold."""

    status: int
    stdout: str
    stderr: str
    problem: str = ""
    held: int = 0


class Runner(Protocol):
    """What runs a command in a directory."""

    def run(self, command: Command, folder: Path, seconds: float = SECONDS) -> Outcome: ...


class Worker:
    """A process that runs commands, within limits of time and memory; started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._errors.close()

    def run(self, command: Command, folder: Path, seconds: float = SECONDS) -> Outcome:
        """Run one command in a directory, for so long at most."""
        connection = self._connection or self._start()
        try:
            connection.send((tuple(command), str(folder)))
            if connection.poll(seconds):
                return Outcome(*connection.recv())
            problem = f"still running after {seconds:g} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            problem = ""
        status = self.close()
        self._errors.seek(0)
        tail = self._errors.read()[-2000:].decode("utf-8", "replace")
        return Outcome(status, "", tail, problem or f"crashed with status {status}")

    def close(self) -> int:
        """End the process."""
        if self._process is None or self._connection is None:
            return 0
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        self._process.kill()
        status = self._process.wait()
        self._process = self._connection = None
        return status

    def kill(self) -> None:
        """End the process as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        self._errors.seek(0)
        self._errors.truncate()
        limits = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # arenas are address space
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            env={**os.environ, **limits, "HF_HUB_OFFLINE": "1"},
        )
        theirs.close()
        if ours.recv() != READY:
            raise RuntimeError("the worker did not start")
        self._connection = ours
        return ours


def serve(handle: int) -> None:
    """What the worker does until the other side is gone."""
    import numba  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch

    import glmexport.api
    import glmexport.passes.choose_bits
    import glmexport.splitter
    import glmexport.verify  # noqa: F401

    torch.set_num_threads(1)
    connection = Connection(handle)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send(READY)
    while True:
        try:
            command, folder = connection.recv()
        except EOFError:
            return
        connection.send(tuple(run_here(Command(*command), Path(folder))))


def run_here(command: Command, folder: Path) -> Outcome:
    """Run a command in this process, in a directory; what libraries write past Python's stderr counts as stderr."""
    from glmexport.cli.main import run

    arguments, before, where = sys.argv, sys.stdin, Path.cwd()
    held = _reset_peak()
    status, problem = 0, ""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)  # what cannot be encoded is an error here too
    errors = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    with tempfile.TemporaryFile() as noise:
        with _stderr_into(noise), redirect_stdout(out), redirect_stderr(errors):
            try:
                os.chdir(folder)
                sys.argv = ["glmexport", *command.arguments]
                sys.stdin = io.TextIOWrapper(io.BytesIO(command.stdin), "utf-8")
                run()
            except SystemExit as done:
                status = int(done.code or 0)
            except BaseException:
                problem = traceback.format_exc()
            finally:
                sys.argv, sys.stdin = arguments, before
                os.chdir(where)
        noise.seek(0)
        written = [file.buffer.getvalue().decode("utf-8", "replace") for file in (out, errors)]  # type: ignore[attr-defined]
        written[1] += noise.read(1 << 16).decode("utf-8", "replace")
    return Outcome(status, *written, problem, _peak() - held)


@contextmanager
def _stderr_into(file: IO[bytes]) -> Iterator[None]:
    """Have what is written to the descriptor of stderr in a file."""
    keep = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(keep, 2)
        os.close(keep)


def _reset_peak() -> int:
    """Bytes that the process holds; from here on `_peak` counts anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


# Judging


def complaint(command: Command, outcome: Outcome) -> str | None:
    """What is wrong with how a command ended, None where nothing is."""
    name = command.arguments[0]
    lines = [line for line in outcome.stderr.split("\n") if line and not line.startswith(("Note: ", "[ ", "[1"))]
    if outcome.problem:
        return outcome.problem + outcome.stderr[-1000:]
    if outcome.held > HELD_BYTES:
        return f"held {outcome.held >> 20} MiB"
    if "memory" in outcome.stderr.lower() or "bad_alloc" in outcome.stderr or "allocate" in outcome.stderr:
        return f"asked for more memory than it may: {outcome.stderr[:300]}"
    if "\x1b" in outcome.stderr or (name in ("inspect", "verify", "doctor") and "\x1b" in outcome.stdout):
        return f"sends what a file holds to the terminal: {(outcome.stderr + outcome.stdout)[:300]!r}"
    checks = name == "verify" or "--check" in command.arguments
    if outcome.status == 0 or (outcome.status == 1 and checks):
        return f"noise on stderr: {lines}" if lines else None
    if outcome.status != 2:
        return f"status {outcome.status}"
    if not lines or not lines[0].startswith("Error: ") or not lines[0].endswith("."):
        return f"no sentence: {lines}"
    if not all(line.isprintable() for line in lines) or len(lines[0]) > 2000:
        return f"not a line that a terminal shows: {lines[0][:300]!r}"
    if not all(line.startswith("  ") for line in lines[1:]):  # what is wrong with tensors is a list
        return f"more than one sentence: {lines}"
    return None


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Kind and content of everything below a directory."""
    found = {}
    for path in sorted(directory.rglob("*")):
        kind = path.lstat().st_mode
        content = b""
        if path.is_symlink():
            content = os.fsencode(path.readlink())
        elif path.is_file():
            with path.open("rb") as file:
                content = file.read(1 << 20)
        found[str(path.relative_to(directory))] = (kind, content)
    return found


def run_case(worker: Runner, folder: Path, damage: Damage, chance: Chance) -> tuple[Case, list[str]]:
    """Damage what lies in `folder` (see `lay_out`) and run the commands; the case and what is wrong with it."""
    case = damage(chance, folder)
    wrong = []
    resumed = folder / ".stopped.partial"
    for command in case.commands:
        before = snapshot(folder)
        outcome = worker.run(command, folder)
        found = complaint(command, outcome)
        if found is not None:
            wrong.append(f"glmexport {' '.join(command.arguments)}\n{found}")
        for made in (folder / "out", folder / "stopped"):
            if made.is_dir():
                shutil.rmtree(made)
        after = snapshot(folder)
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        changed = [name for name in changed if not name.startswith(resumed.name)]
        if changed:
            wrong.append(f"glmexport {' '.join(command.arguments)}\nchanged {', '.join(changed)}")
        if (folder / CANARY).exists():
            wrong.append(f"glmexport {' '.join(command.arguments)}\nran what lies in the file")
            break
    return case, wrong


def main() -> None:
    """Run cases until the time is over, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="of damage; all of them in turn without it")
    parser.add_argument("--number", type=int, help="run this case only")
    parser.add_argument("--failures", type=int, default=20, metavar="N", help="stop after so many (default: 20)")
    parser.add_argument("--keep", type=Path, help="a directory to be made, for the files of the last failure")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    with tempfile.TemporaryDirectory(prefix="glmexport-fuzz-") as place, Worker() as worker:
        failed = _run(options, Path(place), worker)
    sys.exit(1 if failed else 0)


def _run(options: argparse.Namespace, place: Path, worker: Worker) -> int:
    prepare(place / "stock")
    kinds = [options.kind] if options.kind else list(KINDS)
    end = time.monotonic() + options.seconds
    counts = dict.fromkeys(kinds, 0)
    failed = 0
    number = options.number or 0
    while options.number is None or number == options.number:
        for kind in kinds:
            if time.monotonic() > end or failed >= options.failures:
                break
            folder = place / "case"
            lay_out(place / "stock", folder)
            case, wrong = run_case(worker, folder, KINDS[kind], random.Random(f"{options.seed} {kind} {number}"))
            counts[kind] += 1
            if wrong:
                failed += 1
                again = f"--seed {options.seed} --kind {kind} --number {number}"
                print(f"FAILED {again}\n{case.damage}\n" + "\n".join(wrong) + "\n", flush=True)
                if options.keep is not None:
                    shutil.rmtree(options.keep, ignore_errors=True)
                    shutil.copytree(folder, options.keep, symlinks=True, ignore=_pipes)
            shutil.rmtree(folder)
        else:
            number += 1
            continue
        break
    print(", ".join(f"{kind} {count}" for kind, count in counts.items()))
    print(f"{sum(counts.values())} cases, {failed} failed")
    return failed


def _pipes(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(directory) / name).is_fifo()]


if __name__ == "__main__":
    main()
