"""Faults to inject: operations that fail at their n-th call, files that cannot be read, moments to act at.

What every test of them asks for is the same: one sentence, and nothing or something that `--resume` goes on with.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from derived_bundles import Result, assert_one_sentence, contents, glmexport

from glmexport.bundle_writer import unfinished
from glmexport.journal import JOURNAL, Journal

OPSET = ("--opset", "14", "-q")
AT_MOST = pytest.mark.parametrize("at_most", [3, pytest.param(10**6, marks=pytest.mark.slow)], ids=["some", "all"])
"""How many of the moments at which something can fail are tried."""

DERIVING = {"slim": (), "embed": (), "quantize": ("--bits", "4")}
"""Commands that make a bundle from a bundle, with what they need."""

UNREADABLE = "/proc/self/mem"  # opens, and gives an input/output error where it is read
ON_LINUX = pytest.mark.skipif(not Path(UNREADABLE).exists(), reason="tells files by what Linux has in /proc")


def slow(*values: Any) -> list[Any]:
    """Parameters for the slow tests alone."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def split(checkpoint: Path, output: Path, *options: str) -> Result:
    return glmexport("split", checkpoint, "-o", output, *OPSET, *options)


def writing_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("write ", "sync", "read ahead"))]


def assert_nothing_left(output: Path) -> None:
    assert list(output.parent.iterdir()) == []
    assert writing_threads() == []


def assert_stopped(result: Result, output: Path, *words: str) -> bool:
    """One sentence, and either nothing is left or finished graphs and the command that goes on; gives which."""
    assert_one_sentence(result, *words)
    kept = "Note: The finished graphs are kept; go on with: glmexport split" in result.stderr
    assert result.stderr.count("Note: ") == kept
    if not kept:
        assert_nothing_left(output)
        return False
    assert [path.name for path in output.parent.iterdir()] == [f".{output.name}.partial"]
    assert unfinished(output)
    assert len(journal_of(output).read_text().splitlines()) > 1
    assert writing_threads() == []
    return True


def journal_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial") / JOURNAL


def assert_goes_on(checkpoint: Path, output: Path, whole: dict[str, bytes]) -> None:
    """The next run, whatever the one before left, ends in the same bytes."""
    assert split(checkpoint, output, "--resume").status == 0
    assert contents(output) == whole
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    shutil.rmtree(output)


class HangError(BaseException):
    """Nothing that glmexport would take for an error of the file system, as TimeoutError is."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Stop what takes longer: a test that waits for ever says nothing."""

    def expired(*_: object) -> None:
        raise HangError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Faults:
    """Counts the calls of a function that concern a directory, and has one of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, directory: Path | None = None) -> None:
        """directory: calls for other places do not count; None: every call does."""
        self.calls, self.failing, self.error = 0, 0, OSError()
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if directory is not None and not self._concerns(directory, arguments):
                return original(*arguments, **options)
            self.calls += 1
            if self.calls == self.failing:
                raise self.error
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    def at(self, call: int, error: BaseException) -> None:
        """Have the n-th call from here on (from 1) fail."""
        self.calls, self.failing, self.error = 0, call, error

    def off(self) -> None:
        """Have none of them fail."""
        self.failing = 0

    def _concerns(self, directory: Path, arguments: tuple[Any, ...]) -> bool:
        try:
            file = arguments[0]
            path = Path(f"/proc/self/fd/{file}").readlink() if isinstance(file, int) else Path(os.fspath(file))
        except (OSError, TypeError, IndexError):
            return False
        return path.is_relative_to(directory)


def spread(count: int, at_most: int) -> list[int]:
    """Numbers from 1 to `count`, the first and the last among them."""
    if count <= at_most:
        return list(range(1, count + 1))
    return sorted({1 + (count - 1) * i // (at_most - 1) for i in range(at_most)})


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@contextmanager
def unreadable(monkeypatch: pytest.MonkeyPatch, directory: Path, call: int, error: int | None) -> Iterator[list[Path]]:
    """The n-th opening of a file below a directory fails, or where `error` is None gives one that cannot be read.

    Gives the files that were opened. Libraries that open files past Python are not seen.
    """
    opened: list[Path] = []
    original = builtins.open

    def opening(file: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(file, int) and Path(os.fspath(file)).is_relative_to(directory):
            opened.append(Path(file))
            if len(opened) == call:
                if error is not None:
                    raise os_error(error)
                return original(UNREADABLE, *arguments, **options)
        return original(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", opening)
        patch.setattr(io, "open", opening)
        yield opened


def at_moment(monkeypatch: pytest.MonkeyPatch, moment: str, change: Callable[[], object]) -> None:
    """Call `change` once, before a function of glmexport runs for the first time."""
    module, _, name = moment.rpartition(".")
    owner: Any = sys.modules[module]
    original, done = getattr(owner, name), []

    def changed(*arguments: Any, **options: Any) -> Any:
        if not done:
            done.append(change())
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, changed)


def stop_after_the_first_graph(checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ctrl-C when a graph is finished; what it leaves."""
    from glmexport import draft_writer

    noted, calls = threading.Event(), []
    add, lint = Journal.add, draft_writer.lint_graph

    def adding(self: Journal, *arguments: Any) -> None:
        add(self, *arguments)
        noted.set()

    def second(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            assert noted.wait(10)
            raise KeyboardInterrupt
        return lint(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", adding)
        patch.setattr(draft_writer, "lint_graph", second)
        assert split(checkpoint, output).status == 130
    return journal_of(output).parent
