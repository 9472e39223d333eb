"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever it happens to be. Inside a callback of torch or of the garbage collector the
exception is printed and dropped, and the run would go on to its end. So the signal is remembered too, and every report
of progress asks for it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_seen = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """While this is entered, Ctrl-C raises KeyboardInterrupt and is remembered for `check`."""
    _seen.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return

    def remember(number: int, frame: FrameType | None) -> None:
        _seen.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed."""
    if _seen.is_set():
        raise KeyboardInterrupt


def forget() -> None:
    """Go on after Ctrl-C, which stopped what it was meant to stop."""
    _seen.clear()
