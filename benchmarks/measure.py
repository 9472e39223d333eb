"""Run a command and print its wall time, CPU time, peak memory and disk traffic, as the operating system counts them.

Example: python benchmarks/measure.py glmexport split chatglm-6b/ -o bundle/
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measurement:
    """status: exit status. wall, cpu: seconds. peak: bytes held by the largest process of the command's tree.

    read, written: bytes that the tree fetched from disks and sent there; None where the system does not say. What the
    page cache answered is not among them.
    """

    status: int
    wall: float
    cpu: float
    peak: int
    read: int | None
    written: int | None


def measure(command: Sequence[str], stdout: int | None = None) -> Measurement:
    """Run `command` and wait for it. stdout: as of `subprocess.Popen`.

    Linux counts what the caller holds as the least peak of its children, so call this from a small process.
    """
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=stdout)
    try:
        if hasattr(os, "waitid"):  # its counters can be read from when it ends until somebody fetches its status
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        traffic = disk_traffic(process.pid)
        _, status, used = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    wall = time.monotonic() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measurement(process.returncode, wall, used.ru_utime + used.ru_stime, peak, *(traffic or _blocks(used)))


def disk_traffic(pid: int | str) -> tuple[int, int] | None:
    """Bytes that a process, and children it waited for, read from disks and wrote to them; None where none says."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text("ascii").splitlines()
    except OSError:
        return None
    counts = dict(line.split(": ") for line in lines)
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def _blocks(used: resource.struct_rusage) -> tuple[int | None, int | None]:
    """The same from what `wait4` gives; macOS counts operations there, not blocks."""
    return (None, None) if sys.platform == "darwin" else (used.ru_inblock * 512, used.ru_oublock * 512)


def main(command: list[str]) -> int:
    """Run `command`, report on stderr, and return its status."""
    done = measure(command)
    traffic = "".join(
        f"  {word} {count / 1e9:.2f} GB" for word, count in (("read", done.read), ("written", done.written)) if count
    )
    print(
        f"status {done.status}  wall {done.wall:.1f} s  CPU {done.cpu:.1f} s  peak {done.peak / 1e9:.2f} GB{traffic}",
        file=sys.stderr,
    )
    return done.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
