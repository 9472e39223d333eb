"""What the commands that make a bundle from a bundle share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glmexport import names
from glmexport.cli import output
from glmexport.sizes import size_in_words

if TYPE_CHECKING:
    from glmexport.draft import BundleDraft
    from glmexport.passes import Pass


def bundle_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """BUNDLE, `-o`, `--force` and `--copy`."""
    options = (
        click.argument("bundle", type=click.Path(path_type=Path)),
        click.option(
            "-o", "--output", "target", required=True, type=click.Path(path_type=Path), help="Directory to make."
        ),
        click.option("--force", is_flag=True, help="Replace an existing bundle, or an empty directory."),
        click.option(
            "--copy",
            is_flag=True,
            help="Copy unchanged files instead of hard-linking them: onnx's Python loader refuses linked data files.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def write(
    bundle: Path, make_pass: Callable[[BundleDraft], Pass], target: Path, *, force: bool, copy: bool, quiet: bool
) -> BundleDraft:
    """Run one pass from a bundle directory to another, with progress, and return what was written."""
    from glmexport.bundle import open_bundle
    from glmexport.derive import derive, derive_total

    if not target.name:
        raise click.BadParameter("the name of a directory to make is needed.", param_hint="--output")
    opened = open_bundle(bundle)
    with output.progress(quiet, derive_total(opened), "of the bundle") as advance:
        return derive(opened, make_pass, target, force=force, copy=copy, notice=output.notifier(quiet), advance=advance)


def vocabulary_sizes(bundle: Path, written: BundleDraft) -> tuple[int, int]:
    """Rows before and after."""
    slim = written.form.slim
    return (slim.vocabulary.full_size if slim else written.config.vocab_size), written.config.vocab_size


def embedding_in_words(written: BundleDraft) -> str:
    """The embedding's file and the error of its rounding, once it was written."""
    from glmexport.form import RAW_DTYPES

    name = written.form.embedding_file
    if name is None:
        head = written.graph(names.HEAD)
        (record,) = [dict(record()) for record in head.matrices.values()] if head else [{}]
        error = record.get("relative_error")
        known = "" if error is None else f", relative error {error:.2e}"
        return f"the embedding is the LM head's int{record.get('bits')} rows{known}"
    form = written.form.embedding
    error = getattr(written.files[name], "relative_error", None)
    rounding = f", rounded {form.rounding}" if form.dtype == "bfloat16" else ""
    return f"{name}, {RAW_DTYPES[form.dtype].word}{rounding}, relative error {error:.3e}"


def sizes(before: Path, after: Path) -> str:
    """`, 1.7 MB -> 1.1 MB`."""
    return f", {size_in_words(_bytes(before))} -> {size_in_words(_bytes(after))}"


def _bytes(bundle: Path) -> int:
    from glmexport.bundle import open_bundle

    return open_bundle(bundle).total_bytes
