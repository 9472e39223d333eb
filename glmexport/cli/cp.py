"""`glmexport cp`."""

from __future__ import annotations

import click

from glmexport.cli import model_options


@click.command(name="cp")
@click.argument("source")
@click.argument("destination")
@model_options.server_options
def command(source: str, destination: str, host: str | None, api_key: str | None, quiet: bool) -> None:
    """Give the model SOURCE another name too. Nothing large is copied.

    \b
    Example:
      glmexport cp mario mario:before
    """
    server = model_options.running(host, api_key)
    if server is not None:
        server.ask("POST", "/api/copy", {"source": source, "destination": destination})
        return
    store = model_options.store()
    entry = store.get(source)
    if entry is None:
        raise model_options.no_model(source)
    store.copy(entry, destination)
