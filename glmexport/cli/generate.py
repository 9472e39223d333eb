"""`glmexport generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from glmexport.cli import interrupt, output, run_options
from glmexport.errors import GlmExportError


@click.command(name="generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--input-ids", metavar="IDS", help="Ids instead of a prompt, [gMASK] and <sop> among them: 5,17,9,…")
@click.option("--output-ids", is_flag=True, help="Print the new ids as a JSON list on the last line.")
@click.option("--special", is_flag=True, help="[gMASK], <sop> and the like in the prompt mean those tokens.")
@run_options.generation_options
@click.option("--stats", is_flag=True, help="Print speed, memory and KV cache on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print text, ids and statistics as JSON, when all is done.")
@output.quiet_option
def command(
    bundle: Path,
    prompt: str | None,
    input_ids: str | None,
    output_ids: bool,
    special: bool,
    stats: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue PROMPT (- reads it from stdin) with BUNDLE, as the model gives it, streaming.

    Tokens are sampled as the original does unless --greedy is given. `glmexport chat` keeps a history and polishes.

    \b
    Examples:
      glmexport generate bundle/ "你好" --greedy
      glmexport generate int4/ "What is 12 plus 34?" --memory-limit 2GB --stats
      glmexport generate bundle/ --input-ids 5,17,9,130001,130004 --greedy --max-tokens 8 --output-ids
      glmexport generate bundle/ --gpu-memory 6GB --dry-run
    """
    from glmexport.generation import generate

    sampling = run_options.sampling_of(options)
    if options["dry_run"]:
        with run_options.open_session(bundle, options, quiet=quiet) as session:
            run_options.print_plan(session)
        return
    fed = _prompt(prompt, input_ids)
    with run_options.open_session(bundle, options, quiet=quiet) as session:
        keys = ("max_tokens", "stop")
        answer = generate(session, fed, sampling=sampling, special=special, **{key: options[key] for key in keys})
        run_options.load(session, quiet=quiet)
        if not session.has_tokenizer and not (output_ids or as_json):
            output.notifier(quiet)("The bundle has no tokenizer, so there is no text to show; --output-ids prints ids.")
        for piece in answer:
            interrupt.check()
            if not as_json:
                click.echo(output.printable(piece), nl=False)
        if as_json:
            reason = answer.finish_reason
            document = {"text": answer.text, "ids": answer.ids, "prompt_ids": answer.prompt_ids, "ended_by": reason}
            output.write_json("-", {**document, "stats": run_options.stats_as_json(answer)})
        else:
            click.echo()
        if output_ids:
            click.echo(json.dumps(answer.ids))
        if stats:
            click.echo(run_options.stats_in_words(answer), err=True)


def _prompt(prompt: str | None, input_ids: str | None) -> str | list[int]:
    """The text or the ids to feed. Raises GlmExportError where there is neither or both."""
    if (prompt is None) == (input_ids is None):
        raise GlmExportError("Give either a prompt or --input-ids.")
    if input_ids is not None:
        return run_options.parse_ids(input_ids)
    return run_options.utf8(sys.stdin.buffer.read()) if prompt == "-" else str(prompt)
