"""`glmexport eval`."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glmexport.cli import output, run_options
from glmexport.sizes import size_in_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from glmexport.evaluation import Example, Score
    from glmexport.session import Session


@click.command(name="eval")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Examples computed side by side.")
@click.option("--wrong", type=click.IntRange(0), default=0, metavar="N", help="Print the first N wrong answers too.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Also write all of it as JSON; - is stdout, without the table."
)
@run_options.session_options
@output.quiet_option
def command(
    bundles: tuple[Path, ...], file: Path, batch: int, wrong: int, json_file: str | None, quiet: bool, **options: Any
) -> None:
    """Answer the prompts of FILE with each BUNDLE and compare: exact answers, perplexity, divergence.

    FILE has one JSON object a line, {"prompt": …, "answer": …}, with "history": [[query, answer], …] if any. Answers
    are generated greedily. The divergence (KL, in nats) of every bundle is measured from the first one, which stays
    open beside it: both keep to the memory limit by themselves. Products of quantized bundles depend on the rows beside
    them in the last digits, so their numbers do on --batch.

    \b
    Examples:
      glmexport eval int4/ questions.jsonl
      glmexport eval bundle/ int8/ int4/ questions.jsonl --wrong 3
    """
    from glmexport.bundle import open_bundle
    from glmexport.evaluation import evaluate, read_examples

    examples = read_examples(file)
    for bundle in bundles:
        open_bundle(bundle)  # a wrong name is told before the work of the ones before it
    rows: list[tuple[Session, Score]] = []
    with ExitStack() as stack:
        for bundle in bundles:
            session = stack.enter_context(run_options.open_session(bundle, options, quiet=quiet))
            baseline = rows[0][0] if rows else None
            with output.progress(quiet, 2 * len(examples), bundle.name) as advance:
                score = evaluate(session, examples, batch=batch, baseline=baseline, advance=advance)
            rows.append((session, score))
            if len(rows) > 1:
                session.close()
    if json_file is not None:
        output.write_json(json_file, [_as_json(session, score) for session, score in rows])
    if json_file != "-":
        _print(rows, examples, wrong)


def _print(rows: Sequence[tuple[Session, Score]], examples: Sequence[Example], wrong: int) -> None:
    from glmexport.inventory import form_in_words

    console = output.console()
    columns = ("bytes", "exact answers", "perplexity", "KL (nats)")
    listing = output.table("bundle", "form", *columns, right=columns)
    for session, score in rows:
        exact = f"{score.exact}/{score.count} {score.exact_share:.1%}"
        perplexity = "" if score.perplexity is None else f"{score.perplexity:.5g}"
        divergence = "" if score.divergence is None else f"{score.divergence:.1e}"
        size = size_in_words(session.bundle.total_bytes)
        name = output.cell(session.bundle.directory.name)
        listing.add_row(name, form_in_words(session.bundle), size, exact, perplexity, divergence)
    console.print(listing)
    for session, score in rows if wrong else ():
        misses = [
            pair for pair in zip(examples, score.answers, strict=True) if pair[0].answer.strip() != pair[1].strip()
        ]
        for example, found in misses[:wrong]:
            name = session.bundle.directory.name
            click.echo(f"{name}, line {example.line}: {example.prompt!r} -> {found!r}, expected {example.answer!r}")


def _as_json(session: Session, score: Score) -> dict[str, Any]:
    import dataclasses

    from glmexport.inventory import form_in_words

    facts = {
        "bundle": str(session.bundle.directory),
        "form": form_in_words(session.bundle),
        "bytes": session.bundle.total_bytes,
    }
    numbers = dataclasses.asdict(score)
    for key in ("perplexity", "divergence"):  # JSON has no infinity
        numbers[key] = numbers[key] if numbers[key] is not None and math.isfinite(numbers[key]) else None
    return {**facts, **numbers, "exact_share": score.exact_share}
