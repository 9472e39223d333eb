"""A chat in the terminal: lines are read, answers shown as they come, and a few commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmexport.cli import interrupt, output, run_options
from glmexport.errors import GlmExportError

if TYPE_CHECKING:
    from glmexport.conversation import Conversation
    from glmexport.session import Session

PROMPT = "> "
HELP = """\
/help          this list
/history       the rounds so far
/reset         forget them
/save FILE     write them as JSON; `glmexport chat … --history FILE` goes on with them
/stats         speed and memory of the latest answer
/exit          end, as Ctrl-D does
Ctrl-C         stop an answer
Any other line is asked, by itself."""


def greet(name: str, session: Session) -> None:
    """Say what answers, where somebody sits at a terminal."""
    from glmexport.inventory import form_in_words

    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() a line to edit and a history)

        form = form_in_words(session.bundle)
        output.console().print(f"[bold]{output.cell(name)}[/], {form}. /help lists commands.")


def talk(chat: Conversation, *, verbose: bool = False) -> None:
    """Read, answer, repeat; ends the process with 2 where what a pipe asked could not be answered.

    verbose: statistics after every answer.
    """
    if not _talk(chat, verbose) and not sys.stdin.isatty():
        sys.exit(2)  # who asked is not there to have seen it


def answer(chat: Conversation, query: str, *, verbose: bool = False) -> None:
    """Show an answer as it comes; Ctrl-C stops it. Raises GlmExportError."""
    pieces = chat.ask(query)
    try:
        for piece in pieces:
            click.echo(output.printable(piece), nl=False)
            interrupt.check()
    except KeyboardInterrupt:
        interrupt.forget()
        pieces.close()
        click.echo(" (stopped)", nl=False)
    click.echo()
    if verbose and chat.latest:
        click.echo(run_options.stats_in_words(chat.latest), err=True)


def _talk(chat: Conversation, verbose: bool) -> bool:
    """Whether everything could be done."""
    all_done = True
    while True:
        try:
            line = _read_line()
        except EOFError:
            break
        except KeyboardInterrupt:
            interrupt.forget()
            click.echo("\nCtrl-D or /exit ends the chat.")
            continue
        try:
            if line.startswith("/"):
                if not _command(chat, line):
                    break
            elif line:
                answer(chat, line, verbose=verbose)
        except GlmExportError as error:
            all_done = False
            click.secho(f"{error}", err=True, fg="red", color=output.colour())
    return all_done


def _read_line() -> str:
    """The next line, shown where it came from a pipe. Raises EOFError at the end."""
    if sys.stdin.isatty():
        return input(PROMPT).strip()
    data = sys.stdin.buffer.readline()
    if not data:
        raise EOFError
    line = run_options.utf8(data).strip()
    click.echo(f"{PROMPT}{line}")
    return line


def _command(chat: Conversation, line: str) -> bool:
    """Run a command of the chat; false where it ends it. Raises GlmExportError."""
    word, _, argument = line.partition(" ")
    commands: dict[str, Callable[[], object]] = {
        "/help": lambda: click.echo(HELP),
        "/history": lambda: _show_history(chat),
        "/reset": lambda: _reset(chat),
        "/save": lambda: _save(chat, argument.strip()),
        "/stats": lambda: click.echo(
            run_options.stats_in_words(chat.latest) if chat.latest else "Nothing was asked yet."
        ),
    }
    if word in ("/exit", "/quit"):
        return False
    if word not in commands:
        raise GlmExportError(f"There is no {word}; /help lists the commands.")
    commands[word]()
    return True


def _show_history(chat: Conversation) -> None:
    for query, answer in chat.history:
        click.echo(f"{click.style(PROMPT + query, bold=True)}\n{output.printable(answer)}", color=output.colour())
    if not chat.history:
        click.echo("The history is empty.")


def _reset(chat: Conversation) -> None:
    chat.history.clear()
    click.echo("The history is empty.")


def _save(chat: Conversation, name: str) -> None:
    if not name:
        raise GlmExportError("Give a file: /save chat.json")
    chat.save(Path(name))
    click.echo(f"{len(chat.history)} rounds in {name}")
