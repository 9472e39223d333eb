"""What the handlers of a running server share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from glmexport.errors import GlmExportError
from glmexport.serve.defaults import Options, options_of
from glmexport.serve.metrics import Metrics
from glmexport.serve.models import Models, Use
from glmexport.serve.prompts import Message, Prompt, chat_ids, truncated_chat_ids
from glmexport.serve.row import Ask
from glmexport.serve.settings import Settings
from glmexport.serve.store import Store


@dataclass(frozen=True)
class Server:
    """One running server. template: of chats, None for the model's own format."""

    settings: Settings
    store: Store
    models: Models
    metrics: Metrics
    template: Callable[[Sequence[Message]], str] | None = None


def server_of(request: Request) -> Server:
    """The server that a request came to."""
    server = request.app.state.server
    if not isinstance(server, Server):
        raise TypeError("the application was not made by glmexport.serve.app")
    return server


def options_for(use: Use, given: Mapping[str, Any]) -> Options:
    """A request's options over the Modelfile's over the bundle's. Raises GlmExportError for values that are none."""
    options = options_of(use.served.defaults, use.entry.modelfile.parameters, given)
    size = use.served.bundle.config.vocab_size
    for token, _ in options.sampling.logit_bias:
        if not 0 <= token < size:
            raise GlmExportError(f"logit_bias names the id {token}, expected ids from 0 to {size - 1}.")
    return options


def room_for(use: Use, options: Options) -> int:
    """Places for prompt and answer together."""
    return min(use.served.context, options.context or use.served.context)


def chat_prompt_of(server: Server, use: Use, messages: Sequence[Message], options: Options, truncate: bool) -> Prompt:
    """The prompt of a chat that begins as the Modelfile says. Raises GlmExportError."""
    modelfile = use.entry.modelfile
    begun = [Message(role, text) for role, text in modelfile.messages]
    if modelfile.system and not any(message.role == "system" for message in messages):
        begun.insert(0, Message("system", modelfile.system))
    whole = [*begun, *messages]
    if truncate and server.template is None:
        return truncated_chat_ids(use.served.tokenizer, whole, room_for(use, options), options.max_tokens)
    return chat_ids(use.served.tokenizer, whole, server.template)


def ask_of(server: Server, use: Use, prompt: Prompt, options: Options, **more: Any) -> Ask:
    """One row. Raises GlmExportError where the prompt leaves no room for an answer, with both numbers."""
    room = room_for(use, options)
    scored = more.get("scored", ())
    count = len(prompt.ids) + len(scored)
    left = room - count
    wanted = more.pop("max_tokens", options.max_tokens)
    if left < (0 if wanted == 0 else 1):
        raise GlmExportError(
            f"The prompt has {count} tokens, the context {room} for prompt and answer together; shorten the prompt, or "
            "let it be cut with `truncate: true`."
        )
    limit = server.settings.request_timeout
    return Ask(
        prompt.ids,
        left if wanted is None else min(wanted, left),
        options.sampling,
        options.stop,
        continued=prompt.continued,
        deadline=time.monotonic() + limit if limit else None,
        **more,
    )
