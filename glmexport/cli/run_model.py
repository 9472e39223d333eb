"""`glmexport run`."""

from __future__ import annotations

from typing import Any

import click

from glmexport.cli import cached_bundle, output, run_options, talk


@click.command(name="run")
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--verbose", is_flag=True, help="Tokens a second and memory after every answer.")
@output.revision_option
@run_options.session_options
@output.quiet_option
def command(model: str, prompt: str | None, verbose: bool, revision: str | None, quiet: bool, **options: Any) -> None:
    """Chat with MODEL: a name, a bundle, a checkpoint's directory or a hub id. With PROMPT, answer that and end.

    Of a checkpoint an int4 bundle is made, once, in $GLMEXPORT_HOME (~/.glmexport). How the model is asked is what its
    Modelfile and its generation_config.json say; `glmexport chat` has options for it.

    \b
    Examples:
      glmexport run mario
      glmexport run zai-org/chatglm-6b --verbose
      glmexport run int4/ "12+34="
    """
    from glmexport.conversation import Conversation
    from glmexport.serve.defaults import options_of, read_generation_config
    from glmexport.serve.prompts import begun_chat

    bundle, modelfile = cached_bundle.model_of(model, revision, quiet=quiet)
    chosen = options_of(read_generation_config(bundle), modelfile.parameters)
    system, history = begun_chat(modelfile.system, modelfile.messages)
    with run_options.open_session(bundle, options, quiet=quiet) as session:
        chat = Conversation(
            session,
            sampling=chosen.sampling,
            max_tokens=chosen.max_tokens,
            stop=chosen.stop,
            history=history,
            system=system,
        )
        _ = session.tokenizer  # a bundle without one is refused before anything is loaded
        run_options.load(session, quiet=quiet)
        if prompt is not None:
            talk.answer(chat, prompt, verbose=verbose)
            return
        talk.greet(model, session)
        talk.talk(chat, verbose=verbose)
