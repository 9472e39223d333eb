"""One thread that computes many answers at once: rows join and leave at every step, in the order in which they came."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from glmexport.config import SpecialIds
from glmexport.errors import GlmExportError, means_no_memory
from glmexport.serve.row import CANCELLED, LATE, LOST, STOPPED, Ask, Piece, Row
from glmexport.serve.rows import Logits, RowRunner
from glmexport.tokenizer import Tokenizer

LOGGER = logging.getLogger("glmexport.serve")
TOO_LATE = "The time limit of the request was over before the answer was complete; ask for fewer tokens."
NO_MEMORY = "There was not enough memory for the answer; ask again, or serve fewer rows (--max-num-seqs)."
BROKEN = "The answer could not be computed; the server's log has the reason."
DEFAULT_SECONDS = 5.0
MAX_RETRY_AFTER = 120


class QueueFullError(GlmExportError):
    """More answers wait than may. retry_after: whole seconds after which there is likely to be room."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoppedError(GlmExportError):
    """The engine takes no more questions."""


class Watch:
    """What an engine tells of its work, from its own thread; this one does not listen. Times are seconds."""

    def begun(self, queued: float) -> None:
        """A row left the queue."""

    def first_token(self, since_asked: float) -> None:
        """A prompt was computed."""

    def step(self, seconds: float, rows: int) -> None:
        """One token was computed for each of so many rows."""

    def ended(self, row: Row, piece: Piece) -> None:
        """An answer's last piece."""


class Answers:
    """The rows of one question, to be cancelled together."""

    def __init__(self, rows: Sequence[Row], wake: Callable[[], None]) -> None:
        self._rows, self._wake = rows, wake

    def cancel(self) -> None:
        """Let the slots be freed at the next step; what has ended already stays as it is."""
        for row in self._rows:
            row.cancelled = True
        self._wake()


class Engine:
    """Owns a runner and the thread that drives it.

    Each step drops the rows that nobody waits for, gives free slots to the rows that wait longest, computes their
    prompts whole, and then one token for every row. A row's slot has room for all it may become, so nothing is ever
    taken back. max_queue: rows that may wait. max_batched_tokens: of prompts begun in one step, together; None is one
    prompt a step. tokenizer: None for a bundle without one.
    """

    def __init__(
        self,
        runner: RowRunner,
        tokenizer: Tokenizer | None,
        special: SpecialIds,
        *,
        max_queue: int = 64,
        max_batched_tokens: int | None = None,
        watch: Watch | None = None,
        name: str = "model",
    ) -> None:
        self.runner = runner
        self._tokenizer, self._special, self._watch = tokenizer, special, watch or Watch()
        self._max_queue, self._budget = max_queue, max_batched_tokens
        self._waiting: deque[Row] = deque()
        self._active: list[Row] = []
        self._free = list(range(runner.slots))[::-1]
        self._changed = threading.Condition()
        self._closing: str | None = None
        self._seconds = DEFAULT_SECONDS  # that a row stays in its slot, a running mean
        self._thread = threading.Thread(target=self._run, name=f"engine of {name}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Rows in slots."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread is there to answer."""
        return self._thread.is_alive()

    def submit(self, asks: Sequence[Ask], sink: Callable[[int, Piece], None]) -> Answers:
        """Enter rows, all or none; `sink` takes (number of the row, piece) from the engine's thread, and must not wait.

        Raises QueueFullError; StoppedError; GlmExportError for a prompt that leaves no room in a slot.
        """
        for ask in asks:
            self._demand_room(ask)
        rows = [Row(ask, self._tokenizer, self._special, partial(sink, number)) for number, ask in enumerate(asks)]
        with self._changed:
            if self._closing is not None:
                raise StoppedError(self._closing)
            ahead = len(self._waiting) + len(self._active)
            if len(self._waiting) + len(rows) > self._max_queue + max(self.runner.slots - len(self._active), 0):
                rounds = math.ceil((ahead + 1) / self.runner.slots)
                raise QueueFullError(
                    f"The server is busy: {len(self._active)} answers are being computed and {len(self._waiting)} "
                    f"wait, expected at most {self._max_queue}; try again later.",
                    min(max(math.ceil(rounds * self._seconds / 2), 1), MAX_RETRY_AFTER),
                )
            self._waiting.extend(rows)
            self._changed.notify_all()
        return Answers(rows, self._wake)

    def stop(self, sentence: str, *, drain: bool = True) -> None:
        """Take no more questions; tell those that wait, and the running ones too unless they may `drain`."""
        with self._changed:
            self._closing = self._closing or sentence
            waiting, self._waiting = [*self._waiting], deque()
            if not drain:
                for row in self._active:
                    row.ask_to_fail = sentence
            self._changed.notify_all()
        for row in waiting:
            self._finish(row, row.failed(STOPPED, sentence))

    def join(self, timeout: float | None = None) -> bool:
        """Wait, after `stop`, until the running answers have ended and the runner is closed; whether they have."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _demand_room(self, ask: Ask) -> None:
        length, room = len(ask.prompt_ids) + len(ask.scored), self.runner.max_length
        most = room if self._budget is None else min(room, self._budget)
        if length + (ask.max_tokens > 0) > room or len(ask.prompt_ids) > most:
            raise GlmExportError(
                f"The prompt has {length} tokens, the context {most} for prompt and answer together; shorten "
                "the prompt."
            )
        if length + ask.max_tokens > room:
            raise GlmExportError(f"{length} and {ask.max_tokens} tokens were asked for, expected {room} together.")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self._wait():
                self.step()
        finally:
            self._closing = self._closing or BROKEN
            for row in (*self._active, *self._waiting):
                self._finish(row, row.failed(LOST, self._closing))
            self._active, self._waiting = [], deque()
            self.runner.close()

    def _wait(self) -> bool:
        """Until there is something to do; false where nothing ever will be."""
        with self._changed:
            while not self._waiting and not self._active:
                if self._closing is not None:
                    return False
                self._changed.wait()
        return True

    def step(self) -> None:
        """Drop, admit, compute one token for every row."""
        self._drop()
        begun = self._admit()
        rows = [row for row in self._active if row not in begun]
        if not rows:
            return
        started = time.monotonic()
        try:
            logits = self.runner.decode([row.slot for row in rows], [row.latest for row in rows])
        except Exception as error:  # whatever a runtime raises: these answers are lost, the server is not
            for row in rows:
                self._lose(row, error)
            return
        for row, scores in zip(rows, logits, strict=True):
            self._take(row, scores)
        self._watch.step(time.monotonic() - started, len(rows))

    def _drop(self) -> None:
        """End the rows that are cancelled, late, or to be told that the server stops."""
        now = time.monotonic()
        with self._changed:
            rows = [*self._active, *self._waiting]
        for row in rows:
            if row.cancelled:
                self._end(row, row.failed(CANCELLED))
            elif row.ask_to_fail is not None:
                self._end(row, row.failed(STOPPED, row.ask_to_fail))
            elif row.ask.deadline is not None and now > row.ask.deadline:
                self._end(row, row.failed(LATE, TOO_LATE))

    def _admit(self) -> list[Row]:
        """Compute the prompts of the rows that are first in the queue; gives the rows that now have a token."""
        begun: list[Row] = []
        tokens = 0
        while True:
            with self._changed:
                if not self._waiting or not self._free:
                    return begun
                row = self._waiting[0]
                tokens += len(row.ask.prompt_ids)
                if begun and (self._budget is None or tokens > self._budget):
                    return begun
                self._waiting.popleft()
                row.slot = self._free.pop()
                self._active.append(row)
            begun.append(row)
            self._begin(row)

    def _begin(self, row: Row) -> None:
        row.begun_at = row.first_at = time.monotonic()
        self._watch.begun(row.begun_at - row.asked_at)
        try:
            logits = self.runner.prefill(row.slot, row.ask.prompt_ids)
        except Exception as error:  # as above
            self._lose(row, error)
            return
        row.first_at = time.monotonic()
        self._watch.first_token(row.first_at - row.asked_at)
        self._take(row, logits)

    def _take(self, row: Row, logits: Logits) -> None:
        try:
            piece = row.take(logits)
        except Exception as error:  # as above
            self._lose(row, error)
            return
        if piece.end is not None:
            self._end(row, piece)
        elif piece.text or piece.tokens:
            self._give(row, piece)

    def _lose(self, row: Row, error: Exception) -> None:
        """End a row whose answer cannot be computed."""
        LOGGER.error("An answer could not be computed", exc_info=error)
        expected = isinstance(error, GlmExportError)
        sentence = NO_MEMORY if means_no_memory(error) else str(error) if expected else BROKEN
        self._end(row, row.failed(LOST, sentence))

    def _end(self, row: Row, piece: Piece) -> None:
        """Free the slot before anybody hears of the end."""
        with self._changed:
            if row in self._active:
                self._active.remove(row)
                self.runner.free(row.slot)
                self._free.append(row.slot)
                self._seconds += 0.1 * (time.monotonic() - row.begun_at - self._seconds)
            elif row in self._waiting:
                self._waiting.remove(row)
        self._finish(row, piece)

    def _finish(self, row: Row, piece: Piece) -> None:
        with self._changed:
            if row.over:
                return
            row.over = True
        self._watch.ended(row, piece)
        self._give(row, piece)

    def _give(self, row: Row, piece: Piece) -> None:
        try:
            row.sink(piece)
        except RuntimeError:  # the event loop it went to is closed: nobody waits
            row.cancelled = True
