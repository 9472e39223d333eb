"""The generation loop: a prompt through the graphs, token by token, and the text that comes of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport import names
from glmexport.errors import GlmExportError
from glmexport.prompt import prepare_prompt
from glmexport.sampling import Sampler, Sampling
from glmexport.session import Session
from glmexport.tokenizer import Tokenizer

Array = npt.NDArray[Any]

END, LENGTH, STOP = "end", "length", "stop"
"""Why an answer ended: the model's end token; `max_tokens` or the model's positions; a stop text."""


@dataclass
class Stats:
    """Times in seconds. prefill_tokens: of the prompt. decode_tokens: fed one by one after it.

    kv_bytes: of the KV cache at its longest. held_bytes: of the bundle's graphs, at the end.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    kv_bytes: int = 0
    held_bytes: int = 0

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens a second."""
        return self.prefill_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_speed(self) -> float:
        """Tokens a second after the first one; 0 where there was no second one."""
        return self.decode_tokens / max(self.decode_seconds, 1e-9)


class Decoder:
    """A batch of prompts being continued: feeds each block's KV cache back."""

    def __init__(self, session: Session, rows: list[list[int]]) -> None:
        """rows: ids of each prompt, of any lengths. Raises GlmExportError where one is no prompt or is too long."""
        check_length(session, max(map(len, rows)))
        self._session = session
        self._prompt = prepare_prompt(rows, session.config.special_ids)
        self._pasts = session.empty_pasts(len(rows))
        self._fed = -1  # decode steps so far

    @property
    def length(self) -> int:
        """Places in the KV cache, padding included."""
        return int(self._prompt.input_ids.shape[1]) + max(self._fed, 0)

    def prefill(self) -> dict[str, Array]:
        """Run the prompts; returns what the LM head gives for their last places (`Session.head`)."""
        prompt = self._prompt
        hidden = self._session.forward(prompt.input_ids, prompt.attention_mask, prompt.position_ids, self._pasts)
        self._fed = 0
        return self._session.head(hidden[-1:])

    def step(self, tokens: Sequence[int]) -> dict[str, Array]:
        """Feed one token a row; returns what the LM head gives for it."""
        mask, positions = self._prompt.decode_step(self._fed)
        hidden = self._session.forward(np.array(tokens, np.int64)[:, None], mask, positions, self._pasts)
        self._fed += 1
        return self._session.head(hidden)


class Generation:
    """One answer as it comes: iterate over it for pieces of text, or ask for all of it.

    ids: the new ids so far, the end token among them. finish_reason: one of END, LENGTH, STOP once it is done.
    prompt_ids: what was fed first.
    """

    def __init__(
        self, session: Session, prompt_ids: list[int], sampling: Sampling, max_tokens: int, stop: Sequence[str]
    ) -> None:
        self.prompt_ids, self.ids = prompt_ids, list[int]()
        self.stats = Stats()
        self.finish_reason: str | None = None
        self._session, self._limit = session, max_tokens
        self._sampler = Sampler(sampling, prompt_ids, session.config.special_ids.forced)
        self._argmax = sampling.is_argmax
        self._decoder = Decoder(session, [prompt_ids])
        self._text = ""
        self._pieces = self._generate(AnswerText(session.tokenizer if session.has_tokenizer else None, stop))

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, each as soon as it is certain; empty where the bundle has no tokenizer."""
        return self._pieces

    @property
    def text(self) -> str:
        """All of the answer, waited for."""
        for _ in self._pieces:
            pass
        return self._text

    def _generate(self, answer: AnswerText) -> Iterator[str]:
        for token in self._tokens():
            piece = answer.push(token) if self.finish_reason != END else ""
            if piece:
                self._text += piece
                yield piece
            if answer.stopped:
                self.finish_reason = STOP
                break
        rest = answer.finish()
        self.finish_reason = STOP if answer.stopped else self.finish_reason
        if rest:
            self._text += rest
            yield rest

    def _tokens(self) -> Iterator[int]:
        end = self._session.config.special_ids.eos
        outputs = self._timed_prefill()
        while True:
            token = self._choose(outputs)
            self.ids.append(token)
            if token == end:
                self.finish_reason = END
            elif len(self.ids) == self._limit:
                self.finish_reason = LENGTH
            yield token
            if self.finish_reason is not None:
                return
            begun = time.perf_counter()
            outputs = self._decoder.step([token])
            self.stats.decode_seconds += time.perf_counter() - begun
            self.stats.decode_tokens += 1
            self._measure()

    def _timed_prefill(self) -> dict[str, Array]:
        begun = time.perf_counter()
        outputs = self._decoder.prefill()
        self.stats.prefill_seconds = time.perf_counter() - begun
        self.stats.prefill_tokens = len(self.prompt_ids)
        self._measure()
        return outputs

    def _measure(self) -> None:
        self.stats.kv_bytes = self._session.kv_bytes(1, self._decoder.length)
        self.stats.held_bytes = self._session.held_bytes

    def _choose(self, outputs: dict[str, Array]) -> int:
        if names.LOGITS in outputs:
            return self._sampler.choose(outputs[names.LOGITS][0])
        if not self._argmax:
            raise GlmExportError(
                "The bundle's LM head gives the greedy token alone (--argmax only), nothing to sample from; generate "
                "with --greedy and without a repetition penalty, or split again without --argmax only."
            )
        return int(outputs[names.TOKEN_ID][0])


class AnswerText:
    """The text of an answer whose ids come one by one, up to the first of some stop texts.

    Held back is what later ids can change: part of a character, and what may be the beginning of a stop text.
    tokenizer: None for a bundle without one, whose answers have no text. before: ids that the answer goes on from.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._stream = tokenizer.stream() if tokenizer else None
        self._stop = StopTexts(stop)
        if self._stream:
            for token in before:
                self._stream.push(token)

    @property
    def stopped(self) -> bool:
        """Whether a stop text came; nothing is given out after it."""
        return self._stop.found

    def push(self, token: int) -> str:
        """The text that is certain from this id on. Raises GlmExportError where it is no id."""
        return self._stop.push(self._stream.push(token)) if self._stream else ""

    def finish(self) -> str:
        """What was held back; nothing may be pushed after it."""
        return self._stop.push(self._stream.finish()) + self._stop.finish() if self._stream else ""


@dataclass
class StopTexts:
    """Cuts a text that comes in pieces before the first of some stop texts to be complete.

    Held back is what may be the beginning of one. found: whether one came; nothing is given out after it.
    """

    stop: Sequence[str] = ()
    found: bool = False
    _held: str = field(default="", init=False)

    def push(self, text: str) -> str:
        """What is certain to stand before any stop text."""
        if self.found:
            return ""
        self._held += text
        ends = [(start + len(stop), start) for stop in self.stop if (start := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            ready, self._held = self._held[: min(ends)[1]], ""
            return ready
        longest = max((_overlap(self._held, stop) for stop in self.stop), default=0)
        ready, self._held = self._held[: len(self._held) - longest], self._held[len(self._held) - longest :]
        return ready

    def finish(self) -> str:
        """What was held back."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((count for count in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:count])), 0)


def generate(
    session: Session,
    prompt: str | Sequence[int],
    *,
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    special: bool = False,
) -> Generation:
    """Continue a prompt; tokens are computed as the result is iterated over.

    prompt: text, to which `[gMASK]` and `<sop>` are appended; or ids as they are fed, these two included. max_tokens:
    the most new tokens, the end token among them; None is as many as the model has positions for. stop: texts before
    which the answer is cut. special: whether `[gMASK]` and the like in a text mean those tokens.

    Raises GlmExportError: the prompt is no prompt, leaves no room for an answer, or cannot be written in this
    vocabulary.
    """
    if max_tokens is not None and max_tokens < 1:
        raise GlmExportError(f"At least one token must be asked for, found {max_tokens}.")
    stop = (stop,) if isinstance(stop, str) else stop
    if not all(stop):
        raise GlmExportError("A stop text is empty, which every answer holds; leave it out.")
    if stop and not session.has_tokenizer:
        raise GlmExportError("The bundle has no tokenizer, so stop texts cannot be found; leave them out.")
    ids = session.tokenizer.prompt_ids(prompt, special=special) if isinstance(prompt, str) else [*map(int, prompt)]
    vocab_size = session.config.vocab_size
    strange = [token for token in ids if not 0 <= token < vocab_size]
    if strange:
        raise GlmExportError(f"The prompt holds the id {strange[0]}, expected ids from 0 to {vocab_size - 1}.")
    room = check_length(session, len(ids))
    return Generation(session, ids, sampling or Sampling(), min(max_tokens or room, room), stop)


def check_length(session: Session, count: int) -> int:
    """How many tokens may follow a prompt of `count`. Raises GlmExportError where none may."""
    room = session.config.max_positions - count
    if room < 1:
        raise GlmExportError(
            f"The prompt has {count} tokens, the model {session.config.max_positions} positions for prompt and answer "
            "together; shorten the prompt."
        )
    return room
