"""`glmexport stop`."""

from __future__ import annotations

import click

from glmexport.cli import model_options


@click.command(name="stop")
@click.argument("name")
@model_options.server_options
def command(name: str, host: str | None, api_key: str | None, quiet: bool) -> None:
    """Have the running server take the model NAME out of memory. It is loaded again when somebody asks it.

    \b
    Example:
      glmexport stop mario
    """
    model_options.demanded(host, api_key).ask("POST", "/api/generate", {"model": name, "keep_alive": 0})
