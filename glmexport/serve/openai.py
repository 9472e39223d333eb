"""OpenAI's `/v1/models`, `/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glmexport import __version__
from glmexport.chat import PolishedStream
from glmexport.errors import GlmExportError
from glmexport.generation import LENGTH
from glmexport.serve.asking import Asked, Choice, ask, everything
from glmexport.serve.context import Server, ask_of, chat_prompt_of, options_for, room_for, server_of
from glmexport.serve.defaults import Options
from glmexport.serve.logprobs import CompletionLogprobs, chat_logprobs
from glmexport.serve.models import Use
from glmexport.serve.openai_forms import AnswerForm, ChatForm, CompletionForm
from glmexport.serve.prompts import Prompt, text_ids
from glmexport.serve.replies import ApiError, Stream, error_document, error_of, read_form, to_json
from glmexport.serve.row import Ask, End
from glmexport.serve.store import Entry

SSE = "text/event-stream"
COMPLETION_TOKENS = 16
"""Of a completion whose request does not say, as in OpenAI's own."""


async def models(request: Request) -> Response:
    """`GET /v1/models`."""
    server = server_of(request)
    return JSONResponse({"object": "list", "data": [_model(server, entry) for entry in server.models.entries()]})


async def model(request: Request) -> Response:
    """`GET /v1/models/{id}`."""
    server = server_of(request)
    return JSONResponse(_model(server, server.models.find(request.path_params["name"])))


async def chat(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    form = await read_form(request, ChatForm)
    server, messages = server_of(request), form.chat()
    parameters, named, count, limit = form.parameters(), form.named, form.choices, form.limit
    entry = server.models.find(form.model)

    def build(use: Use) -> Sequence[Ask]:
        options = _limited(options_for(use, parameters), limit)
        prompt = chat_prompt_of(server, use, messages, options, bool(form.truncate))
        one = ask_of(server, use, prompt, options, logprobs=named, **form.more())
        return [_numbered(one, number) for number in range(count)]

    asked = await ask(request, server.models, entry, None, build)
    return await _answer(server, request, form, asked, _ChatWords(form, asked, count))


async def completions(request: Request) -> Response:
    """`POST /v1/completions`."""
    form = await read_form(request, CompletionForm)
    server, prompts = server_of(request), form.prompts()
    parameters, named, count = form.parameters(), form.named, form.choices
    limit = COMPLETION_TOKENS if form.max_tokens is None else form.max_tokens
    if limit == 0 and (not form.echo or named is None):
        raise ApiError(400, "max_tokens is 0, which asks for nothing but with echo and logprobs.", param="max_tokens")
    entry = server.models.find(form.model)
    words: list[_CompletionWords] = []

    def build(use: Use) -> Sequence[Ask]:
        options = options_for(use, parameters)
        asks, echoes = list[Ask](), list[str]()
        for prompt in prompts:
            fed, scored, echo = _completion_prompt(use, form, prompt, options)
            one = ask_of(server, use, fed, options, max_tokens=limit, logprobs=named, scored=scored, **form.more())
            asks += [_numbered(one, number) for number in range(count)]
            echoes += [echo] * count
        words.append(_CompletionWords(form, use, echoes))
        return asks

    asked = await ask(request, server.models, entry, None, build)
    return await _answer(server, request, form, asked, words[0])


def _completion_prompt(
    use: Use, form: CompletionForm, given: str | list[int], options: Options
) -> tuple[Prompt, tuple[int, ...], str]:
    """What is fed, the ids to be scored, and the text to be echoed.

    A prompt is read both ways at once, so its tokens have no probabilities. Where those are asked for (echo and
    logprobs), the text is scored as an answer to an empty prompt, in which each token follows from those before it.
    """
    tokenizer = use.served.tokenizer
    if isinstance(given, str):
        text, ids = given, tokenizer.encode(given) if form.echo and form.named is not None else []
    else:
        text, ids = tokenizer.decode(given), list(given)
        _demand_ids(use, ids)
    echo = text if form.echo else ""
    if form.echo and form.named is not None:
        return text_ids(tokenizer, ""), tuple(ids), echo
    if isinstance(given, str):
        if form.truncate:
            return text_ids(tokenizer, text, room=room_for(use, options), max_tokens=form.max_tokens), (), echo
        return text_ids(tokenizer, text), (), echo
    ends = text_ids(tokenizer, "").ids
    whole = ids if _is_prompt(use, ids) else [*ids, *ends]
    return Prompt(tuple(whole)), (), echo


def _demand_ids(use: Use, ids: Sequence[int]) -> None:
    size = use.served.bundle.config.vocab_size
    wrong = [token for token in ids if not 0 <= token < size]
    if wrong:
        raise GlmExportError(f"The prompt holds the id {wrong[0]}, expected ids from 0 to {size - 1}.")


def _is_prompt(use: Use, ids: list[int]) -> bool:
    """Whether the ids have `<sop>` with a mask token before it already."""
    special = use.served.bundle.config.special_ids
    context = ids[: ids.index(special.bos)] if special.bos in ids else []
    return special.gmask in context or special.mask in context


def _limited(options: Options, limit: int | None) -> Options:
    return options if limit is None else dataclasses.replace(options, max_tokens=limit)


def _numbered(one: Ask, number: int) -> Ask:
    """The same question for another answer, which has a seed of its own."""
    if number == 0 or one.sampling.seed is None:
        return one
    return dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, seed=one.sampling.seed + number))


class _Words:
    """How the pieces of an answer are worded. parts: what a choice of a chunk holds; whole: of the full response."""

    prefix, kind, chunk_kind = "", "", ""

    def first(self, index: int) -> dict[str, Any] | None:
        """What comes before the first piece of a choice, None for nothing."""
        return None

    def part(self, choice: Choice) -> dict[str, Any] | None:
        raise NotImplementedError

    def last(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError


class _ChatWords(_Words):
    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, form: ChatForm, asked: Asked, count: int) -> None:
        self._tokenizer, self._named = asked.use.served.tokenizer, form.named
        self._polished = [PolishedStream() for _ in range(count)]

    def first(self, index: int) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, choice: Choice) -> dict[str, Any] | None:
        piece, polished = choice.piece, self._polished[choice.index]
        text = polished.push(piece.text) + (polished.finish() if piece.end else "")
        if not text and not piece.tokens:
            return None
        logprobs = {"content": chat_logprobs(self._tokenizer, piece.tokens)} if self._named is not None else None
        return {"delta": {"content": text}, "logprobs": logprobs}

    def last(self, index: int) -> dict[str, Any]:
        return {"delta": {}}

    def whole(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        text = "".join(part["delta"].get("content", "") for part in parts)
        content = [entry for part in parts for entry in (part.get("logprobs") or {}).get("content", ())]
        logprobs = {"content": content} if self._named is not None else None
        return {"message": {"role": "assistant", "content": text}, "logprobs": logprobs}


class _CompletionWords(_Words):
    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, form: CompletionForm, use: Use, echoes: Sequence[str]) -> None:
        self._tokenizer, self._named, self._echoes = use.served.tokenizer, form.named, echoes
        scored = form.echo and form.named is not None
        self._logprobs = [CompletionLogprobs(self._tokenizer, 0 if scored else len(echo)) for echo in echoes]
        self._begun = [not scored] * len(echoes)

    def first(self, index: int) -> dict[str, Any] | None:
        return {"text": self._echoes[index]} if self._echoes[index] else None

    def part(self, choice: Choice) -> dict[str, Any] | None:
        piece, index = choice.piece, choice.index
        if not piece.text and not piece.tokens:
            return None
        logprobs = None
        if self._named is not None:
            first = not self._begun[index] and bool(piece.tokens)
            logprobs = self._logprobs[index].take(piece.tokens, first_is_given=first)
            self._begun[index] = self._begun[index] or first
        return {"text": piece.text, "logprobs": logprobs}

    def last(self, index: int) -> dict[str, Any]:
        return {"text": ""}

    def whole(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        found = [part["logprobs"] for part in parts if part.get("logprobs")]
        keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        merged = {key: [one for logprobs in found for one in logprobs[key]] for key in keys}
        return {
            "text": "".join(part["text"] for part in parts),
            "logprobs": merged if self._named is not None else None,
        }


async def _answer(server: Server, request: Request, form: AnswerForm, asked: Asked, words: _Words) -> Response:
    head = {
        "id": words.prefix + secrets.token_hex(12),
        "created": int(time.time()),
        "model": form.model,
        "system_fingerprint": f"glmexport-{__version__}",
    }
    parts = _parts(asked, words)
    if form.stream:
        lines = _lines(parts, head | {"object": words.chunk_kind}, form, request.url.path)
        return Stream(lines, asked.close, SSE, server.settings.send_timeout)
    try:
        choices: dict[int, list[dict[str, Any]]] = {}
        ends: list[End] = []
        async for index, part, end in parts:
            choices.setdefault(index, []).append(part)
            ends += [end] if end else []
    finally:
        await parts.aclose()
        await asked.close()
    whole = [
        {"index": index, **words.whole(found), "finish_reason": found[-1]["finish_reason"]}
        for index, found in sorted(choices.items())
    ]
    return JSONResponse({**head, "object": words.kind, "choices": whole, "usage": _usage(ends, form.choices)})


Part = tuple[int, dict[str, Any], End | None]


async def _parts(asked: Asked, words: _Words) -> AsyncGenerator[Part, None]:
    """(number of the choice, what it holds, its end with the last one)."""
    begun: set[int] = set()
    async for choice in everything(asked):
        index, end = choice.index, choice.piece.end
        if index not in begun:
            begun.add(index)
            first = words.first(index)
            if first is not None:
                yield index, first | {"finish_reason": None}, None
        part = words.part(choice)
        if part is not None:
            yield index, part | {"finish_reason": None}, None
        if end is not None:
            reason = "length" if end.reason == LENGTH else "stop"
            yield index, words.last(index) | {"finish_reason": reason}, end


async def _lines(
    parts: AsyncGenerator[Part, None], head: dict[str, Any], form: AnswerForm, path: str
) -> AsyncGenerator[bytes, None]:
    """Server-sent events; what goes wrong on the way becomes one of them."""
    ends = list[End]()
    usage = {"usage": None} if form.includes_usage else {}
    try:
        async for index, part, end in parts:
            ends += [end] if end else []
            yield _event({**head, "choices": [{"index": index, **part}], **usage})
        if form.includes_usage:
            yield _event({**head, "choices": [], "usage": _usage(ends, form.choices)})
    except Exception as error:  # the status is sent already: this is the only place left to say it
        yield _event(error_document(path, error_of(error)))
    finally:
        await parts.aclose()
    yield b"data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + to_json(document) + b"\n\n"


def _usage(ends: Sequence[End], choices: int) -> dict[str, int]:
    """Tokens of all answers. choices: answers to each prompt, whose tokens count once."""
    prompt = sum(end.prompt_tokens for end in ends) // choices
    answer = sum(end.answer_tokens for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _model(server: Server, entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.name,
        "object": "model",
        "created": int(entry.modified),
        "owned_by": "glmexport",
        "root": entry.name,
    }
