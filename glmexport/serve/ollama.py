"""Ollama's `/api/generate` and `/api/chat`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glmexport.chat import PolishedStream
from glmexport.errors import GlmExportError
from glmexport.generation import LENGTH
from glmexport.serve.asking import Asked, ask, everything
from glmexport.serve.context import Server, ask_of, chat_prompt_of, options_for, room_for, server_of
from glmexport.serve.defaults import Options
from glmexport.serve.durations import parse_duration
from glmexport.serve.logprobs import ollama_logprobs
from glmexport.serve.modelfile import checked_parameters
from glmexport.serve.models import Use
from glmexport.serve.prompts import ROLES, Message, Prompt, text_ids
from glmexport.serve.replies import LOGGER, ApiError, Form, Stream, error_document, error_of, read_form, to_json
from glmexport.serve.row import Ask, End, Piece
from glmexport.serve.store import Entry
from glmexport.untrusted import few

NANOSECONDS = 10**9
MAX_TOP_LOGPROBS = 20
NDJSON = "application/x-ndjson"


class MessageForm(Form):
    """One message."""

    role: str
    content: str | None = None
    images: list[str] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class AnswerForm(Form):
    """What both requests have."""

    model: str
    stream: bool | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    truncate: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class GenerateForm(AnswerForm):
    """The body of `/api/generate`."""

    prompt: str | None = None
    suffix: str | None = None
    images: list[str] | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None


class ChatForm(AnswerForm):
    """The body of `/api/chat`."""

    messages: list[MessageForm] | None = None
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class _Reply:
    """How the pieces of an answer are worded. chat: as messages, polished as the model's own chat is."""

    entry: Entry
    name: str
    chat: bool

    def part(self, text: str, **more: Any) -> dict[str, Any]:
        """One line."""
        body = {"message": {"role": "assistant", "content": text}} if self.chat else {"response": text}
        return {"model": self.name, "created_at": now(), **body, "done": False, **more}


def now() -> str:
    """The time in RFC 3339."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


async def generate(request: Request) -> Response:
    """`POST /api/generate`."""
    form = await read_form(request, GenerateForm)
    server = server_of(request)
    _refuse(form, images=form.images, suffix=form.suffix)
    if form.template:
        raise ApiError(
            400,
            "template: it is in Go's language, which is not run here; leave it out, or send `raw`.",
            param="template",
        )
    entry = server.models.find(form.model)
    reply = _Reply(entry, form.model, chat=False)
    if not form.prompt:
        return await _load_or_unload(server, reply, form)
    given, text = _options(form), form.prompt

    def build(use: Use) -> Sequence[Ask]:
        options = options_for(use, given)
        if form.raw or form.context:
            prompt = _raw_prompt(use, form, text, options)
        else:
            messages = [Message("user", text)]
            if form.system is not None:
                messages.insert(0, Message("system", form.system))
            prompt = chat_prompt_of(server, use, messages, options, bool(form.truncate))
        return [ask_of(server, use, prompt, options, logprobs=_logprobs(form))]

    return await _answer(request, server, reply, form, build)


async def chat(request: Request) -> Response:
    """`POST /api/chat`."""
    form = await read_form(request, ChatForm)
    server = server_of(request)
    messages = [_message(message) for message in form.messages or ()]
    _refuse(form, images=any(message.images for message in form.messages or ()), tools=form.tools)
    entry = server.models.find(form.model)
    reply = _Reply(entry, form.model, chat=True)
    if not messages:
        return await _load_or_unload(server, reply, form)
    given = _options(form)

    def build(use: Use) -> Sequence[Ask]:
        options = options_for(use, given)
        prompt = chat_prompt_of(server, use, messages, options, bool(form.truncate))
        return [ask_of(server, use, prompt, options, logprobs=_logprobs(form))]

    return await _answer(request, server, reply, form, build)


def _message(form: MessageForm) -> Message:
    if form.role == "tool" or form.tool_calls:
        raise ApiError(400, "messages: the model knows no tools; leave out their messages.", param="messages")
    if form.role not in ROLES:
        raise ApiError(
            400, f"messages: a role is {form.role!r:.40}, expected one of {', '.join(ROLES)}.", param="messages"
        )
    return Message(ROLES[form.role], form.content or "")


def _refuse(form: AnswerForm, **unsupported: object) -> None:
    """Refuse what cannot be done and would change the answer."""
    for name, value in unsupported.items():
        if value:
            raise ApiError(400, f'"{form.model}" does not support {name}', param=name)
    if form.think and form.think != "none":
        raise ApiError(400, f'"{form.model}" does not support thinking', param="think")
    if form.format:
        raise ApiError(400, "format: answers of a given form are not supported; ask for it in words.", param="format")


def _logprobs(form: AnswerForm) -> int | None:
    count = form.top_logprobs or 0
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        raise ApiError(400, f"top_logprobs is {count}, expected 0 to {MAX_TOP_LOGPROBS}.", param="top_logprobs")
    return count if form.logprobs or count else None


def _options(form: AnswerForm) -> dict[str, Any]:
    checked, ignored = checked_parameters(form.options or {}, "options")
    if ignored:
        LOGGER.info("Options without a meaning here: %s.", few(sorted(ignored)))
    return checked


def _raw_prompt(use: Use, form: GenerateForm, text: str, options: Options) -> Prompt:
    """The text as it is, after the conversation that an earlier answer's `context` holds."""
    tokenizer = use.served.tokenizer
    try:
        before = tokenizer.decode(form.context) if form.context else ""
    except GlmExportError as error:
        raise ApiError(400, f"context: {error}", param="context") from error
    if before and not form.raw:
        text = f"{before}[Round {before.count(_ASKED)}]{_ASKED}{text}{_ANSWERED}"
    else:
        text = before + text
    if form.truncate:
        return text_ids(tokenizer, text, room=room_for(use, options), max_tokens=options.max_tokens)
    return text_ids(tokenizer, text)


_ASKED, _ANSWERED = "\n问：", "\n答："


def _context(use: Use, form: GenerateForm, answer: str) -> dict[str, list[int]]:
    """The conversation so far as ids, for the next request to go on with: rounds as in the model's own format.

    Nothing where the vocabulary was slimmed so far that it cannot write them.
    """
    tokenizer = use.served.tokenizer
    before = tokenizer.decode(form.context) if form.context else ""
    number = before.count(_ASKED)
    asked = f"{form.system}\n{form.prompt}" if form.system and not before else form.prompt
    try:
        return {"context": tokenizer.encode(f"{before}[Round {number}]{_ASKED}{asked}{_ANSWERED}{answer}\n")}
    except GlmExportError:
        return {}


async def _load_or_unload(server: Server, reply: _Reply, form: AnswerForm) -> Response:
    """A request without a question: the model is loaded, or with `keep_alive: 0` unloaded."""
    keep_alive = _keep_alive(form)
    if keep_alive == 0:
        await server.models.unload(reply.entry)
    else:
        async with server.models.use(reply.entry, keep_alive):
            pass
    reason = "unload" if keep_alive == 0 else "load"
    return JSONResponse({**reply.part(""), "done": True, "done_reason": reason})


def _keep_alive(form: AnswerForm) -> float | None:
    return None if form.keep_alive is None else parse_duration(form.keep_alive)


async def _answer(request: Request, server: Server, reply: _Reply, form: AnswerForm, build: Any) -> Response:
    asked = await ask(request, server.models, reply.entry, _keep_alive(form), build)
    lines = _lines(asked, reply, form)
    if form.stream is not False:
        return Stream(_with_errors(lines, request.url.path), asked.close, NDJSON, server.settings.send_timeout)
    try:
        return JSONResponse(await _joined(lines, reply))
    finally:
        await lines.aclose()
        await asked.close()


async def _lines(asked: Asked, reply: _Reply, form: AnswerForm) -> AsyncGenerator[dict[str, Any], None]:
    """Every line of the answer, the last one with `done`."""
    polished, texts = PolishedStream(), list[str]()
    tokenizer = asked.use.served.tokenizer
    async for choice in everything(asked):
        piece = choice.piece
        text = polished.push(piece.text) if reply.chat else piece.text
        more = {"logprobs": ollama_logprobs(tokenizer, piece.tokens)} if piece.tokens else {}
        if piece.end is not None and reply.chat:
            text += polished.finish()
        texts.append(text)
        if text or more:
            yield reply.part(text, **more)
        if piece.end is not None:
            last = reply.part("") | {"done": True, "done_reason": "length" if piece.end.reason == LENGTH else "stop"}
            if isinstance(form, GenerateForm) and not form.raw:
                last |= _context(asked.use, form, "".join(texts))
            yield last | _times(asked, piece)


def _times(asked: Asked, piece: Piece) -> dict[str, int]:
    end = piece.end or End("", 0, 0)
    seconds = {
        "total_duration": asked.seconds,
        "load_duration": asked.use.load_seconds,
        "prompt_eval_duration": end.prefill,
        "eval_duration": end.decode,
    }
    counts = {"prompt_eval_count": end.prompt_tokens, "eval_count": end.answer_tokens}
    return {name: int(value * NANOSECONDS) for name, value in seconds.items()} | counts


async def _joined(lines: AsyncGenerator[dict[str, Any], None], reply: _Reply) -> dict[str, Any]:
    """All lines as one."""
    texts, logprobs, last = list[str](), list[Any](), dict[str, Any]()
    async for line in lines:
        texts.append(line["message"]["content"] if reply.chat else line["response"])
        logprobs += line.get("logprobs", ())
        last = line
    whole = {
        **last,
        **{key: value for key, value in reply.part("".join(texts)).items() if key in ("message", "response")},
    }
    return whole | ({"logprobs": logprobs} if logprobs else {})


async def _with_errors(lines: AsyncGenerator[dict[str, Any], None], path: str) -> AsyncGenerator[bytes, None]:
    """The lines as bytes; what goes wrong on the way becomes a last line."""
    try:
        async for line in lines:
            yield to_json(line) + b"\n"
    except Exception as error:  # the status is sent already: this is the only place left to say it
        yield to_json(error_document(path, error_of(error))) + b"\n"
    finally:
        await lines.aclose()
