"""What the commands about models share: which server they ask, and the store they turn to where none runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from glmexport.cli import output
from glmexport.errors import GlmExportError
from glmexport.sizes import size_in_words

if TYPE_CHECKING:
    from glmexport.serve.client import Client
    from glmexport.serve.store import Store

_OPTIONS = (
    click.option(
        "--host",
        metavar="ADDRESS",
        help="The server to ask.  [default: $GLMEXPORT_HOST, $OLLAMA_HOST, 127.0.0.1:11434]",
    ),
    click.option("--api-key", metavar="KEY", help="Its key.  [default: $GLMEXPORT_API_KEY]"),
)


def server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--host`, `--api-key` and `-q`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return output.quiet_option(function)


def running(host: str | None, api_key: str | None) -> Client | None:
    """The glmexport server that answers, None where none does. Raises GlmExportError for a wrong key."""
    from glmexport.serve.client import client_of

    client = client_of(host, api_key)
    return client if client.is_ours() else None


def demanded(host: str | None, api_key: str | None) -> Client:
    """The same, demanded. Raises GlmExportError."""
    from glmexport.serve.client import client_of

    client = running(host, api_key)
    if client is None:
        address = client_of(host, api_key).address
        raise GlmExportError(f"No glmexport server answers at {address}; start one with `glmexport serve`.")
    return client


def store() -> Store:
    """The models that were created."""
    from glmexport.serve.store import Store, default_home

    return Store(default_home())


def no_model(name: str) -> GlmExportError:
    """The sentence about a name that is none's."""
    return GlmExportError(f"There is no model {name!r:.80}; `glmexport list` shows those there are.")


def ago(moment: str) -> str:
    """How long ago, or until, a time in RFC 3339 is, for people."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    count = abs(seconds)
    if -seconds > 50 * 365 * 86400:
        return "forever"
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if count >= 2 * length:
            words = f"{count / length:.0f} {unit}"
            break
    else:
        words = f"{count:.0f} seconds"
    return f"{words} ago" if seconds >= 0 else f"{words} from now"


def bytes_in_words(count: object) -> str:
    """A size that a server gave."""
    return size_in_words(count) if isinstance(count, int) else "?"
