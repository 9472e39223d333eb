"""Measure what the commands cost, each beside the floor under it: reading and writing the same bytes.

    python benchmarks/run.py /data/chatglm-6b-random --work /data/work --json bench.json
    python benchmarks/run.py /data/chatglm-6b-random --work /data/work --only split-int4-rtn,load-int4
    python benchmarks/run.py --synthesize /data/small --blocks 2 --hidden 512 --heads 8 --vocab 4096 --work /data/work

Each command is a process of its own that finds its input on the disk, not in the page cache, as far as the system can
be told to drop it. Right after it the floor: one pass over the files that it read, as programs read them, while as many
bytes as it made are written and synced, past the page cache or through it, whichever was quicker. The ratio is wall
time over that; where large checkpoints are read past the cache too, it can be less than 1. Disks are shared and wander,
so compare the ratios of several runs, not one.

One bundle is on the disk at a time, two while quantizing one (26.8 GB and 5.2 GB at full size), and 1 GB for the floor.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Measurement, disk_traffic, measure

from glmexport.cli import output
from glmexport.doctor import memory_limit, read_memory
from glmexport.errors import GlmExportError
from glmexport.sizes import size_in_words
from glmexport.tools import tool_versions

BUFFER_BYTES = 8 << 20
PIECE_BYTES = 1 << 30
"""The floor's writing fills a file of so many bytes, syncs and removes it, and starts again."""
READERS = 2
"""Files of the floor that are read side by side: a fast disk wants more than one reader."""
COLD = 0.9
"""Of the bytes that the floor read, the share that must have come from the disk."""
DIRECT: int = getattr(os, "O_DIRECT", 0)
SMALL = ("--slim", "--embedding", "bf16")


@dataclass(frozen=True)
class Step:
    """command: of glmexport. source: the step whose bundle it starts from, None for the checkpoint."""

    name: str
    command: str
    options: tuple[str, ...] = ()
    source: str | None = None


STEPS = (
    Step("split-float32", "split"),
    Step("verify-float32", "verify", source="split-float32"),
    Step("load-float32", "generate", source="split-float32"),
    Step("quantize-int4", "quantize", ("--bits", "4"), source="split-float32"),
    Step("split-weights-float16", "split", ("--weights", "float16")),
    Step("split-float16", "split", ("--dtype", "float16")),
    Step("split-int4", "split", (*SMALL, "--quantize", "int4")),
    Step("verify-int4", "verify", source="split-int4"),
    Step("load-int4", "generate", source="split-int4"),
    Step("split-int4-rtn", "split", (*SMALL, "--quantize", "int4", "--method", "rtn")),
    Step("split-int8", "split", (*SMALL, "--quantize", "int8")),
)
"""In an order in which a bundle is used up before the next is made."""


@dataclass(frozen=True)
class Floor:
    """Reading and writing at once. seconds: until both are done; read_seconds, write_seconds: until each was.

    cold: whether what was read came from the disk; None where the system does not say. direct: whether it was written
    past the page cache.
    """

    seconds: float
    read_bytes: int
    read_seconds: float
    written_bytes: int
    write_seconds: float
    cold: bool | None
    direct: bool

    @property
    def read_speed(self) -> float:
        """Bytes a second."""
        return self.read_bytes / self.read_seconds

    @property
    def write_speed(self) -> float | None:
        """Bytes a second, None where nothing was written."""
        return self.written_bytes / self.write_seconds if self.written_bytes else None


@dataclass(frozen=True)
class Result:
    """One row."""

    step: str
    measured: Measurement
    floor: Floor

    @property
    def ratio(self) -> float:
        """How many times the floor the command took."""
        return self.measured.wall / self.floor.seconds

    def as_json(self) -> dict[str, Any]:
        """Seconds, bytes, and bytes a second."""
        speeds = {"read_speed": self.floor.read_speed, "write_speed": self.floor.write_speed}
        floor = {**dataclasses.asdict(self.floor), **speeds}
        return {"step": self.step, **dataclasses.asdict(self.measured), "floor": floor, "ratio": self.ratio}


# The floor


def measure_floor(inputs: list[Path], count: int, folder: Path) -> Floor:
    """Read `inputs` from the disk while `count` bytes are written into `folder`."""
    trial = min(count, PIECE_BYTES)
    direct = bool(count and DIRECT) and _seconds(lambda: write(trial, folder, True)) < _seconds(
        lambda: write(trial, folder, False)
    )
    drop_from_cache(inputs)
    before = disk_traffic("self")
    begun = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(_seconds, lambda: read(inputs))
        writing = pool.submit(_seconds, lambda: write(count, folder, direct))
        read_seconds, write_seconds = reading.result(), writing.result()
    seconds = time.perf_counter() - begun
    after = disk_traffic("self")
    total = sum(path.stat().st_size for path in inputs)
    cold = after[0] - before[0] >= COLD * total if before and after else None
    return Floor(seconds, total, read_seconds, count, write_seconds, cold, direct)


def read(paths: list[Path]) -> None:
    """Read every byte once, front to back."""

    def one(path: Path) -> None:
        buffer = bytearray(BUFFER_BYTES)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(one, sorted(paths, key=lambda path: -path.stat().st_size)))


def write(count: int, folder: Path, direct: bool) -> None:
    """Write so many random bytes and sync them, one piece after the other."""
    path = folder / "floor"
    buffer = mmap.mmap(-1, BUFFER_BYTES)  # pages are aligned, as writing past the cache wants it
    buffer[:] = os.urandom(BUFFER_BYTES)
    while count:
        piece = min(count, PIECE_BYTES)
        with path.open("wb", buffering=0) as file:
            _write_piece(file.fileno(), buffer, piece, direct)
        path.unlink()
        count -= piece


def drop_from_cache(paths: list[Path]) -> None:
    """Have the system forget what it holds of these files, where it can be told to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_piece(handle: int, buffer: mmap.mmap, count: int, direct: bool) -> None:
    with memoryview(buffer) as view:
        while count:
            whole = count >= BUFFER_BYTES  # the rest is no whole page and goes through the cache
            _set_direct(handle, direct and whole)
            try:
                count -= os.write(handle, view[: min(count, BUFFER_BYTES)])
            except OSError:
                if not direct:
                    raise
                direct = False  # a file system that cannot
    os.fsync(handle)


def _set_direct(handle: int, on: bool) -> None:
    if DIRECT:
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | DIRECT if on else flags & ~DIRECT)


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


# The commands


def run(checkpoint: Path, steps: list[Step], work: Path, opset: int | None) -> Iterator[Result]:
    """Measure the steps, in a directory of their own in `work` that is removed at the end.

    Raises GlmExportError where a command fails.
    """
    with tempfile.TemporaryDirectory(prefix="glmexport-bench-", dir=work) as name:
        folder = Path(name)
        held: str | None = None
        bundle = folder / "bundle"
        for step in steps:
            base = step.source or step.name
            if held != base:
                shutil.rmtree(bundle, ignore_errors=True)
                held = base
                if step.source is not None:
                    (maker,) = [other for other in STEPS if other.name == step.source]
                    _tell(f"{maker.name}, which {step.name} starts from")
                    _execute(_arguments(maker, checkpoint, bundle, bundle, opset))
            target = bundle if step.source is None else folder / "derived"
            inputs = _inputs(step, checkpoint, bundle)
            drop_from_cache(inputs)
            _tell(step.name)
            measured = _execute(_arguments(step, checkpoint, bundle, target, opset))
            made = _files(target) if target.exists() else []
            linked = {path.stat().st_ino for path in made} & {path.stat().st_ino for path in inputs}
            count = sum(path.stat().st_size for path in made if path.stat().st_ino not in linked)
            inputs = [path for path in inputs if path.stat().st_ino not in linked]
            if target != bundle:
                shutil.rmtree(target, ignore_errors=True)
            _tell(f"{step.name}: {measured.wall:.1f} s; its floor")
            yield Result(step.name, measured, measure_floor(inputs, count, folder))


def _arguments(step: Step, checkpoint: Path, bundle: Path, target: Path, opset: int | None) -> list[str]:
    """The command line after `glmexport`."""
    if step.command == "split":
        chosen = [] if opset is None else ["--opset", str(opset)]
        return ["split", str(checkpoint), "-o", str(target), *step.options, *chosen]
    if step.command == "quantize":
        return ["quantize", str(bundle), "-o", str(target), *step.options]
    if step.command == "verify":
        return ["verify", str(bundle), str(checkpoint)]
    manifest = _manifest(bundle)
    ids = manifest["model"]["special_ids"]
    prompt = ",".join(str(ids[name]) for name in ("forced", "gmask", "bos"))
    arguments = ["generate", str(bundle), "--input-ids", prompt, "--greedy", "--max-tokens", "1", "--output-ids"]
    limit = memory_limit(read_memory().available)
    if limit is not None and sum(path.stat().st_size for path in _graphs(bundle)) > limit:
        arguments += ["--memory-limit", str(limit)]
    return arguments


def _inputs(step: Step, checkpoint: Path, bundle: Path) -> list[Path]:
    """The files that a step reads."""
    if step.command == "split":
        return _files(checkpoint)
    if step.command == "verify":
        return _files(checkpoint) + _files(bundle)
    return _graphs(bundle) if step.command == "generate" else _files(bundle)


def _execute(arguments: list[str]) -> Measurement:
    command = [sys.executable, "-m", "glmexport", *arguments, "-q"]
    measured = measure(command, stdout=subprocess.DEVNULL)
    if measured.status:
        words = " ".join(arguments)
        raise GlmExportError(f"`glmexport {words}` ended with status {measured.status}; run it by itself to see why.")
    return measured


def _files(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.iterdir()) if path.is_file()]


def _graphs(bundle: Path) -> list[Path]:
    return [bundle / graph[key] for graph in _manifest(bundle)["graphs"] for key in ("file", "data")]


def _manifest(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text("utf-8"))
    return manifest


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text} …", file=sys.stderr, flush=True)


# Showing


def show(results: list[Result]) -> None:
    """Print the table."""
    numbers = ("wall", "CPU", "peak", "read", "written", "floor", "its reading", "its writing", "ratio")
    listing = output.table("step", *numbers, right=numbers)
    for result in results:
        measured, floor = result.measured, result.floor
        sizes = ["" if count is None else size_in_words(count) for count in (measured.read, measured.written)]
        speeds = ["" if speed is None else f"{speed / 1e9:.2f} GB/s" for speed in (floor.read_speed, floor.write_speed)]
        times = [f"{seconds:.1f} s" for seconds in (measured.wall, measured.cpu)]
        row = (*times, size_in_words(measured.peak), *sizes, f"{floor.seconds:.2f} s", *speeds, f"{result.ratio:.2f}")
        listing.add_row(result.step, *row)
    console = output.console()
    console.print(listing)
    console.print("read, written: from and to the disk. floor: the same files read, as many bytes written and synced.")
    warm = [result.step for result in results if result.floor.cold is False]
    if warm:
        console.print(f"The page cache kept some of what was read: {', '.join(warm)}.")


def main() -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a directory, such as synthesize.py writes")
    parser.add_argument("--work", type=Path, required=True, help="directory on the disk to be measured")
    parser.add_argument("--only", help=f"some of {','.join(step.name for step in STEPS)}")
    parser.add_argument("--json", metavar="FILE", help="also write all of it as JSON; - is stdout, without the table")
    parser.add_argument("--opset", type=int, help="of split; up to 17 is traced quickly, which small models show")
    parser.add_argument("--synthesize", type=Path, metavar="DIR", help="write random weights there first")
    sizes = ("blocks", "hidden", "heads", "inner", "vocab")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int, help="of --synthesize")
    options = parser.parse_args()
    if (options.checkpoint is None) == (options.synthesize is None):
        parser.error("give either a checkpoint or --synthesize DIR")
    known = {step.name for step in STEPS}
    chosen = known if options.only is None else set(options.only.split(","))
    if chosen - known:
        parser.error(f"--only knows no {', '.join(sorted(chosen - known))}; choose of {', '.join(sorted(known))}")
    if options.synthesize is not None:
        given = [(name, getattr(options, name)) for name in sizes]
        words = [word for name, value in given if value is not None for word in (f"--{name}", str(value))]
        script = Path(__file__).with_name("synthesize.py")
        subprocess.run([sys.executable, script, options.synthesize, *words], check=True, stdout=sys.stderr)
    checkpoint = options.checkpoint or options.synthesize
    if not (checkpoint / "config.json").is_file():
        parser.error(f"{checkpoint} is no checkpoint: it has no config.json")
    options.work.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    status = 0
    try:
        for result in run(checkpoint, [step for step in STEPS if step.name in chosen], options.work, options.opset):
            results.append(result)  # noqa: PERF402 - what came before an error stays
    except GlmExportError as error:
        print(f"Error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        status = 130
    if options.json is not None:  # what was measured is shown, whatever became of the rest
        facts = {"checkpoint": str(checkpoint), "bytes": sum(path.stat().st_size for path in _files(checkpoint))}
        steps = [result.as_json() for result in results]
        output.write_json(options.json, {**facts, "tools": tool_versions(), "steps": steps})
    if options.json != "-":
        show(results)
    return status


if __name__ == "__main__":
    sys.exit(main())
