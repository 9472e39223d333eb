"""`glmexport doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmexport.cli import output
from glmexport.sizes import size_in_words

if TYPE_CHECKING:
    from glmexport.doctor import FormReport, Report


@click.command(name="doctor")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--no-bandwidth", is_flag=True, help="Do not measure memory bandwidth, which takes about a second.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables; bytes, and bytes a second.")
@output.quiet_option
def command(bundle: Path | None, no_bandwidth: bool, as_json: bool, quiet: bool) -> None:
    """Show what this computer has, which forms of ChatGLM-6B (or of BUNDLE's model) it holds, and how fast at most.

    The bound is memory bandwidth over the bytes of blocks and LM head, which are read once a token. Forms that do not
    fit into memory are streamed from disk with --memory-limit.

    \b
    Examples:
      glmexport doctor
      glmexport doctor int4/
      glmexport doctor --json --no-bandwidth
    """
    from glmexport.bundle import open_bundle
    from glmexport.doctor import examine

    report = examine(None if bundle is None else open_bundle(bundle), bandwidth=not no_bandwidth)
    if as_json:
        import dataclasses

        output.write_json("-", dataclasses.asdict(report))
    else:
        _print(report)


def _print(report: Report) -> None:
    console, cpu, memory, model = output.console(), report.cpu, report.memory, report.model
    limit = "" if memory.limit is None else f" (a cgroup allows {size_in_words(memory.limit)})"
    yes = {True: "yes", False: "no", None: "unknown"}
    facts = {
        "system": report.system,
        "versions": ", ".join(f"{name} {found or 'not installed'}" for name, found in report.versions.items()),
        "processor": f"{cpu.model or 'unknown'}, {cpu.cores} usable cores",
        "features": ", ".join(f"{name} {yes[there]}" for name, there in cpu.features.items()) or "unknown",
        "memory": f"{_size(memory.total)}, {_size(memory.available)} available{limit}",
        "disk": f"{size_in_words(report.disk_free)} free in {report.disk_place}",
        "providers": ", ".join(report.providers) or "none",
        "MNN": "installed" if report.mnn else "not installed",
        "bandwidth": f"{report.bandwidth / 1e9:.1f} GB/s read from memory" if report.bandwidth else "not measured",
        "model": f"{model.num_blocks} blocks, hidden {model.hidden_size}, inner {model.inner_size}, vocabulary "
        f"{model.vocab_size}; KV cache {size_in_words(report.kv_cache)} at {model.max_positions} positions",
    }
    for name, text in facts.items():
        console.print(f"{name:<11}{text}", markup=False, soft_wrap=True)
    columns = ("on disk", "in memory", "read a token", "tokens/s at most")
    listing = output.table("form", *columns, "fits", right=columns)
    for form in report.forms:
        needs = form.needs
        sizes = [size_in_words(count) for count in (needs.disk, needs.memory, needs.per_token)]
        speed = "" if form.tokens_per_second is None else f"{form.tokens_per_second:,.1f}"
        listing.add_row(needs.name, *sizes, speed, _fits(form, report.memory_limit))
    console.print()
    console.print(listing)
    console.print()
    for sentence in report.advice:
        console.print(f"- {sentence}", markup=False, soft_wrap=True)


def _fits(form: FormReport, limit: int | None) -> str:
    """`yes`, `no: streams with --memory-limit 3.2GB`, `no`, `unknown`."""
    from glmexport.doctor import FITS, STREAMS, TOO_LARGE

    if form.verdict == STREAMS and limit:
        return f"no: streams with --memory-limit {limit / 1e9:.1f}GB"
    return {FITS: "yes", STREAMS: "no: streams", TOO_LARGE: "no"}.get(form.verdict, form.verdict)


def _size(count: int | None) -> str:
    return "unknown" if count is None else size_in_words(count)
