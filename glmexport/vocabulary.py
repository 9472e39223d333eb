"""Which part of a checkpoint's vocabulary a bundle keeps: as rows of its tables, as pieces of its SentencePiece model.

A slimmed bundle numbers its rows from 0 in the checkpoint's order: new id = how many kept rows come before the old one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAX_ROWS = 1 << 24  # a hundred times what any vocabulary has; the tables below are allocated for it


@dataclass(frozen=True)
class VocabularyMap:
    """The kept rows of a vocabulary, as ranges of old ids; new ids follow from them.

    full_size: rows of the vocabulary in the checkpoint, padding included.
    kept: half-open ranges of old ids: ascending, disjoint, not adjacent, at least one, none empty, within `full_size`.

    ValueError where they are anything else.
    """

    full_size: int
    kept: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if type(self.full_size) is not int or not 0 < self.full_size <= _MAX_ROWS:
            raise ValueError(f"full_size must be a whole number from 1 to {_MAX_ROWS}, found {self.full_size!r:.80}")
        if not isinstance(self.kept, tuple) or not all(
            isinstance(pair, tuple) and len(pair) == 2 for pair in self.kept
        ):
            raise ValueError("kept must be a tuple of pairs (start, stop)")
        bounds = list(chain.from_iterable(self.kept))
        if not bounds:
            raise ValueError("kept must name at least one range")
        if set(map(type, bounds)) != {int}:
            raise ValueError("kept must hold whole numbers only")
        if not all(map(operator.lt, bounds, bounds[1:])):  # covers order, overlap, adjacency and empty ranges at once
            raise ValueError("kept must be ranges in ascending order that neither are empty nor touch one another")
        if bounds[0] < 0 or bounds[-1] > self.full_size:
            raise ValueError(f"kept must lie within 0 to {self.full_size}, found {bounds[0]} to {bounds[-1]}")

    @classmethod
    def identity(cls, full_size: int) -> VocabularyMap:
        """The map that keeps every row."""
        return cls(full_size, ((0, full_size),))

    @classmethod
    def from_ids(cls, ids: Iterable[int] | NDArray[np.integer[Any]], full_size: int) -> VocabularyMap:
        """The map that keeps the old ids given, in any order and any number of times; ValueError for other than ids."""
        old = np.unique(ids if isinstance(ids, np.ndarray) else np.array(list(ids)))
        if not old.size:
            raise ValueError("no id to keep")
        _demand_ids(old, full_size, "old ids")
        old = old.astype(np.int64)
        breaks = np.flatnonzero(np.diff(old) != 1) + 1
        starts = old[np.concatenate(([0], breaks))].tolist()
        stops = (old[np.concatenate((breaks - 1, [len(old) - 1]))] + 1).tolist()
        return cls(full_size, tuple(zip(starts, stops, strict=True)))

    @classmethod
    def from_json(cls, document: object) -> VocabularyMap:
        """The map that `as_json` wrote; ValueError that says why where the document is anything else."""
        if not isinstance(document, dict) or set(document) != {"full_size", "kept"}:
            raise ValueError("a vocabulary map must be an object of full_size and kept, nothing else")
        kept = document["kept"]
        if not isinstance(kept, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in kept):
            raise ValueError("kept must be a list of pairs [start, stop]")
        return cls(document["full_size"], tuple((start, stop) for start, stop in kept))

    def as_json(self) -> dict[str, Any]:
        """The map as a document for JSON; `from_json` reads it."""
        return {"full_size": self.full_size, "kept": [list(pair) for pair in self.kept]}

    @property
    def size(self) -> int:
        """How many rows are kept."""
        return len(self._old)

    @property
    def is_identity(self) -> bool:
        """Whether every row is kept."""
        return self.kept == ((0, self.full_size),)

    def old_ids(self) -> NDArray[np.int64]:
        """The kept old ids in the order of their new ids, [size], read-only."""
        return self._old

    def to_old(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Old ids of new ones, in the shape given; ValueError where one is not in 0..size-1."""
        _demand_ids(ids, self.size, "new ids")
        return np.asarray(self._old[ids])

    def to_new(self, old_ids: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """New ids of old ones, in the shape given, -1 where dropped; ValueError where one is not in 0..full_size-1."""
        _demand_ids(old_ids, self.full_size, "old ids")
        return np.asarray(self._new[old_ids])

    def new_id(self, old_id: int) -> int:
        """New id of one old id; KeyError where it is dropped or no row at all."""
        new = int(self._new[old_id]) if 0 <= old_id < self.full_size else -1
        if new < 0:
            raise KeyError(old_id)
        return new

    def select(self, start: int, stop: int, rows: NDArray[Any]) -> NDArray[Any]:
        """The kept ones among consecutive rows of a table, in the order of their new ids.

        rows: old rows `start` to `stop` (exclusive), [stop - start, …], any dtype. The result is a view of it where
        those kept stand together. ValueError where range and rows do not fit one another or the vocabulary.
        """
        if not 0 <= start <= stop <= self.full_size or len(rows) != stop - start:
            raise ValueError(f"{len(rows)} rows are not rows {start} to {stop} of {self.full_size}")
        first, end = np.searchsorted(self._old, (start, stop))
        inside = self._old[first:end] - start
        if len(inside) and inside[-1] - inside[0] == len(inside) - 1:
            return rows[inside[0] : inside[-1] + 1]
        return rows[inside]

    @cached_property
    def _old(self) -> NDArray[np.int64]:
        """Old id of every new one, [size]."""
        bounds = np.array(self.kept, dtype=np.int64)
        lengths = bounds[:, 1] - bounds[:, 0]
        shifts = bounds[:, 0] - (np.cumsum(lengths) - lengths)  # old id minus new id is constant in a range
        old: NDArray[np.int64] = np.arange(lengths.sum(), dtype=np.int64) + np.repeat(shifts, lengths)
        old.flags.writeable = False
        return old

    @cached_property
    def _new(self) -> NDArray[np.int64]:
        """New id of every old one, -1 where dropped, [full_size]."""
        new = np.full(self.full_size, -1, dtype=np.int64)
        new[self._old] = np.arange(self.size, dtype=np.int64)
        return new


def _demand_ids(ids: NDArray[Any], count: int, what: str) -> None:
    """Raise ValueError unless `ids` are whole numbers from 0 to `count` (exclusive)."""
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{what} must be whole numbers, found {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= count):
        raise ValueError(f"{what} must lie within 0 to {count - 1}, found {ids.min()} to {ids.max()}")
