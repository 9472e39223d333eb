"""From messages to the ids that are fed: the model's own chat format, or a Jinja template where one was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmexport.chat import Round, chat_prompt
from glmexport.errors import GlmExportError, reason_of
from glmexport.tokenizer import Tokenizer
from glmexport.untrusted import read_small_file

if TYPE_CHECKING:
    from jinja2 import Template

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT}
MAX_TEMPLATE_BYTES = 1 << 20
MAX_PROMPT_CHARACTERS = 1 << 22
ROOM_SHARE = 4
"""A truncated prompt leaves at least one place in so many to the answer."""


@dataclass(frozen=True)
class Message:
    """One message of a chat. role: SYSTEM, USER or ASSISTANT."""

    role: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """ids: as they are fed. continued: those at the end whose text the answer goes on from."""

    ids: tuple[int, ...]
    continued: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chat:
    """Messages as the model's format has them. unfinished: of an answer that is to be gone on with."""

    system: str
    history: tuple[Round, ...]
    query: str
    unfinished: str = ""

    def shorter(self) -> Chat:
        """Without its oldest round."""
        return Chat(self.system, self.history[1:], self.query, self.unfinished)


def chat_of(messages: Sequence[Message]) -> Chat:
    """Rounds of messages.

    Messages of one role that follow each other are one; a last one of the assistant is gone on with. Raises
    GlmExportError where there is nothing to answer.
    """
    system = "\n".join(message.text for message in messages if message.role == SYSTEM)
    turns: list[tuple[str, str]] = []
    for message in messages:
        if message.role == SYSTEM:
            continue
        if turns and turns[-1][0] == message.role:
            turns[-1] = (message.role, f"{turns[-1][1]}\n{message.text}")
        else:
            turns.append((message.role, message.text))
    if turns and turns[0][0] == ASSISTANT:
        turns.insert(0, (USER, ""))
    texts = [text for _, text in turns]
    if not texts:
        raise GlmExportError("The messages hold nothing to answer; the last one must be the user's.")
    unfinished = texts.pop() if len(texts) % 2 == 0 else ""
    query = texts.pop()
    return Chat(system, tuple(zip(texts[::2], texts[1::2], strict=True)), query, unfinished)


def begun_chat(system: str, messages: Sequence[tuple[str, str]]) -> tuple[str, tuple[Round, ...]]:
    """(what holds for all of a chat, its first rounds) as a Modelfile gives them; a last question has no answer."""
    said = [Message(SYSTEM, system)] if system else []
    said += [Message(role, text) for role, text in messages]
    if not any(message.role != SYSTEM for message in said):
        return "\n".join(message.text for message in said), ()
    chat = chat_of(said)
    return chat.system, (*chat.history, (chat.query, chat.unfinished))


def chat_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], template: Callable[[Sequence[Message]], str] | None
) -> Prompt:
    """The prompt of a chat. Raises GlmExportError."""
    if template is not None:
        return text_ids(tokenizer, template(messages))
    return _ids_of(tokenizer, chat_of(messages))


def truncated_chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], room: int, max_tokens: int | None) -> Prompt:
    """The prompt of a chat without as many of its oldest rounds as make it fit into `room` places with an answer.

    Raises GlmExportError where the last question alone does not fit.
    """
    chat, most = chat_of(messages), room - _reserve(room, max_tokens)
    prompt = _ids_of(tokenizer, chat)
    while len(prompt.ids) > most and chat.history:
        chat = chat.shorter()
        prompt = _ids_of(tokenizer, chat)
    return prompt


def text_ids(tokenizer: Tokenizer, text: str, *, room: int | None = None, max_tokens: int | None = None) -> Prompt:
    """The prompt of a text. room: places it must fit into with an answer, the beginning cut; None cuts nothing."""
    _demand_length(text)
    ids = tokenizer.prompt_ids(text)
    if room is not None:
        most = room - _reserve(room, max_tokens)
        ids = ids[max(len(ids) - most, 0) :]
    return Prompt(tuple(ids))


def jinja_template(path: Path) -> Callable[[Sequence[Message]], str]:
    """A function from messages to the prompt's text, which runs a template where it can touch nothing else.

    Raises GlmExportError, also for what goes wrong in the template later; CheckpointError for no such file.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise GlmExportError("A chat template needs jinja2: pip install glmexport[serve].") from error
    source = read_small_file(path, MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        template: Template = environment.from_string(source)
    except TemplateError as error:
        raise GlmExportError(f"{path} is no Jinja template ({reason_of(error)}); correct it.") from error

    def render(messages: Sequence[Message]) -> str:
        dictionaries = [{"role": message.role, "content": message.text} for message in messages]
        try:
            return template.render(messages=dictionaries, add_generation_prompt=True)
        except Exception as error:  # a template can raise anything
            raise GlmExportError(f"The chat template could not be rendered ({reason_of(error)}).") from error

    return render


def _ids_of(tokenizer: Tokenizer, chat: Chat) -> Prompt:
    text = chat_prompt(chat.query, chat.history, chat.system)
    _demand_length(text)
    ids = tokenizer.prompt_ids(text)
    continued = tokenizer.encode(chat.unfinished) if chat.unfinished else []
    return Prompt((*ids, *continued), tuple(continued))


def _reserve(room: int, max_tokens: int | None) -> int:
    """Places that a truncated prompt leaves to the answer."""
    return max(min(max_tokens or room, room // ROOM_SHARE), 1)


def _demand_length(text: str) -> None:
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise GlmExportError(f"The prompt has {len(text)} characters, expected at most {MAX_PROMPT_CHARACTERS}.")
