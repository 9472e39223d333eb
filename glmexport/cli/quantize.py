"""`glmexport quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glmexport.cli import derived, output
from glmexport.cli.pass_options import affine_of_options, quantization_form, quantize_options, quantize_pass
from glmexport.errors import RecipeError
from glmexport.sizes import parse_size, size_in_words

if TYPE_CHECKING:
    from glmexport.draft import BundleDraft
    from glmexport.passes import Pass

FEW_MATRICES = 24
"""Up to so many matrices each is printed; of more, the worst of each kind."""


@click.command(name="quantize")
@derived.bundle_arguments
@click.option("--bits", metavar="8|4", help="Bits of the blocks' matrices.")
@quantize_options
@click.option("--auto", is_flag=True, help="Choose int8 for the matrices where it helps most, int4 for the others.")
@click.option("--target-size", metavar="SIZE", help="With --auto: the most the bundle may take, such as 3.2GB.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Also write the report as JSON; - is stdout, without the table."
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Also draw it (needs matplotlib).")
@click.option("--all", "all_rows", is_flag=True, help="Print every matrix, however many there are.")
@output.quiet_option
def command(
    bundle: Path,
    target: Path,
    force: bool,
    copy: bool,
    bits: str | None,
    auto: bool,
    target_size: str | None,
    json_file: str | None,
    plot: Path | None,
    all_rows: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Store BUNDLE's matrices (four in each block, and the LM head) as 8- or 4-bit integers with scales.

    Weight-only and without data: the scale of each group of weights is searched for the least squared error. The report
    says what became of each matrix, and recipe.toml in the new bundle how it was asked for.

    \b
    Examples:
      glmexport quantize bundle/ -o int4/ --bits 4
      glmexport quantize bundle/ -o int8/ --bits 8 --group-size 128 --plot int8.png
      glmexport quantize bundle/ -o mixed/ --recipe mixed.toml
      glmexport quantize bundle/ -o best/ --auto --target-size 3.2GB
    """
    from glmexport.bundle import open_bundle
    from glmexport.plotting import demand_matplotlib
    from glmexport.quantize_report import plot_report, quantize_report

    if plot is not None:
        demand_matplotlib()
        output.demand_writable(plot, apart_from=target, suffix=".png")
    if json_file not in (None, "-"):
        output.demand_writable(Path(str(json_file)), apart_from=target)
    _check_auto(auto, target_size, bits, options)

    def make_pass(draft: BundleDraft) -> Pass:
        if target_size is not None:
            return _auto_pass(draft, target_size, options, quiet)
        return quantize_pass(bits, options, draft.config.num_blocks)

    derived.write(bundle, make_pass, target, force=force, copy=copy, quiet=quiet)
    report = quantize_report(open_bundle(bundle), open_bundle(target))
    if json_file is not None:
        output.write_json(json_file, report)
    if json_file != "-":
        show_report(report, all_rows=all_rows)
    if plot is not None:
        plot_report(report, plot)


def show_report(report: dict[str, Any], *, all_rows: bool = False) -> None:
    """Print what became of each matrix, or of many the worst of each kind, and the sizes."""
    console = output.console()
    right = ("bits", "group", "bytes", "relative error", "cosine")
    listing = output.table("graph", "matrix", *right, "method", right=right)
    matrices = report["matrices"]
    shown = matrices if all_rows or len(matrices) <= FEW_MATRICES else _worst_of_each_kind(matrices)
    for row in shown:
        listing.add_row(
            output.cell(row["graph"]),
            output.cell(row["name"]),
            str(row["bits"]),
            str(row["group_size"]),
            f"{row['bytes']:,}",
            "" if row["relative_error"] is None else f"{row['relative_error']:.3e}",
            "" if row["cosine"] is None else f"{row['cosine']:.6f}",
            row["method"] if row["symmetric"] else f"{row['method']}, asymmetric",
        )
    console.print(listing)
    if len(shown) < len(matrices):
        console.print(f"The worst of each kind of {len(matrices)} matrices; --all prints every one.")
    before = f"{size_in_words(report['bytes_before'])} -> " if report["bytes_before"] else ""
    parts = ", ".join(f"{part} {size_in_words(count)}" for part, count in report["parts"].items() if count)
    console.print(f"{report['bundle']}: {before}{size_in_words(report['bytes'])} ({parts})", markup=False)


def _worst_of_each_kind(matrices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    worst: dict[tuple[str, int], dict[str, Any]] = {}
    for row in matrices:
        key = (row["name"].replace(f".{row['block_id']}.", ".*.", 1), row["bits"])
        held = worst.setdefault(key, row)
        if (row["relative_error"] or 0) > (held["relative_error"] or 0):
            worst[key] = row
    return list(worst.values())


def _check_auto(auto: bool, target_size: str | None, bits: str | None, options: dict[str, Any]) -> None:
    """Raise RecipeError where `--auto` lacks its size or is given with what it chooses by itself."""
    if auto is not (target_size is not None):
        raise RecipeError("--auto and --target-size go together: --auto --target-size 3.2GB.")
    if auto and (bits or options["recipe"] or options["lm_bits"]):
        raise RecipeError("--auto chooses the bits by itself; leave out --bits, --lm-bits and --recipe.")


def _auto_pass(draft: BundleDraft, target_size: str, options: dict[str, Any], quiet: bool) -> Pass:
    from glmexport.passes.choose_bits import choose_recipe
    from glmexport.passes.quantize_weights import QuantizePass, matrices_of

    form = quantization_form(options)
    int4, int8 = (affine_of_options(bits, options) for bits in (4, 8))
    total = sum(4 * matrix.shape[0] * matrix.shape[1] for _, matrix in matrices_of(draft))
    with output.progress(quiet, total, "measured") as advance:
        recipe = choose_recipe(draft, parse_size(target_size), int4, int8, form, advance)
    return QuantizePass(recipe, form)
