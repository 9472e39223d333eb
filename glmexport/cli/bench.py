"""`glmexport bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from glmexport.cli import output
from glmexport.sizes import size_in_words

if TYPE_CHECKING:
    from glmexport.bench import BenchReport


_PARAMETERS = {"past": "pasts", "prefill": "lengths", "plot": "plot"}


def _numbers(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    """`1,2,4` as numbers, in order, each once; nothing for an empty text."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isascii() and word.isdecimal() and 0 < int(word) < 1 << 20 for word in words):
        raise click.BadParameter(f"{text!r:.60} is no list of numbers from 1 up, such as 1,2,4.")
    return tuple(sorted({int(word) for word in words}))


@click.command(name="bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--past", "pasts", default="16,256,1024,1900", show_default=True, callback=_numbers, metavar="N,N",
              help="Tokens in the KV cache before the one that is decoded.")  # fmt: skip
@click.option("--batch", "batches", default="1,2,4,8", show_default=True, callback=_numbers, metavar="N,N",
              help="Rows that are decoded at once.")  # fmt: skip
@click.option("--prefill", "lengths", default="16,64,256,1024", show_default=True, callback=_numbers, metavar="N,N",
              help="Tokens of the prompts.")  # fmt: skip
@click.option(
    "--serve", is_flag=True, help="Measure tokens a second by rows at once instead, as `serve` computes them."
)
@click.option("--flavor", type=click.Choice(["portable", "ort"]), help="Of the graphs.  [default: ort where there is]")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Of each graph.  [default: one a core]")
@click.option("--json", "json_file", metavar="FILE", help="Also write the figures as JSON; - is stdout, no table.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Also draw it (needs matplotlib).")
@output.quiet_option
def command(
    bundle: Path,
    pasts: tuple[int, ...],
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    serve: bool,
    flavor: str | None,
    threads: int | None,
    json_file: str | None,
    plot: Path | None,
    quiet: bool,
) -> None:
    """Measure how fast BUNDLE runs, beside the least that this computer's memory allows.

    The bound of a step is the time in which its weights and KV cache are read once, at the bandwidth that was measured
    between its runs (GB/s). Load time, first token and peak memory (with 1024 tokens of history) are those of a process
    of its own. Close other programs first: they use the same memory.

    \b
    Examples:
      glmexport bench fast/
      glmexport bench fast/ --batch 1 --past 1024 --prefill "" --flavor portable
      glmexport bench fast/ --json bench.json --plot bench.png
      glmexport bench fast/ --serve
    """
    if json_file not in (None, "-"):
        output.demand_writable(Path(str(json_file)), apart_from=bundle)
    if serve:
        source = click.get_current_context().get_parameter_source
        useless = [name for name in ("past", "prefill", "plot") if source(_PARAMETERS[name]) != ParameterSource.DEFAULT]
        if useless:
            raise click.UsageError(f"--serve measures rows of --batch alone; leave --{useless[0]} out, or --serve.")
        if not batches:
            raise click.UsageError("--serve measures some numbers of rows, and --batch has none.")
    if serve:
        _show_throughput(bundle, batches, flavor, threads, json_file)
        return
    from glmexport.bench import BenchOptions, bench, plot_bench, progress_total
    from glmexport.plotting import demand_matplotlib

    if plot is not None:
        demand_matplotlib()
        output.demand_writable(plot, apart_from=bundle, suffix=".png")
    options = BenchOptions(pasts, batches, lengths, flavor, threads)
    with output.progress(quiet, progress_total(options), "measured") as advance:
        report = bench(bundle, options, advance)
    for row in report.left_out:
        output.notifier(quiet)(f"Left out: {row}.")
    if json_file is not None:
        output.write_json(json_file, report.as_json())
    if json_file != "-":
        show(report)
    if plot is not None:
        plot_bench(report, plot)


def _show_throughput(
    bundle: Path, rows: tuple[int, ...], flavor: str | None, threads: int | None, json_file: str | None
) -> None:
    import dataclasses

    from glmexport.prompt import sample_prompt
    from glmexport.serve.rows import open_rows
    from glmexport.serve.throughput import PROMPT_TOKENS, in_words, throughput
    from glmexport.session import Session

    runner = open_rows(Session(bundle, flavor=flavor, threads=threads), max(rows, default=1))
    try:
        points = throughput(runner, sample_prompt(runner.config, PROMPT_TOKENS), rows=rows)
    finally:
        runner.close()
    if json_file is not None:
        document = {
            "bundle": str(bundle),
            "serve": [{**dataclasses.asdict(p), "tokens_per_s": p.speed} for p in points],
        }
        output.write_json(json_file, document)
    if json_file != "-":
        for line in in_words(points):
            click.echo(line)


def show(report: BenchReport) -> None:
    """Print the figures."""
    console = output.console()
    right = ("rows", "past", "tokens", "ms", "bound", "x bound", "tokens/s", "GB/s")
    listing = output.table("", *right, right=right)
    for row in report.rows:
        cells = (row.batch, row.past, row.length, f"{row.ms:.1f}", f"{row.bound_ms:.1f}", f"{row.ratio:.2f}")
        listing.add_row(row.kind, *map(str, cells), f"{row.tokens_per_s:.1f}", f"{row.bandwidth_gb_s:.0f}")
    console.print(listing)
    start = report.start
    held = start.peak_rss_bytes / (report.weight_bytes + start.kv_bytes)
    console.print(
        f"{report.flavor}: weights {size_in_words(report.weight_bytes)}, memory read at {report.bandwidth / 1e9:.1f} "
        f"GB/s; loaded in {start.load_s:.1f} s, first token after {start.first_token_s:.1f} s, at most "
        f"{size_in_words(start.peak_rss_bytes)} of memory, {held:.2f} x weights and KV cache",
        soft_wrap=True,
        markup=False,
    )
