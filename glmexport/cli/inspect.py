"""`glmexport inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from glmexport.cli import output
from glmexport.sizes import size_in_words


@click.command(name="inspect")
@click.argument("target")
@output.revision_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@output.quiet_option
def command(target: str, revision: str | None, as_json: bool, quiet: bool) -> None:
    """Show what TARGET, a bundle, a checkpoint directory or a hub id, holds: parts, parameters, bytes, dtypes.

    Reads headers and the manifest only, never a tensor.

    \b
    Examples:
      glmexport inspect chatglm-6b/
      glmexport inspect bundle/ --json
    """
    from glmexport.bundle import looks_like_bundle

    summary = _bundle(Path(target)) if looks_like_bundle(Path(target)) else _checkpoint(target, revision, quiet)
    if as_json:
        output.write_json("-", summary)
    else:
        _print(summary)


def _bundle(directory: Path) -> dict[str, Any]:
    from glmexport.inventory import bundle_inventory

    return bundle_inventory(directory)


def _checkpoint(target: str, revision: str | None, quiet: bool) -> dict[str, Any]:
    from glmexport.checkpoint import open_checkpoint
    from glmexport.inventory import checkpoint_inventory

    with open_checkpoint(target, revision) as checkpoint:
        for warning in checkpoint.warnings:
            output.notifier(quiet)(warning)
        return checkpoint_inventory(checkpoint)


def _print(summary: dict[str, Any]) -> None:
    console = output.console()
    for key, value in summary.items():
        if key != "parts":
            items = [f"{name} {item}" for name, item in value.items()] if isinstance(value, dict) else value
            text = ", ".join(items) if isinstance(items, list) else items
            console.print(f"{key:<14}{text}", markup=False)
    listing = output.table("part", "parameters", "bytes", "", "dtypes", right=("parameters", "bytes", ""))
    for part in summary["parts"]:
        listing.add_row(
            part["name"],
            f"{part['parameters']:,}",
            f"{part['bytes']:,}",
            size_in_words(part["bytes"]),
            escape(part["dtypes"]),
        )
    totals = [sum(part[key] for part in summary["parts"]) for key in ("parameters", "bytes")]
    listing.add_row("total", f"{totals[0]:,}", f"{totals[1]:,}", size_in_words(totals[1]), style="bold")
    console.print(listing)
