"""`glmexport inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from glmexport import names
from glmexport.cli import output
from glmexport.errors import GlmExportError
from glmexport.sizes import size_in_words


@click.command(name="inspect")
@click.argument("target")
@output.revision_option
@click.option("--check", is_flag=True, help="Compare every file of a bundle with the SHA-256 in its manifest.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@output.quiet_option
def command(target: str, revision: str | None, check: bool, as_json: bool, quiet: bool) -> None:
    """Show what TARGET, a bundle, a checkpoint directory or a hub id, holds: parts, parameters, bytes, dtypes.

    Reads headers and the manifest only, never a tensor; with --check every byte of a bundle, and the exit status is 1
    if a file is missing, damaged or not the bundle's.

    \b
    Examples:
      glmexport inspect chatglm-6b/
      glmexport inspect bundle/ --json
      glmexport inspect bundle/ --check
    """
    from glmexport.bundle import looks_like_bundle
    from glmexport.inventory import bundle_inventory

    is_bundle = looks_like_bundle(Path(target))
    if check and not is_bundle:
        raise GlmExportError(f"{target} has no {names.MANIFEST} to compare files with; --check is for bundles.")
    summary = bundle_inventory(Path(target)) if is_bundle else _checkpoint(target, revision, quiet)
    if check:
        summary["check"] = _check(Path(target), quiet)
    if as_json:
        output.write_json("-", summary)
    else:
        _print(summary)
    if check and summary["check"]["bad"]:
        sys.exit(1)


def _check(directory: Path, quiet: bool) -> dict[str, Any]:
    """How many files were checked, and file and complaint of each that is not what the manifest says."""
    from glmexport.bundle import check_files, open_bundle

    bundle = open_bundle(directory)
    bad = []
    with output.progress(quiet, bundle.total_bytes, "checked") as advance:
        for name, complaint in check_files(bundle):
            advance(name, bundle.files[name].bytes if name in bundle.files else 0)
            if complaint is not None:
                bad.append({"file": name, "complaint": complaint})
    return {"checked": len(bundle.files), "bad": bad}


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
        if key not in ("parts", "check"):
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
            output.cell(part["dtypes"]),
        )
    totals = [sum(part[key] for part in summary["parts"]) for key in ("parameters", "bytes")]
    listing.add_row("total", f"{totals[0]:,}", f"{totals[1]:,}", size_in_words(totals[1]), style="bold")
    console.print(listing)
    if "check" in summary:
        for entry in (bad := summary["check"]["bad"]):
            console.print(f"[bold red]BAD[/] {output.cell(entry['complaint'])}", soft_wrap=True)
        count = f"All {summary['check']['checked']} files are whole: each is as the manifest says."
        console.print(f"{len(bad)} bad files: copy or make the bundle again." if bad else count)
