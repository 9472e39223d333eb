"""The map between a checkpoint's ids and a bundle's, against a dictionary; its JSON, which is not trusted."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmexport.vocabulary import VocabularyMap

KEPT = ((0, 2), (5, 6), (8, 12))


@st.composite
def maps(draw: st.DrawFn) -> tuple[int, list[int]]:
    """(rows, ids to keep in any order, some of them twice)."""
    full_size = draw(st.integers(1, 60))
    return full_size, draw(st.lists(st.integers(0, full_size - 1), min_size=1, max_size=90))


@given(maps(), st.booleans())
def test_ids_as_a_dictionary_has_them(case, as_array):
    full_size, ids = case
    vocabulary = VocabularyMap.from_ids(np.array(ids) if as_array else iter(ids), full_size)
    new_of = {old: new for new, old in enumerate(sorted(set(ids)))}
    every = range(full_size)
    assert vocabulary.size == len(new_of)
    assert vocabulary.old_ids().dtype == np.int64
    assert vocabulary.old_ids().tolist() == list(new_of)
    assert vocabulary.to_new(np.array(every)).tolist() == [new_of.get(old, -1) for old in every]
    assert vocabulary.to_old(np.arange(vocabulary.size)).tolist() == list(new_of)
    for old in every:
        if old in new_of:
            assert vocabulary.new_id(old) == new_of[old]
        else:
            with pytest.raises(KeyError):
                vocabulary.new_id(old)
    assert vocabulary.is_identity == (len(new_of) == full_size) == (vocabulary == VocabularyMap.identity(full_size))
    assert [old for start, stop in vocabulary.kept for old in range(start, stop)] == list(new_of)
    assert all(left[1] < right[0] for left, right in zip(vocabulary.kept, vocabulary.kept[1:], strict=False))


@given(maps(), st.integers(1, 70))
def test_a_table_in_bands(case, band):
    full_size, ids = case
    vocabulary = VocabularyMap.from_ids(ids, full_size)
    table = np.random.default_rng(0).standard_normal((full_size, 3), dtype=np.float32)
    edges = [(start, min(start + band, full_size)) for start in range(0, full_size, band)]
    bands = [vocabulary.select(start, stop, table[start:stop]) for start, stop in edges]
    assert np.array_equal(np.concatenate(bands), table[sorted(set(ids))])


@given(maps())
def test_json_and_back(case):
    full_size, ids = case
    vocabulary = VocabularyMap.from_ids(ids, full_size)
    assert VocabularyMap.from_json(json.loads(json.dumps(vocabulary.as_json()))) == vocabulary


def test_what_the_json_looks_like():
    document = {"full_size": 12, "kept": [[0, 2], [5, 6], [8, 12]]}
    assert VocabularyMap(12, KEPT).as_json() == document
    assert VocabularyMap.from_json(document) == VocabularyMap(12, KEPT)
    assert VocabularyMap.identity(7).as_json() == {"full_size": 7, "kept": [[0, 7]]}


def test_shapes_stay():
    vocabulary = VocabularyMap(12, KEPT)
    old = np.array([[0, 1, 5], [8, 2, 11]])
    assert vocabulary.to_new(old).tolist() == [[0, 1, 2], [3, -1, 6]]
    assert vocabulary.to_old(np.array([[3], [6]])).tolist() == [[8], [11]]
    assert vocabulary.to_old(np.array(3)).shape == ()
    assert vocabulary.to_old(np.zeros((0, 4), np.int64)).shape == (0, 4)


def test_rows_that_stand_together_are_not_copied():
    vocabulary = VocabularyMap(12, KEPT)
    rows = np.zeros((6, 2))
    assert vocabulary.select(6, 12, rows).base is rows
    assert vocabulary.select(0, 6, rows).shape == (3, 2)
    assert vocabulary.select(2, 5, rows[:3]).shape == (0, 2)
    assert vocabulary.select(4, 4, rows[:0]).shape == (0, 2)


def test_nobody_changes_the_ids():
    with pytest.raises(ValueError, match="read-only"):
        VocabularyMap(12, KEPT).old_ids()[0] = 1


def test_the_size_of_the_real_one():
    vocabulary = VocabularyMap.from_ids(np.arange(150528)[::2], 150528)
    assert len(vocabulary.kept) == vocabulary.size == 75264
    assert VocabularyMap.from_json(vocabulary.as_json()) == vocabulary
    assert np.array_equal(vocabulary.to_new(vocabulary.old_ids()), np.arange(75264))


@pytest.mark.parametrize(
    ("full_size", "kept", "reason"),
    [
        (0, [[0, 1]], "full_size must be a whole number from 1"),
        (-4, [[0, 1]], "full_size must be"),
        (True, [[0, 1]], "full_size must be"),
        (4.0, [[0, 1]], "full_size must be"),
        ("4", [[0, 1]], "full_size must be"),
        (1 << 60, [[0, 1]], "full_size must be"),
        (8, [], "at least one range"),
        (8, [[]], "pairs"),
        (8, [[1]], "pairs"),
        (8, [[1, 2, 3]], "pairs"),
        (8, [3], "pairs"),
        (8, {"0": 3}, "pairs"),
        (8, "01", "pairs"),
        (8, None, "pairs"),
        (8, [[False, True]], "whole numbers only"),
        (8, [[0, 1.0]], "whole numbers only"),
        (8, [[0, "1"]], "whole numbers only"),
        (8, [[0, None]], "whole numbers only"),
        (8, [[2, 2]], "ascending"),
        (8, [[3, 2]], "ascending"),
        (8, [[4, 6], [0, 2]], "ascending"),
        (8, [[0, 4], [2, 6]], "ascending"),
        (8, [[0, 4], [4, 6]], "ascending"),
        (8, [[-1, 4]], "must lie within 0 to 8, found -1 to 4"),
        (8, [[0, 4], [6, 9]], "must lie within 0 to 8, found 0 to 9"),
        (8, [[0, 1 << 70]], "must lie within"),
    ],
)
def test_json_that_is_no_map(full_size, kept, reason):
    with pytest.raises(ValueError, match=reason):
        VocabularyMap.from_json({"full_size": full_size, "kept": kept})


@pytest.mark.parametrize(
    "document", [None, [], 4, {}, {"full_size": 4}, {"kept": [[0, 4]]}, {"full_size": 4, "kept": [[0, 4]], "more": 1}]
)
def test_json_of_another_kind(document):
    with pytest.raises(ValueError, match="an object of full_size and kept"):
        VocabularyMap.from_json(document)


@pytest.mark.parametrize("kept", [[(0, 4)], ([0, 4],), ((0, 4, 5),), ((0, np.int64(4)),), ((np.True_, 4),), ()])
def test_ranges_of_other_types(kept: Any):
    with pytest.raises(ValueError, match="kept must"):
        VocabularyMap(8, kept)


@pytest.mark.parametrize("ids", [[], [-1], [8], [1.0], [True], ["1"], [1 << 70], [2, -(1 << 63)]])
def test_ids_that_cannot_be_kept(ids):
    with pytest.raises(ValueError, match=r"no id to keep|old ids must"):
        VocabularyMap.from_ids(ids, 8)


@pytest.mark.parametrize("wrong", [[-1], [0, 7], [0.0], [True], [1 << 40]])
def test_ids_that_are_none(wrong):
    vocabulary = VocabularyMap(12, KEPT)
    with pytest.raises(ValueError, match="new ids must"):
        vocabulary.to_old(np.array(wrong))
    outside = np.array([12]) if wrong == [0, 7] else np.array(wrong)
    with pytest.raises(ValueError, match="old ids must"):
        vocabulary.to_new(outside)
    for old in (-1, 2, 12):
        with pytest.raises(KeyError):
            vocabulary.new_id(old)


@pytest.mark.parametrize(("start", "stop", "count"), [(0, 4, 3), (-1, 3, 4), (10, 13, 3), (5, 3, 0)])
def test_rows_that_do_not_fit(start, stop, count):
    with pytest.raises(ValueError, match="are not rows"):
        VocabularyMap(12, KEPT).select(start, stop, np.zeros((count, 2)))
