"""`glmexport slim`."""

from __future__ import annotations

from pathlib import Path

import click

from glmexport.cli import derived, output
from glmexport.cli.pass_options import slim_options, slim_pass


@click.command(name="slim")
@derived.bundle_arguments
@slim_options
@output.quiet_option
def command(
    bundle: Path, target: Path, force: bool, copy: bool, keep: Path | None, corpus: tuple[Path, ...], quiet: bool
) -> None:
    """Drop rows of the vocabulary from BUNDLE's embedding and LM head: the image tokens, or all but a chosen set.

    Special ids and the tokenizer are renumbered, the map from old to new ids is in the manifest, and slim_vocab.txt has
    one piece a line in id order. A checkpoint without image tokens is linked as it is.

    \b
    Examples:
      glmexport slim bundle/ -o slim/
      glmexport slim bundle/ -o chinese/ --corpus dialogues.txt --corpus manual.txt
    """
    step = slim_pass(keep, corpus)
    written = derived.write(bundle, lambda draft: step, target, force=force, copy=copy, quiet=quiet)
    before, after = derived.vocabulary_sizes(bundle, written)
    click.echo(f"{target}: {after} of {before} rows kept{derived.sizes(bundle, target)}")
