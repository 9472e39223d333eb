"""`glmexport verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmexport.cli import output

if TYPE_CHECKING:
    from glmexport.bundle import Bundle
    from glmexport.checkpoint import Checkpoint
    from glmexport.verify import Report

FEW_GRAPHS = 10
"""Up to so many graphs every row is printed; of more, each graph's worst row and every failure."""


@click.command(name="verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("checkpoint")
@output.revision_option
@click.option(
    "--json", "json_file", metavar="FILE", help="Also write the report as JSON; - is stdout, without the table."
)
@click.option(
    "--steps", type=click.IntRange(1, 64), default=4, show_default=True, help="Tokens generated after each prompt."
)
@click.option("--all", "all_rows", is_flag=True, help="Print every row, however many graphs there are.")
@output.quiet_option
def command(
    bundle: Path, checkpoint: str, revision: str | None, json_file: str | None, steps: int, all_rows: bool, quiet: bool
) -> None:
    """Prove BUNDLE equal to the unpatched PyTorch reference of CHECKPOINT.

    First every file's size and SHA-256 and the rules of the graphs; then each graph by itself on onnxruntime (several
    lengths, real past, left-padded batch, infilling, the model's last positions), its weights bit for bit, and the
    whole chain with greedy tokens. One block is in memory at a time. Exit status 1 if anything fails. A bundle for MNN
    is run by MNN, in normal and low memory mode.

    A float16 bundle is held to twice the error of the reference in float16, and each block's headroom says how many
    times larger its largest number might be before float16 overflows.

    \b
    Examples:
      glmexport verify bundle/ chatglm-6b/
      glmexport verify bundle/ chatglm-6b/ --json report.json -q
    """
    from glmexport.bundle import open_bundle
    from glmexport.checkpoint import open_checkpoint

    opened = open_bundle(bundle)
    with open_checkpoint(checkpoint, revision) as source:
        if not run_verify(opened, source, quiet=quiet, steps=steps, json_file=json_file, all_rows=all_rows):
            sys.exit(1)


def run_verify(
    bundle: Bundle,
    checkpoint: Checkpoint,
    *,
    quiet: bool,
    steps: int = 4,
    json_file: str | None = None,
    all_rows: bool = False,
) -> bool:
    """Verify, print the report, and say whether it passed."""
    from glmexport.verify import progress_total, verify

    with output.progress(quiet, progress_total(bundle, steps), "of the checks") as advance:
        report = verify(bundle, checkpoint, steps=steps, advance=lambda what: advance(what, 1))
    if json_file is not None:
        output.write_json(json_file, report.as_json())
    if json_file != "-":
        _print_report(report, all_rows or len(bundle.graphs) <= FEW_GRAPHS)
    return report.passed


def _print_report(report: Report, all_rows: bool) -> None:
    console = output.console()
    listing = output.table(
        "graph", "case", "max abs error", "relative error", "verdict", "", right=("max abs error", "relative error")
    )
    for row in report.rows if all_rows else report.worst_rows():
        numbers = ["" if error is None else f"{error:.2e}" for error in (row.max_abs_error, row.relative_error)]
        verdict = "[green]ok[/]" if row.passed else "[bold red]FAIL[/]"
        listing.add_row(output.cell(row.graph), row.case, *numbers, verdict, output.cell(row.detail))
    console.print(listing)
    equal, total = report.greedy
    tokens = f"greedy tokens {equal}/{total}, " if total else ""
    if report.passed:
        console.print(f"[green]PASS[/] {len(report.rows)} checks, {tokens}worst absolute error {report.worst:.2e}")
    else:
        console.print(f"[bold red]FAIL[/] {len(report.failures)} of {len(report.rows)} checks, {tokens}see above")
