"""`glmexport chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from glmexport.cli import output, run_options, talk


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
        talk.greet(bundle.name, session)
        talk.talk(chat)
