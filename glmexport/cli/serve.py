"""`glmexport serve`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from glmexport.cli import output, serve_options
from glmexport.errors import GlmExportError


@click.command(name="serve")
@click.argument("bundles", metavar="[BUNDLE]...", nargs=-1, type=click.Path(path_type=Path))
@serve_options.serve_options
@output.quiet_option
def command(bundles: tuple[Path, ...], quiet: bool, **options: Any) -> None:
    """Answer the APIs of Ollama and OpenAI over HTTP, with BUNDLEs and with the models that `glmexport create` made.

    Several answers are computed at once, each with its own sampling, and join and leave at every token. Ctrl-C lets the
    running ones end.

    \b
    Examples:
      glmexport serve int4/
      glmexport serve int4/ int8/ --max-loaded-models 1 --keep-alive 10m
      GLMEXPORT_API_KEY=… glmexport serve int4/ --host 0.0.0.0 --max-num-seqs 4 --max-model-len 1024
    """
    settings = serve_options.settings_of(options, len(bundles))
    entries = serve_options.entries_of(bundles, options["served_model_name"])
    try:
        from glmexport.serve.app import make_app
        from glmexport.serve.server import run_server
    except ModuleNotFoundError as error:
        raise GlmExportError(
            f"Serving needs {error.name}, which is not installed: pip install glmexport[serve]."
        ) from error
    from glmexport.serve.store import Store, default_home

    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that went away
    app = make_app(settings, Store(default_home()), entries, preload=[*entries.values()])

    def started(host: str, port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"http://{shown}:{port}")
        sys.stdout.flush()

    run_server(app, settings, started)
