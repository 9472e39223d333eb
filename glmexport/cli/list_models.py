"""`glmexport list`."""

from __future__ import annotations

from typing import Any

import click

from glmexport.cli import model_options, output


@click.command(name="list")
@model_options.server_options
def command(host: str | None, api_key: str | None, quiet: bool) -> None:
    """List the models: those of the running server, or where none runs those that `glmexport create` made.

    \b
    Examples:
      glmexport list
      glmexport list --host 192.168.0.5:11434
    """
    server = model_options.running(host, api_key)
    models = server.ask("GET", "/api/tags")["models"] if server else _created()
    if server is None:
        output.notifier(quiet)("No server runs; these are the created models.")
    listing = output.table("NAME", "ID", "SIZE", "MODIFIED", right=("SIZE",))
    for model in models:
        size, modified = model_options.bytes_in_words(model["size"]), model_options.ago(model["modified_at"])
        listing.add_row(output.cell(model["name"]), model["digest"][:12], size, modified)
    output.console().print(listing)


def _created() -> list[dict[str, Any]]:
    from datetime import UTC, datetime

    from glmexport.bundle import open_bundle
    from glmexport.errors import GlmExportError

    models = []
    for entry in model_options.store().list():
        try:
            size, digest = open_bundle(entry.bundle).total_bytes, entry.digest
        except GlmExportError:  # its bundle is gone; it is listed all the same, to be removed
            size, digest = None, "no bundle"
        modified = datetime.fromtimestamp(entry.modified, UTC).isoformat()
        models.append({"name": entry.name, "digest": digest, "size": size, "modified_at": modified})
    return models
