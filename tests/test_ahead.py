"""Items made ahead come in order, errors come where the items would, and nothing goes on when nobody takes them."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from glmexport.ahead import Ahead, read_ahead
from glmexport.errors import GlmExportError


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read ahead")]


def test_what_is_read_ahead_comes_in_order():
    bands = [np.array([number]) for number in range(50)]
    assert [int(band[0]) for band in read_ahead(iter(bands))] == list(range(50))
    assert list(read_ahead(iter([]))) == []
    assert threads() == []


@pytest.mark.parametrize("error", [GlmExportError, KeyboardInterrupt, OSError])
def test_what_reading_raises_is_raised_where_it_is_used(error):
    def bands():
        yield np.zeros(1)
        raise error("while reading")

    seen = []
    with pytest.raises(error, match="while reading"):
        seen.extend(read_ahead(bands()))
    assert threads() == []


def test_a_consumer_that_stops_stops_the_thread():
    made = itertools.count()
    reading = read_ahead((np.array([number]) for number in made), depth=2)
    next(reading)
    time.sleep(0.05)
    assert threads()
    reading.close()
    assert threads() == []
    assert next(made) < 10, "no more than a few were made that nobody took"


def test_no_more_than_depth_wait():
    made = []

    def bands():
        for number in range(20):
            made.append(number)
            yield np.array([number])

    for taken, _ in enumerate(read_ahead(bands(), depth=3), 1):
        time.sleep(0.002)
        assert len(made) <= taken + 4, "three that wait and one that is being put"


def test_several_at_once_are_each_in_order():
    with ThreadPoolExecutor(3) as executor:
        made = [Ahead(lambda start=start: range(start, start + 40), executor, 2) for start in range(0, 200, 40)]
        assert [number for ahead in made for number in ahead] == list(range(200))


def test_one_that_waits_for_an_earlier_one():
    """As scales wait for the codes of their matrix."""
    known = threading.Event()

    def first():
        yield 1
        known.set()

    def second():
        assert known.wait(10)
        yield 2

    with ThreadPoolExecutor(2) as executor:
        made = [Ahead(make, executor, 1) for make in (first, second)]
        assert [number for ahead in made for number in ahead] == [1, 2]


def test_an_error_comes_behind_what_was_made_before_it():
    def failing():
        yield 1
        raise GlmExportError("while making")

    seen = []
    with ThreadPoolExecutor(1) as executor, pytest.raises(GlmExportError, match="while making"):
        seen.extend(Ahead(failing, executor))
    assert seen == [1]


def test_stopping_ends_what_nobody_takes():
    ended = []

    def endless():
        try:
            yield from itertools.count()
        finally:
            ended.append(True)

    with ThreadPoolExecutor(2) as executor:
        made = [Ahead(endless, executor) for _ in range(2)]
        assert next(iter(made[0])) == 0
        for ahead in made:
            ahead.stop()
    assert ended == [True, True]
