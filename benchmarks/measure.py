"""Run a command and print its wall time, CPU time and peak memory, as the operating system counts it.

Example: python benchmarks/measure.py glmexport split chatglm-6b/ -o bundle/
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time


def main(command: list[str]) -> int:
    """Run `command`, report on stderr, and return its status."""
    begun = time.monotonic()
    status = subprocess.call(command)
    wall = time.monotonic() - begun
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        f"status {status}  wall {wall:.1f} s  CPU {used.ru_utime + used.ru_stime:.1f} s  peak {peak / 1e9:.2f} GB",
        file=sys.stderr,
    )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
