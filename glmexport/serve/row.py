"""One answer as it grows: what was asked, the token that comes next, and the text and tokens that are certain."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from glmexport.config import SpecialIds
from glmexport.generation import END, LENGTH, STOP, AnswerText
from glmexport.sampling import Sampler, Sampling, force_finite, log_softmax
from glmexport.serve.rows import Logits
from glmexport.tokenizer import Tokenizer

CANCELLED, LATE, STOPPED, LOST = "cancelled", "late", "stopped", "lost"
"""Why an answer ended, beside `END`, `LENGTH` and `STOP`: nobody waits for it any more; its time was over; the server
stops; it could not be computed."""


@dataclass(frozen=True)
class Ask:
    """What one row is to do.

    prompt_ids: as they are fed, `[gMASK]` and `<sop>` among them. max_tokens: new tokens at most, the end token among
    them. stop: texts before which the answer is cut. stop_ids: ids that end it beside the model's end token.
    ignore_end: go on after either. logprobs: None for none, else how many of the likeliest tokens to name with each
    chosen one. continued: ids at the end of the prompt whose text the answer goes on from. scored: ids that are fed
    first as if they had been chosen, for their logprobs; only with some may max_tokens be 0. deadline: of
    `time.monotonic`, after which it is LATE.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_end: bool = False
    logprobs: int | None = None
    continued: tuple[int, ...] = ()
    scored: tuple[int, ...] = ()
    deadline: float | None = None


@dataclass(frozen=True)
class Token:
    """A token and the natural logarithm of its probability, as the model gives it before anything is adjusted.

    top: the likeliest (id, logprob), likeliest first. start: characters of the answer before it. scored: whether it is
    one of `Ask.scored`.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    start: int
    scored: bool


@dataclass(frozen=True)
class End:
    """How an answer ended. Counts are tokens, times seconds.

    reason: END, LENGTH, STOP, CANCELLED, LATE, STOPPED or LOST. error: a sentence for the latter three. decode: from
    the first token to the last.
    """

    reason: str
    prompt_tokens: int
    answer_tokens: int
    queued: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Piece:
    """What has become certain of an answer; `end` comes with the last one. tokens: where logprobs are asked for."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    end: End | None = None


class Row:
    """The state of one answer between steps; `sink` takes its pieces."""

    def __init__(
        self, ask: Ask, tokenizer: Tokenizer | None, special: SpecialIds, sink: Callable[[Piece], None]
    ) -> None:
        self.ask, self.sink = ask, sink
        self.slot = -1
        self.cancelled = self.over = False  # over: its last piece is out
        self.ask_to_fail: str | None = None  # the sentence to end with at the next step
        self.asked_at = time.monotonic()
        self.begun_at = self.first_at = self.asked_at
        self.latest = -1  # the token to be fed next
        self.count = 0
        self._forced = special.forced
        self._ends = frozenset() if ask.ignore_end else frozenset((special.eos, *ask.stop_ids))
        self._sampler = Sampler(ask.sampling, ask.prompt_ids, special.forced)
        self._text = AnswerText(tokenizer, ask.stop, (*ask.continued, *ask.scored))
        self._scored = deque(ask.scored)
        self._pending: list[Token] = []  # tokens whose text is held back
        self._given = 0  # characters given out

    def take(self, logits: Logits) -> Piece:
        """Choose the next token from float32 [vocab]; gives what is certain now, with `end` where that was the last."""
        scored = bool(self._scored)
        if scored:
            token = self._scored.popleft()
            self._sampler.follow(token)
        else:
            token = self._sampler.choose(logits)
            self.count += 1
        self.latest = token
        ended = not scored and token in self._ends
        if self.ask.logprobs is not None and not ended:
            self._pending.append(self._described(token, logits, scored))
        if scored:
            return Piece() if self._scored or self.ask.max_tokens else self._last(LENGTH, "")
        if ended:
            return self._last(END, "")
        text = self._text.push(token)
        if self._text.stopped:
            return self._last(STOP, text)
        if self.count >= self.ask.max_tokens:
            return self._last(LENGTH, text)
        self._given += len(text)
        return Piece(text, self._released()) if text else Piece()

    def failed(self, reason: str, error: str | None = None) -> Piece:
        """The last piece of an answer that ends where it is."""
        return Piece(end=self._end(reason, error))

    def _last(self, reason: str, text: str) -> Piece:
        rest = text + self._text.finish()
        if self._text.stopped:
            reason = STOP
        self._given += len(rest)
        if reason == STOP:
            self._pending = [token for token in self._pending if token.start < self._given or token.scored]
        return Piece(rest, self._released(), self._end(reason))

    def _end(self, reason: str, error: str | None = None) -> End:
        now = time.monotonic()
        return End(
            reason,
            len(self.ask.prompt_ids) + len(self.ask.scored),
            self.count,
            queued=self.begun_at - self.asked_at,
            prefill=max(self.first_at - self.begun_at, 0.0),
            decode=max(now - self.first_at, 0.0),
            error=error,
        )

    def _released(self) -> tuple[Token, ...]:
        tokens, self._pending = tuple(self._pending), []
        return tokens

    def _described(self, token: int, logits: Logits, scored: bool) -> Token:
        scores = logits.astype(np.float32)
        force_finite(scores, self._forced)
        logprobs = log_softmax(scores)
        count = min(self.ask.logprobs or 0, len(scores))
        top = np.argpartition(-logprobs, count - 1)[:count] if count else np.empty(0, np.int64)
        top = top[np.argsort(-logprobs[top], kind="stable")]
        ranked = tuple((int(other), float(logprobs[other])) for other in top)
        return Token(token, float(logprobs[token]), ranked, self._given, scored)
