"""Rows in slots of one cache: what each gives is what it gives alone, whoever comes and goes beside it."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import split_directory

from glmexport.errors import GlmExportError
from glmexport.serve.rows import InPlaceRows, PortableRows
from glmexport.serve.throughput import throughput
from glmexport.session import Session

CLOSE = 2e-4  # batched and single rows take different kernels


@pytest.fixture(scope="module")
def fast(shared, golden_checkpoint):
    return shared("fast-golden", lambda path: split_directory(golden_checkpoint, path, opset=17, flavor="both"))


@pytest.fixture
def runners(fast):
    """The runner in slots, and the one that computes each row by itself."""
    ours = InPlaceRows(Session(fast, threads=1, flavor="ort"), 4)
    alone = PortableRows(Session(fast, threads=1, flavor="portable"), 4)
    yield ours, alone
    ours.close()
    alone.close()


def prompt(runner, count, seed):
    config = runner._session.config
    ids, random = config.special_ids, np.random.default_rng(seed)
    low = config.num_image_tokens + 4
    return [*random.integers(low, low + 500, count).tolist(), ids.gmask, ids.bos]


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=CLOSE * float(np.abs(expected).max()))


def test_rows_that_come_and_go_give_what_they_give_alone(runners):
    ours, alone = runners
    random = np.random.default_rng(3)
    active: dict[int, int] = {}
    for step in range(60):
        free = [slot for slot in range(4) if slot not in active]
        if free and random.random() < 0.3:
            slot = int(random.choice(free))
            ids = prompt(ours, int(random.integers(1, 90)), step)
            found, expected = ours.prefill(slot, ids), alone.prefill(slot, ids)
            assert_close(found, expected)
            active[slot] = int(expected.argmax())
        elif active and random.random() < 0.1:
            slot = int(random.choice([*active]))
            ours.free(slot)
            alone.free(slot)
            del active[slot]
        if active:
            chosen = [slot for slot in active if random.random() < 0.8] or [*active]
            random.shuffle(chosen)
            tokens = [active[slot] for slot in chosen]
            found, expected = ours.decode(chosen, tokens), alone.decode(chosen, tokens)
            assert_close(found, expected)
            active |= {slot: int(row.argmax()) for slot, row in zip(chosen, expected, strict=True)}


def test_a_row_whose_cache_is_full_to_the_last_place_may_wait_while_others_go_on(runners):
    ours, alone = runners
    waiting, going = prompt(ours, 62, 1), prompt(ours, 3, 2)  # 64 places, which is all the room there is
    assert_close(ours.prefill(0, waiting), alone.prefill(0, waiting))
    assert_close(ours.prefill(1, going), alone.prefill(1, going))
    for token in (9, 8, 7):
        assert_close(ours.decode([1], [token]), alone.decode([1], [token]))
    assert_close(ours.decode([1, 0], [5, 6]), alone.decode([1, 0], [5, 6]))


def test_the_cache_is_made_anew_when_nobody_is_left(runners):
    ours, _ = runners
    ours.prefill(2, prompt(ours, 100, 1))
    assert ours._cache.capacity >= 102
    ours.free(2)
    assert ours._cache.capacity == 0
    ours.free(2)


def test_the_throughput_is_measured_for_as_many_rows_as_there_are_slots(runners):
    ours, _ = runners
    points = throughput(ours, prompt(ours, 5, 1), tokens=2, warm_up=1)
    assert [point.rows for point in points] == [1, 2, 4]
    assert not ours._rows


def test_what_cannot_be_is_refused(fast):
    with Session(fast, threads=1) as session, pytest.raises(GlmExportError, match="expected at least 1"):
        InPlaceRows(session, 0)
