"""`glmexport chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glmexport.cli import interrupt, output, run_options
from glmexport.errors import GlmExportError

if TYPE_CHECKING:
    from glmexport.conversation import Conversation

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


@click.command(name="chat")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--history", "history_file", type=click.Path(path_type=Path), help="Go on with a chat that /save wrote.")
@run_options.generation_options
@output.quiet_option
def command(bundle: Path, history_file: Path | None, quiet: bool, **options: Any) -> None:
    """Chat with BUNDLE in the terminal, with the model's own prompt format and history.

    Lines of a pipe are asked one after another; status 2 if one could not be. /help lists the commands, /exit or Ctrl-D
    ends.

    \b
    Examples:
      glmexport chat int4/
      glmexport chat int4/ --greedy --memory-limit 2GB
      printf '你好\\n12+34=\\n' | glmexport chat int4/ --greedy
    """
    from glmexport.conversation import Conversation, read_history
    from glmexport.inventory import form_in_words

    sampling = run_options.sampling_of(options)
    with run_options.open_session(bundle, options, quiet=quiet) as session:
        if options["dry_run"]:
            run_options.print_plan(session)
            return
        history = () if history_file is None else read_history(history_file)
        keys = ("max_tokens", "stop")
        chat = Conversation(session, sampling=sampling, history=history, **{key: options[key] for key in keys})
        _ = session.tokenizer  # a bundle without one is refused before anything is loaded
        run_options.load(session, quiet=quiet)
        if sys.stdin.isatty():
            import readline  # noqa: F401  (gives input() a line to edit and a history)

            output.console().print(
                f"[bold]{output.cell(bundle.name)}[/], {form_in_words(session.bundle)}. /help lists commands."
            )
        if not _talk(chat) and not sys.stdin.isatty():
            sys.exit(2)  # who asked is not there to have seen it


def _talk(chat: Conversation) -> bool:
    """Read, answer, repeat; whether everything could be done."""
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
                _answer(chat, line)
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


def _answer(chat: Conversation, query: str) -> None:
    """Show an answer as it comes; Ctrl-C stops it."""
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
