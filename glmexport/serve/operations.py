"""Routes for whoever runs the server, and tokens for whoever counts them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glmexport import __version__
from glmexport.serve.context import Server, chat_prompt_of, server_of
from glmexport.serve.defaults import Options
from glmexport.serve.models import Use
from glmexport.serve.openai_forms import MessageForm, message_of
from glmexport.serve.replies import ApiError, Form, read_form
from glmexport.serve.store import Entry


class TokenizeForm(Form):
    """The body of `/tokenize`: a prompt or messages. add_special_tokens: `[gMASK]` and `<sop>` too."""

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageForm] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeForm(Form):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: list[int]


async def health(request: Request) -> Response:
    """`GET /health`: 200 while questions are taken."""
    models = server_of(request).models
    dead = [name for name, loaded in models.loaded.items() if not loaded.served.engine.alive]
    if models.stopping or dead:
        raise ApiError(503, "The server is stopping." if models.stopping else "An engine has ended.")
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """`GET /metrics`, for Prometheus."""
    return Response(server_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def version(request: Request) -> Response:
    """`GET /version`."""
    return JSONResponse({"version": __version__, "server": "glmexport"})


async def tokenize(request: Request) -> Response:
    """`POST /tokenize`."""
    form = await read_form(request, TokenizeForm)
    server = server_of(request)
    if (form.prompt is None) == (form.messages is None):
        raise ApiError(400, "Give a prompt or messages, one of the two.", param="prompt")
    async with server.models.use(_entry(server, form.model)) as use:
        ids = _ids(server, use, form)
        body: dict[str, Any] = {"count": len(ids), "max_model_len": use.served.context, "tokens": ids}
        if form.return_token_strs:
            body["token_strs"] = [use.served.tokenizer.piece(token) for token in ids]
    return JSONResponse(body)


async def detokenize(request: Request) -> Response:
    """`POST /detokenize`."""
    form = await read_form(request, DetokenizeForm)
    server = server_of(request)
    async with server.models.use(_entry(server, form.model)) as use:
        return JSONResponse({"prompt": use.served.tokenizer.decode(form.tokens)})


def _ids(server: Server, use: Use, form: TokenizeForm) -> list[int]:
    tokenizer, special = use.served.tokenizer, form.add_special_tokens is not False
    if form.messages is not None:
        messages = [message_of(message, number) for number, message in enumerate(form.messages)]
        ids = list(chat_prompt_of(server, use, messages, Options(), False).ids)
        return ids if special else ids[:-2]
    prompt = form.prompt or ""
    return tokenizer.prompt_ids(prompt) if special else tokenizer.encode(prompt)


def _entry(server: Server, name: str | None) -> Entry:
    """The model of that name, or the only one there is."""
    if name is not None:
        return server.models.find(name)
    entries = server.models.entries()
    if len(entries) != 1:
        raise ApiError(400, f"model: a name is missing, there are {len(entries)} models.", param="model")
    return entries[0]
