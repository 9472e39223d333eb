"""What every command shows in the same way: notices, sizes, tables, progress, JSON files."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from glmexport import errors
from glmexport.cli import interrupt
from glmexport.errors import GlmExportError

PLAIN_WIDTH = 160
"""Columns of a table that goes to a file or pipe, where no terminal says how many there are."""

PLAIN_STEP = 5
"""Percent between two lines of progress where there is no terminal."""

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tab and newline."""

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def quiet_option(function: FunctionT) -> FunctionT:
    """The `-q` option that every command has."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress and no notices on stderr.")(function)


def revision_option(function: FunctionT) -> FunctionT:
    """The `--revision` option of every command that takes a checkpoint."""
    text = "Branch, tag or commit, where CHECKPOINT is a hub id such as zai-org/chatglm-6b."
    return click.option("--revision", metavar="REV", help=text)(function)


def colour() -> bool | None:
    """False where NO_COLOR is set; None: as the terminal can, which is what click takes it to mean."""
    return False if os.environ.get("NO_COLOR") else None


def printable(text: str) -> str:
    """A model's text for whoever reads: on a terminal, control characters are shown and not obeyed."""
    return _CONTROL.sub(lambda match: repr(match.group())[1:-1], text) if sys.stdout and sys.stdout.isatty() else text


def cell(text: str) -> str:
    """A name or sentence that a file may have a part in, for a table: nothing in it is obeyed."""
    return escape(errors.printable(text))


def console() -> Console:
    """Results go to stdout; colours follow the terminal and NO_COLOR."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def notifier(quiet: bool) -> Callable[[str], None]:
    """A function that shows one notice on stderr."""

    def notify(message: str) -> None:
        if not quiet:
            coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
            # print, not click.echo: a progress bar stands in for sys.stderr to keep notices above itself
            word = click.style("Note:", fg="yellow") if coloured else "Note:"
            print(f"{word} {errors.printable(message)}", file=sys.stderr)

    return notify


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns in `right` hold numbers."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return result


def demand_writable(path: Path, *, apart_from: Path, suffix: str | None = None) -> None:
    """Raise GlmExportError where a report could not be written to `path`, before the long work that it is about.

    apart_from: a bundle, whose directory holds nothing but what its manifest lists.
    """
    folder, bundle = path.absolute().parent, apart_from.absolute()
    if suffix is not None and path.suffix.lower() != suffix:
        raise GlmExportError(f"{path} does not end in {suffix}, which is what is written; choose another name.")
    if bundle in (folder, *folder.parents):
        raise GlmExportError(f"{path} lies in the bundle {apart_from}, which would not be whole; choose another place.")
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise GlmExportError(f"{path} could not be written: {folder} is no directory to write in; choose another file.")


def write_json(target: str, document: Any) -> None:
    """Write a document as JSON to a file, or to stdout for `-`. Raises GlmExportError where that fails."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if target == "-":
        click.echo(text, nl=False)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise GlmExportError(f"{target} could not be written ({error.strerror}); choose another file.") from error


@contextmanager
def progress(quiet: bool, total: int, unit: str) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr; where stderr is no terminal, a plain line every few percent.

    Gives a function that takes a description and a step (in `unit`s, of `total`).
    """
    with _bar(quiet, total, unit) as show:

        def advance(what: str, step: int) -> None:
            interrupt.check()
            show(what, step)

        yield advance


@contextmanager
def _bar(quiet: bool, total: int, unit: str) -> Iterator[Callable[[str, int], None]]:
    if quiet:
        yield lambda what, step: None
        return
    if not sys.stderr.isatty():
        done, shown = 0, -PLAIN_STEP

        def advance(what: str, step: int) -> None:
            nonlocal done, shown
            percent = min(100 * done // max(total, 1), 100)
            if percent >= shown + PLAIN_STEP:
                click.echo(f"[{percent:3d}%] {what}", err=True)
                shown = percent
            done += step

        yield advance
        return
    columns = (
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn(f"[dim]{unit}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, step: bar.update(task, description=what, advance=step)


@contextmanager
def resumable() -> Iterator[None]:
    """Say, where a run that ends early leaves something to go on with, how."""
    from glmexport.bundle_writer import KEPT

    try:
        yield
    except BaseException as error:
        if KEPT in getattr(error, "__notes__", ()):
            words = [word for word in sys.argv[1:] if word != "--resume"]
            command = shlex.join(["glmexport", *words, "--resume"])
            newline = "\n" * isinstance(error, KeyboardInterrupt)  # the terminal has shown ^C
            click.echo(f"{newline}Note: The finished graphs are kept; go on with: {command}", err=True)
        raise
