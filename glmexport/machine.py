"""What this computer has: processor, memory and what is allowed of it, and how fast memory is read."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

X86_FEATURES = {"AVX2": "avx2", "AVX512F": "avx512f", "AVX512-VNNI": "avx512_vnni", "AVX-VNNI": "avx_vnni"}
ARM_FEATURES = {"dotprod": "asimddp", "i8mm": "i8mm"}
"""Feature -> its word in /proc/cpuinfo."""

INTEGER_PRODUCTS = ("AVX512-VNNI", "AVX-VNNI", "dotprod")
"""Any of these multiplies and adds four 8-bit integers in one step."""

_MAC_FEATURES = {
    "x86_64": {"AVX2": "avx2_0", "AVX512F": "avx512f", "AVX512-VNNI": "avx512vnni"},
    "arm64": {"dotprod": "arm.FEAT_DotProd", "i8mm": "arm.FEAT_I8MM"},
}
_CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_2 = ("memory.max", "memory.current", "inactive_file")  # files with limit and usage, line of memory.stat
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" as a number near 2^63

READING_SECONDS = 1.0
READING_BYTES = 512_000_000
"""Of the buffer that is read: more than the outermost caches of nearly every processor."""

Sysctl = Callable[[str], str | None]


@dataclass(frozen=True)
class Cpu:
    """The processor. model: as the system names it, None unknown. cores: that this process may use.

    features: name -> whether it is there, None unknown; empty where the system says nothing.
    """

    model: str | None
    cores: int
    features: Mapping[str, bool | None]

    @property
    def integer_products(self) -> bool | None:
        """Whether 8-bit integers are multiplied and added in one step; None unknown."""
        known = [self.features[name] for name in INTEGER_PRODUCTS if name in self.features]
        if any(known):
            return True
        return None if None in known or not known else False


@dataclass(frozen=True)
class Memory:
    """Bytes, None unknown. available: without swapping, and within `limit`.

    limit: what the cgroup allows, None where that is no less than the total.
    """

    total: int | None
    available: int | None
    limit: int | None = None


def read_cpu(root: Path = Path("/"), *, sysctl: Sysctl | None = None) -> Cpu:
    """The processor. root: where /proc is. sysctl: asks macOS for a value; default there, None elsewhere."""
    sysctl = sysctl or (_sysctl if sys.platform == "darwin" else None)
    if sysctl is not None:
        keys = _MAC_FEATURES.get(platform.machine(), {})
        answers = {name: sysctl(f"hw.optional.{key}") for name, key in keys.items()}
        features = {name: None if answer is None else answer == "1" for name, answer in answers.items()}
        return Cpu(sysctl("machdep.cpu.brand_string"), _cores(), features)
    lines = [line.partition(":") for line in _text(root / "proc/cpuinfo").splitlines()]
    facts = {key.strip().lower(): value.strip() for key, _, value in reversed(lines)}  # of the first processor
    for line, table in (("flags", X86_FEATURES), ("features", ARM_FEATURES)):
        if line in facts:
            words = set(facts[line].split())
            known: dict[str, bool | None] = {name: word in words for name, word in table.items()}
            return Cpu(facts.get("model name") or facts.get("hardware"), _cores(), known)
    return Cpu(facts.get("model name"), _cores(), {})


def read_memory(root: Path = Path("/"), *, sysctl: Sysctl | None = None) -> Memory:
    """Memory and what a cgroup (version 1 or 2) allows of it. Arguments as of `read_cpu`."""
    sysctl = sysctl or (_sysctl if sys.platform == "darwin" else None)
    if sysctl is not None:
        total, percent = _number(sysctl("hw.memsize")), _number(sysctl("kern.memorystatus_level"))
        return Memory(total, None if total is None or percent is None else total * percent // 100)
    pairs = [line.partition(":") for line in _text(root / "proc/meminfo").splitlines()]
    kilobytes = {key: _number(value.removesuffix("kB")) for key, _, value in pairs}
    total, available = (_times(kilobytes.get(key), 1024) for key in ("MemTotal", "MemAvailable"))
    limits = list(_cgroup_limits(root))
    limit = min((limit for limit, _ in limits), default=None)
    rooms = [room for _, room in limits] + ([] if available is None else [available])
    tighter = limit is not None and (total is None or limit < total)
    return Memory(total, min(rooms, default=None), limit if tighter else None)


def read_bandwidth(threads: int, available: int | None = None, *, seconds: float = READING_SECONDS) -> float:
    """Bytes a second that so many threads read together from memory; see `BandwidthReader`."""
    return BandwidthReader(threads, available).read(seconds)


class BandwidthReader:
    """Reads a buffer again and again, by so many threads together.

    The reading wanders (between 25 and 37 GB/s within minutes on the computer that the figures above are from), since
    others use the same memory. The largest of 32-bit integers is the quickest of numpy's reductions: sums of floats
    are bound by the adder.
    """

    def __init__(self, threads: int, available: int | None = None) -> None:
        """available: bytes of memory, of which at most an eighth is used."""
        import numpy as np

        self._size = READING_BYTES if available is None else max(min(READING_BYTES, available // 8), 1 << 20)
        # written to: pages that were only promised would all be the same one
        self._parts = np.array_split(np.ones(self._size // 4, np.int32), threads)

    def read(self, seconds: float = READING_SECONDS) -> float:
        """The most bytes a second within so many seconds."""
        import numpy as np

        best, end = 0.0, time.perf_counter() + seconds
        with ThreadPoolExecutor(len(self._parts)) as pool:
            while not best or time.perf_counter() < end:
                begun = time.perf_counter()
                list(pool.map(np.max, self._parts))
                best = max(best, self._size / (time.perf_counter() - begun))
        return best


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, room left) of the process's own cgroup and of all above it, where they limit memory.

    In a container the path may be that of the host, which is not there; the top is what the container got then.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            base, files = root / "sys/fs/cgroup/memory", _CGROUP_1
        elif controllers == "":
            base, files = root / "sys/fs/cgroup", _CGROUP_2
        else:
            continue
        own = base / path.lstrip("/")
        for directory in (own, *own.parents):
            limit, used = (_number(_text(directory / name)) for name in files[:2])
            if limit is not None and limit < _UNLIMITED:
                # pages of files that nobody uses just now are given back first
                stat = dict(line.split(" ", 1) for line in _text(directory / "memory.stat").splitlines() if " " in line)
                yield limit, max(limit - (used or 0) + (_number(stat.get(files[2])) or 0), 0)
            if directory == base:
                break


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _text(path: Path) -> str:
    """A file of the system's, empty where there is none to read."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _number(text: str | None) -> int | None:
    word = (text or "").strip()
    return int(word) if word.isascii() and word.isdecimal() else None


def _times(count: int | None, factor: int) -> int | None:
    return None if count is None else count * factor


def _sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
