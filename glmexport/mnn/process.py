"""Another process, for what can crash, print or hang: run in a directory of its own, and how it ended, in words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

LAST_BYTES = 1 << 16
LAST_CHARACTERS = 300
SAID_NOTHING = "it said nothing"


def run_apart(
    arguments: Sequence[str],
    place: Path,
    said: Path,
    errors: Path | None = None,
    *,
    timeout: float,
    command: Sequence[str] = (sys.executable,),
) -> str | None:
    """Run Python, or another `command`, in `place`; returns what was wrong with how it ended, None where nothing was.

    said: the file that takes its stdout. errors: the one for its stderr, None for the same. timeout: seconds, after
    which it is stopped. It never outlives the call. Raises OSError where it cannot be started or a file not be made.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with ExitStack() as stack:
        out = stack.enter_context(said.open("wb"))
        err = subprocess.STDOUT if errors is None else stack.enter_context(errors.open("wb"))
        process = subprocess.Popen(
            [*command, *arguments], cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"it did not end within {timeout:g} seconds and was stopped"
        finally:  # Ctrl-C comes here too
            if process.poll() is None:
                process.kill()
                process.wait()
    return how_it_ended(status)


def how_it_ended(status: int) -> str | None:
    """An exit status, negative for a signal, in words; None for 0."""
    if status < 0:
        name = signal.Signals(-status).name if -status in {*signal.Signals} else f"signal {-status}"
        memory = ", which is what the system does where memory is short" * (name == "SIGKILL")
        return f"it was ended by {name}{memory}"
    return f"it ended with status {status}" if status else None


def last_line(*files: Path) -> str:
    """The last line of the first of these files that has one, cut to a part of a sentence."""
    for file in files:
        with file.open("rb") as source:
            source.seek(max(file.stat().st_size - LAST_BYTES, 0))
            lines = source.read().decode("utf-8", errors="replace").strip().splitlines()
        if lines:
            return lines[-1].strip()[:LAST_CHARACTERS].rstrip(" .:")
    return SAID_NOTHING
