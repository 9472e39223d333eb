"""Iterating in threads, some items ahead of whoever takes them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """The items of an iterable, made by a thread of an executor while earlier ones are in use; at most `depth` wait.

    Iterate once. What making an item raises is raised where it would have been taken.
    """

    def __init__(self, make: Callable[[], Iterable[T]], executor: Executor, depth: int = 2) -> None:
        """make: called in the thread, so that nothing is begun before its turn."""
        self._waiting: deque[T] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        executor.submit(self._work, make)

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    break
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item
            del item  # it may be large, and the next one is waited for
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Have the thread end after the item that it makes."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _work(self, make: Callable[[], Iterable[T]]) -> None:
        try:
            for item in make():
                if not self._put(item):
                    break
        except BaseException as error:  # raised where the items are taken
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, item: T) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self._depth)
            self._waiting.append(item)
            self._changed.notify_all()
            return not self._stopped


def read_ahead(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items, made by a thread of its own; closing the generator stops the thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as executor:
        ahead = Ahead(lambda: items, executor, depth)
        try:
            yield from ahead
        finally:
            ahead.stop()
