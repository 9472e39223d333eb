"""From a request to the pieces of its answers: a model in memory, rows in its engine, both given back at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from starlette.requests import Request

from glmexport.serve.engine import Answers
from glmexport.serve.models import Models, Use
from glmexport.serve.replies import ApiError
from glmexport.serve.row import CANCELLED, LATE, LOST, STOPPED, Ask, End, Piece
from glmexport.serve.store import Entry

GONE = 499
"""What access logs call a client that did not wait."""


_FAILURES = {
    LATE: (408, {"x-should-retry": "false"}),  # OpenAI's clients would ask, and wait, twice more
    STOPPED: (503, {"Retry-After": "5"}),
    LOST: (500, {}),
}


@dataclass(frozen=True)
class Choice:
    """A piece and the number of the answer that it belongs to."""

    index: int
    piece: Piece


class Asked:
    """One request's answers. begun: of `time.monotonic`. use: the model that gives them."""

    def __init__(self, use: Use, count: int, stack: AsyncExitStack) -> None:
        self.use, self.begun = use, time.monotonic()
        self._stack, self._open = stack, count
        self._choices: asyncio.Queue[Choice] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._first: Choice | None = None
        self._answers: Answers | None = None

    @property
    def seconds(self) -> float:
        """Since the request was taken up, loading included."""
        return time.monotonic() - self.begun + self.use.load_seconds

    def submit(self, asks: Sequence[Ask]) -> None:
        """Enter the engine's queue. Raises as `Engine.submit` does."""
        self._answers = self.use.served.engine.submit(asks, self._sink)

    async def wait_for_first(self) -> None:
        """Until there is something to send, so that what goes wrong before it has a status of its own."""
        self._first = await self._choices.get()
        end = self._first.piece.end
        if end is not None:
            demand_answer(end)

    async def choices(self) -> AsyncGenerator[Choice, None]:
        """Every piece as it comes, until each answer has ended."""
        while self._open:
            choice = self._first or await self._choices.get()
            self._first = None
            self._open -= choice.piece.end is not None
            yield choice

    def cancel(self) -> None:
        """Free the slots at the next step."""
        if self._answers is not None:
            self._answers.cancel()

    async def close(self) -> None:
        """Give everything back, whatever has been computed."""
        self.cancel()
        await self._stack.aclose()

    def _sink(self, number: int, piece: Piece) -> None:
        self._loop.call_soon_threadsafe(self._choices.put_nowait, Choice(number, piece))


async def ask(
    request: Request,
    models: Models,
    entry: Entry,
    keep_alive: float | None,
    build: Callable[[Use], Sequence[Ask]],
) -> Asked:
    """Load the model if need be, enter the rows that `build` makes, and wait for the first piece.

    A client that goes away cancels its rows at once. Raises ApiError and what `Models.use`, `build` and `submit` do.
    """
    stack = AsyncExitStack()
    try:
        use = await stack.enter_async_context(models.use(entry, keep_alive))
        asks = await asyncio.to_thread(build, use)  # a long text takes a while to tokenize
        asked = Asked(use, len(asks), stack)
        watcher = asyncio.create_task(_watch(request, asked))
        stack.callback(watcher.cancel)
        asked.submit(asks)
        stack.callback(asked.cancel)
        await asked.wait_for_first()
    except BaseException:
        await stack.aclose()
        raise
    return asked


def demand_answer(end: End) -> None:
    """Raise ApiError where an answer ended as none should."""
    if end.reason == CANCELLED:
        raise ApiError(GONE, "The client did not wait for the answer.")
    if end.reason in _FAILURES:
        status, headers = _FAILURES[end.reason]
        raise ApiError(status, end.error or "The answer could not be computed.", code=end.reason, headers=headers)


async def everything(asked: Asked) -> AsyncIterator[Choice]:
    """The pieces, until an answer fails. Raises ApiError then."""
    async for choice in asked.choices():
        if choice.piece.end is not None:
            demand_answer(choice.piece.end)
        yield choice


async def _watch(request: Request, asked: Asked) -> None:
    """Cancel the answers when the client goes away; the body has been read, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    asked.cancel()
