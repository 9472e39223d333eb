"""`glmexport embed`."""

from __future__ import annotations

from pathlib import Path

import click

from glmexport.cli import derived, output
from glmexport.cli.pass_options import EMBEDDINGS, embed_pass, rounding_option
from glmexport.form import SHARED


@click.command(name="embed")
@derived.bundle_arguments
@click.option(
    "--dtype",
    type=click.Choice([*EMBEDDINGS, SHARED]),
    default="bf16",
    show_default=True,
    help="Of the rows; shared: no file at all, rows are read from the quantized LM head of a tied checkpoint.",
)
@rounding_option
@output.quiet_option
def command(bundle: Path, target: Path, force: bool, copy: bool, dtype: str, rounding: str | None, quiet: bool) -> None:
    """Replace BUNDLE's embedding graph by a raw file of rows, which a runtime reads by seek or memory map.

    The file is word_embeddings_<dtype>.bin (slim_… after slimming): little-endian, row-major [vocab, hidden].

    \b
    Examples:
      glmexport embed bundle/ -o bf16/
      glmexport embed bundle/ -o bf16/ --rounding truncate
      glmexport embed int4/ -o small/ --dtype shared
    """
    step = embed_pass(dtype, rounding)
    written = derived.write(bundle, lambda draft: step, target, force=force, copy=copy, quiet=quiet)
    click.echo(f"{target}: {derived.embedding_in_words(written)}{derived.sizes(bundle, target)}")
