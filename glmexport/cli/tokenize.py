"""`glmexport tokenize`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from glmexport.cli import output
from glmexport.cli.run_options import parse_ids
from glmexport.errors import GlmExportError

if TYPE_CHECKING:
    from glmexport.tokenizer import Tokenizer


@click.command(name="tokenize")
@click.argument("target")
@click.argument("text", required=False)
@output.revision_option
@click.option("--prompt", is_flag=True, help="Append the special ids that end a prompt, [gMASK] and <sop>.")
@click.option("--special", is_flag=True, help="[gMASK], <sop> and the like in the text mean those tokens.")
@click.option("--decode", is_flag=True, help="The other way: ids to text.")
@click.option("--jsonl", is_flag=True, help="A JSON string (--decode: list of ids) a line from stdin, and JSON out.")
@click.option("--pieces", is_flag=True, help="Print a table of the ids and their pieces.")
@output.quiet_option
def command(
    target: str,
    text: str | None,
    revision: str | None,
    prompt: bool,
    special: bool,
    decode: bool,
    jsonl: bool,
    pieces: bool,
    quiet: bool,
) -> None:
    """Print the ids of TEXT in the numbering of TARGET: a bundle, a checkpoint directory or a hub id.

    \b
    Examples:
      glmexport tokenize bundle/ "你好"
      glmexport tokenize bundle/ "你好" --prompt --pieces
      glmexport tokenize chatglm-6b/ --decode 5,94874
      glmexport tokenize bundle/ --jsonl < texts.jsonl > ids.jsonl
    """
    if (text is None) != jsonl:
        raise GlmExportError("Give either a text, or --jsonl and lines on stdin.")
    if (decode and (prompt or special)) or (pieces and (decode or jsonl)):
        raise GlmExportError("--prompt, --special and --pieces are for one way only; leave out --decode or --jsonl.")
    tokenizer = open_tokenizer(target, revision, output.notifier(quiet))

    def encode(value: str) -> list[int]:
        return (tokenizer.prompt_ids if prompt else tokenizer.encode)(value, special=special)

    if jsonl:
        _each_line(tokenizer.decode if decode else encode, list if decode else str)
    elif decode:
        click.echo(tokenizer.decode(parse_ids(text or "")))
    elif pieces:
        listing = output.table("id", "piece", right=("id",))
        for token in encode(text or ""):
            listing.add_row(str(token), escape(tokenizer.piece(token)))
        output.console().print(listing)
    else:
        click.echo(json.dumps(encode(text or "")))


def open_tokenizer(target: str, revision: str | None, notice: Callable[[str], None]) -> Tokenizer:
    """The tokenizer of a bundle, a checkpoint directory or a hub id. Raises GlmExportError."""
    from glmexport import names
    from glmexport.bundle import looks_like_bundle, open_bundle
    from glmexport.bundle_tokenizer import make_tokenizer, tokenizer_of_bundle
    from glmexport.form import Form
    from glmexport.tokenizer import MODEL_LIMIT
    from glmexport.untrusted import read_small_file

    if looks_like_bundle(Path(target)):
        return tokenizer_of_bundle(open_bundle(Path(target)))
    from glmexport.checkpoint import open_checkpoint

    with open_checkpoint(target, revision, require_weights=False) as checkpoint:
        for warning in checkpoint.warnings:
            notice(warning)
        path = checkpoint.directory / names.TOKENIZER_MODEL
        return make_tokenizer(read_small_file(path, MODEL_LIMIT), checkpoint.config, Form(), origin=str(path))


def _each_line(convert: Callable[[Any], Any], kind: type) -> None:
    """Convert JSON values, one a line, from stdin to stdout. Raises GlmExportError, which names the line."""
    for number, value in enumerate(_values(kind), 1):
        try:
            converted = convert(value)
        except GlmExportError as error:
            raise GlmExportError(f"Line {number}: {error}") from error
        click.echo(json.dumps(converted))  # escaped to ASCII, so that no reader takes a character for a line's end


def _values(kind: type) -> Iterator[Any]:
    what = "a JSON string" if kind is str else "a JSON list of ids"
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GlmExportError(f"Line {number} is not JSON; expected {what}.") from error
        if not isinstance(value, kind) or (isinstance(value, list) and not all(type(token) is int for token in value)):
            raise GlmExportError(f"Line {number} is {value!r:.40}, expected {what}.")
        yield value
