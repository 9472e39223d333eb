"""`glmexport rm`."""

from __future__ import annotations

import click

from glmexport.cli import model_options


@click.command(name="rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@model_options.server_options
def command(names: tuple[str, ...], host: str | None, api_key: str | None, quiet: bool) -> None:
    """Forget models that `glmexport create` made. Their bundles stay where they are.

    \b
    Example:
      glmexport rm mario mario:before
    """
    server, store = model_options.running(host, api_key), model_options.store()
    for name in names:
        if server is not None:
            server.ask("DELETE", "/api/delete", {"model": name})
        elif not store.remove(name):
            raise model_options.no_model(name)
