"""The bodies of OpenAI's requests, and what other servers added to them."""

from __future__ import annotations

from typing import Any

from glmexport.errors import GlmExportError
from glmexport.serve.prompts import ROLES, Message
from glmexport.serve.replies import ApiError, Form

MAX_CHOICES = 64
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64


class MessageForm(Form):
    """One message. content: a text, or parts of which all are texts."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class StreamOptionsForm(Form):
    """`stream_options`."""

    include_usage: bool | None = None


class AnswerForm(Form):
    """What both requests have."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptionsForm | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    truncate: bool | None = None

    @property
    def choices(self) -> int:
        """How many answers are wanted. Raises ApiError."""
        count = 1 if self.n is None else self.n
        if not 1 <= count <= MAX_CHOICES:
            raise ApiError(400, f"n is {count}, expected 1 to {MAX_CHOICES}.", param="n")
        return count

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def parameters(self) -> dict[str, Any]:
        """What it says, by a Modelfile's names. Raises ApiError."""
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ApiError(400, f"max_tokens is {self.max_tokens}, expected 1 or more.", param="max_tokens")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise ApiError(400, f"stop: expected at most {MAX_STOPS} texts, none of them empty.", param="stop")
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repeat_penalty": self.repetition_penalty,
            "logit_bias": _biases(self.logit_bias),
            "stop": stops or None,
        }
        return {name: value for name, value in given.items() if value is not None}

    def more(self) -> dict[str, Any]:
        """What an `Ask` has beside sampling."""
        return {"stop_ids": frozenset(self.stop_token_ids or ()), "ignore_end": bool(self.ignore_eos)}


class ChatForm(AnswerForm):
    """The body of `/v1/chat/completions`."""

    messages: list[MessageForm]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most, None for as many as fit. Raises ApiError."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if limit is not None and limit < 1:
            raise ApiError(400, f"max_tokens is {limit}, expected 1 or more.", param="max_tokens")
        return limit

    @property
    def named(self) -> int | None:
        """How many of the likeliest tokens to name, None for no logprobs. Raises ApiError."""
        count = self.top_logprobs or 0
        if not 0 <= count <= MAX_TOP_LOGPROBS:
            raise ApiError(400, f"top_logprobs is {count}, expected 0 to {MAX_TOP_LOGPROBS}.", param="top_logprobs")
        if count and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
        return count if self.logprobs else None

    def chat(self) -> list[Message]:
        """The messages. Raises ApiError for what the model cannot take."""
        if (self.tools or self.functions) and self.tool_choice != "none":
            raise ApiError(400, "tools: the model knows no tools; leave them out.", param="tools")
        kind = (self.response_format or {}).get("type", "text")
        if kind != "text":
            raise ApiError(
                400, f"response_format: {kind!r:.40} is not supported; ask for it in words.", param="response_format"
            )
        return [message_of(message, number) for number, message in enumerate(self.messages)]


class CompletionForm(AnswerForm):
    """The body of `/v1/completions`. prompt: a text or ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None

    @property
    def named(self) -> int | None:
        """As of a chat."""
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise ApiError(400, f"logprobs is {self.logprobs}, expected 0 to {MAX_TOP_LOGPROBS}.", param="logprobs")
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each prompt. Raises ApiError."""
        if self.suffix:
            raise ApiError(400, "suffix is not supported; leave it out.", param="suffix")
        if self.best_of is not None and self.best_of != self.choices:
            raise ApiError(400, "best_of is supported where it equals n only.", param="best_of")
        prompt = "" if self.prompt is None else self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise ApiError(400, "prompt: the list is empty.", param="prompt")
        if isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        if len(prompt) * self.choices > MAX_CHOICES:
            raise ApiError(400, f"prompt: {len(prompt)} with n {self.choices}, expected {MAX_CHOICES} at most in all.")
        return [one for one in prompt if not isinstance(one, int)]


def message_of(form: MessageForm, number: int) -> Message:
    """A message as prompts are made of. Raises ApiError for what the model cannot take."""
    where = f"messages.{number}"
    if form.role not in ROLES or form.tool_calls:
        raise ApiError(
            400,
            f"{where}: a role is {form.role!r:.40}, expected one of {', '.join(ROLES)}, without tools.",
            param=where,
        )
    if isinstance(form.content, list):
        parts = [part.get("text") if part.get("type") == "text" else None for part in form.content]
        if not all(isinstance(part, str) for part in parts):
            raise ApiError(400, f"{where}: the model takes texts only.", param=where)
        return Message(ROLES[form.role], "".join(str(part) for part in parts))
    return Message(ROLES[form.role], form.content or "")


def _biases(given: dict[str, float] | None) -> dict[int, float] | None:
    """By id. Raises GlmExportError for keys that are none."""
    if not given:
        return None
    wrong = [key for key in given if not (key.isascii() and key.isdecimal() and len(key) < 10)]
    if wrong:
        raise GlmExportError(f"logit_bias names {wrong[0]!r:.40}, expected ids.")
    return {int(key): value for key, value in given.items()}
