"""`glmexport ps`."""

from __future__ import annotations

import click

from glmexport.cli import model_options, output


@click.command(name="ps")
@model_options.server_options
def command(host: str | None, api_key: str | None, quiet: bool) -> None:
    """List the models that the running server has in memory.

    \b
    Example:
      glmexport ps
    """
    models = model_options.demanded(host, api_key).ask("GET", "/api/ps")["models"]
    listing = output.table("NAME", "ID", "SIZE", "CONTEXT", "UNTIL", right=("SIZE", "CONTEXT"))
    for model in models:
        size, until = model_options.bytes_in_words(model["size"]), model_options.ago(model["expires_at"])
        listing.add_row(output.cell(model["name"]), model["digest"][:12], size, str(model["context_length"]), until)
    output.console().print(listing)
