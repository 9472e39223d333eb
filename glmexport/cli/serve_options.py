"""The options of `glmexport serve`, spelled as other servers spell them, and what they amount to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glmexport.errors import GlmExportError

if TYPE_CHECKING:
    from glmexport.serve.settings import Settings
    from glmexport.serve.store import Entry

KEY_VARIABLE = "GLMEXPORT_API_KEY"
_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(1)

_OPTIONS = (
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--port", type=click.IntRange(0, 65535), default=11434, show_default=True, help="0 is any free one."),
    click.option(
        "--api-key",
        metavar="KEY",
        help=f"Demanded on every route but /health. Others see a command line: better ${KEY_VARIABLE} or a file.",
    ),
    click.option("--api-key-file", type=_PATH, help="A file with the key."),
    click.option("--allow-public", is_flag=True, help="Listen beyond this computer without a key."),
    click.option("--allowed-host", multiple=True, metavar="NAME", help="A Host besides the server's own; repeatable."),
    click.option(
        "--served-model-name",
        multiple=True,
        metavar="NAME",
        help="What clients call the model: one for each BUNDLE, or several for one.  [default: the directory's name]",
    ),
    click.option("--max-model-len", type=click.IntRange(2), metavar="N", help="Tokens of prompt and answer together."),
    click.option("--max-num-seqs", type=_COUNT, default=8, show_default=True, help="Answers computed at once."),
    click.option("--max-queue", type=click.IntRange(0), default=64, show_default=True, help="Answers that may wait."),
    click.option(
        "--max-num-batched-tokens",
        type=_COUNT,
        metavar="N",
        help="Tokens of prompts begun in one step; a longer prompt is refused.  [default: one prompt of any length]",
    ),
    click.option(
        "--max-loaded-models", type=_COUNT, metavar="N", help="Models in memory at once.  [default: every BUNDLE]"
    ),
    click.option(
        "--keep-alive",
        default="-1",
        show_default=True,
        metavar="TIME",
        help="How long a model nobody asks stays: 5m, -1.",
    ),
    click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Of each graph.  [default: one a core]"),
    click.option("--providers", metavar="A,B", help="onnxruntime's execution providers, first choice first."),
    click.option(
        "--gpu-memory-utilization",
        type=click.FloatRange(0.05, 1.0),
        default=0.9,
        show_default=True,
        help="The share of the computer's free memory that graphs and KV caches may take.",
    ),
    click.option("--tokenizer", type=_PATH, help="A directory with ice_text.model, for bundles without one."),
    click.option("--generation-config", type=_PATH, metavar="DIR", help="A directory with generation_config.json."),
    click.option("--chat-template", type=_PATH, help="A Jinja template instead of the model's own chat format."),
    click.option(
        "--request-timeout", type=click.FloatRange(0), default=1800.0, show_default=True, help="Seconds; 0 is no limit."
    ),
    click.option(
        "--shutdown-timeout",
        type=click.FloatRange(0),
        default=30.0,
        show_default=True,
        help="Grace of running answers.",
    ),
    click.option("--log-prompts", is_flag=True, help="Write what is asked into the log."),
)


def serve_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All of them."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def settings_of(options: Mapping[str, Any], bundles: int) -> Settings:
    """What the options amount to. Raises GlmExportError for what would be unsafe or is none."""
    from glmexport.serve.durations import FOREVER, parse_duration
    from glmexport.serve.settings import Settings

    keep_alive = parse_duration(options["keep_alive"])
    same = (
        *("host", "port", "max_model_len", "max_num_seqs", "max_queue", "threads", "tokenizer", "generation_config"),
        *("chat_template", "request_timeout", "shutdown_timeout", "log_prompts"),
    )
    settings = Settings(
        **{name: options[name] for name in same},
        api_key=_key_of(options),
        max_batched_tokens=options["max_num_batched_tokens"],
        max_loaded_models=options["max_loaded_models"] or max(bundles, 1),
        keep_alive=None if keep_alive == FOREVER else keep_alive,
        memory_utilization=options["gpu_memory_utilization"],
        providers=tuple(name.strip() for name in (options["providers"] or "").split(",") if name.strip()),
        hosts=tuple(name.lower() for name in options["allowed_host"]),
    )
    if not settings.is_local and settings.api_key is None and not options["allow_public"]:
        raise GlmExportError(
            f"{settings.host} can be reached from outside and there is no key; give --api-key-file, ${KEY_VARIABLE} "
            "or, where everybody may ask, --allow-public."
        )
    return settings


def entries_of(bundles: Sequence[Path], names: Sequence[str]) -> dict[str, Entry]:
    """The models of the command line by name. Raises GlmExportError: no bundle, names that do not fit."""
    from glmexport.bundle import open_bundle
    from glmexport.serve.model_names import name_of_directory
    from glmexport.serve.modelfile import Modelfile
    from glmexport.serve.store import Entry

    if names and len(bundles) != 1 and len(names) != len(bundles):
        raise GlmExportError(f"{len(names)} names were given for {len(bundles)} bundles, expected one for each.")
    directories = [path.resolve() for path in bundles]
    if len(bundles) == 1 and names:
        pairs = [(name, directories[0]) for name in names]
    else:
        pairs = list(zip(names or [name_of_directory(path.name) for path in directories], directories, strict=True))
    entries = {}
    for name, directory in pairs:
        open_bundle(directory)
        if name in entries or not name.isprintable() or not name.strip():
            raise GlmExportError(f"Two models would be called {name!r:.80}; give each a --served-model-name.")
        modified = (directory / "manifest.json").stat().st_mtime
        entries[name] = Entry(name, directory, Modelfile(str(directory)), modified, created=False)
    return entries


def _key_of(options: Mapping[str, Any]) -> str | None:
    key = options["api_key"]
    path: Path | None = options["api_key_file"]
    if path is not None:
        try:
            key = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise GlmExportError(f"{path} cannot be read as a key ({error}); give a file with one line.") from error
    elif key is None:
        key = os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if not key.strip():
        raise GlmExportError("The API key is empty; give one, or none at all.")
    return str(key).strip()
