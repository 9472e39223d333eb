"""`glmexport create`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from glmexport.cli import model_options, output
from glmexport.errors import GlmExportError


@click.command(name="create")
@click.argument("name")
@click.option(
    "-f",
    "--file",
    "modelfile",
    type=click.Path(path_type=Path),
    default=Path("Modelfile"),
    show_default=True,
    help="FROM, PARAMETER, SYSTEM, MESSAGE and LICENSE are read.",
)
@output.quiet_option
def command(name: str, modelfile: Path, quiet: bool) -> None:
    """Give a bundle, with a system prompt, parameters and first messages, a NAME to serve and run it by.

    The Modelfile's FROM is a bundle's directory (from the Modelfile's own place) or another model's name. The bundle
    stays where it is; a running server knows the model at once.

    \b
    Examples:
      glmexport create mario -f Modelfile
      glmexport create mario:strict -f strict/Modelfile
    """
    from glmexport.serve.modelfile import parse_modelfile

    try:
        text = modelfile.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise GlmExportError(f"{modelfile} cannot be read as a Modelfile ({error}); give one with -f.") from error
    parsed = parse_modelfile(text)
    beside = modelfile.absolute().parent / Path(parsed.source).expanduser()
    if beside.is_dir():
        parsed = dataclasses.replace(parsed, source=str(beside))
    entry = model_options.store().create(name, parsed, {}, within=None)
    if parsed.ignored:
        output.notifier(quiet)(f"Passed over, without a meaning here: {', '.join(parsed.ignored)}.")
    click.echo(f"{entry.name}: {entry.bundle}")
