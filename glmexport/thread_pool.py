"""The threads that graphs compute with: each graph's own, or one pool in a process where nothing else computes."""

from __future__ import annotations

import threading

_lock = threading.Lock()
_alone = _made = False


def run_alone() -> None:
    """Say that no session of onnxruntime is opened in this process but those of `GraphPool`.

    With a pool for the whole process, onnxruntime (1.31) refuses sessions with threads of their own, anybody's.
    """
    global _alone
    _alone = True


def share_threads(threads: int | None) -> bool:
    """Whether graphs are to compute with the pool of the process; makes it, with so many threads, for the first to ask.

    Threads go from one graph to the next then, without being put to sleep and woken, which saves up to a tenth of a
    step's time at full size. threads: None for as many as there are cores.
    """
    global _made
    if not _alone:
        return False
    import onnxruntime  # type: ignore[import-untyped]

    with _lock:
        if not _made:
            onnxruntime.set_global_thread_pool_sizes(threads or 0, 1)
            _made = True
    return True
