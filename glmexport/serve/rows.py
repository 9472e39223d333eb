"""What computes the rows of a batch: the interface that the engine drives, and what stands behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from glmexport import names
from glmexport.config import ModelConfig
from glmexport.errors import GlmExportError
from glmexport.generation import Decoder
from glmexport.prompt import Prompt, prepare_prompt
from glmexport.session import Session
from glmexport.slot_cache import SlotCache

Logits = npt.NDArray[np.float32]


class RowRunner(Protocol):
    """Rows that are computed side by side, each in a slot of its own; driven by one thread.

    slots: how many rows there are at most, numbered from 0. max_length: places of each row, prompt and answer together.
    kv_bytes_per_slot: of the KV cache of one row at that length, reserved for it as long as it is there.
    What a row gives does not depend on its neighbours, but for the last digits of a product that was batched.
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def slots(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def kv_bytes_per_slot(self) -> int: ...

    def prefill(self, slot: int, input_ids: Sequence[int]) -> Logits:
        """Begin a row in a free slot with the whole of its prompt; float32 [vocab] of its last place."""
        ...

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Logits:
        """Feed one token to each of these rows, which are any and in any order; float32 [len(slots), vocab]."""
        ...

    def free(self, slot: int) -> None:
        """End a row; its slot may be used again. A slot without a row is left as it is."""
        ...

    def close(self) -> None:
        """Give back all that is held; nothing may be called after it."""
        ...


def open_rows(session: Session, slots: int, max_length: int | None = None) -> RowRunner:
    """The runner of a session's flavor, which takes the session over. Raises GlmExportError."""
    kind = InPlaceRows if session.flavor == names.ORT else PortableRows
    return kind(session, slots, max_length)


class InPlaceRows:
    """A `RowRunner` over the graphs of the flavor ort: all rows take one step together.

    Rows lie in slots of one cache, the lowest that are free, so that few of those between the first and the last that
    are in use are empty; empty ones are computed along. The cache is as long as the longest row needs, and made anew
    when nobody is left. The session is closed with it. Raises GlmExportError as `PortableRows`.
    """

    def __init__(self, session: Session, slots: int, max_length: int | None = None) -> None:
        self.slots, self.max_length = slots, _checked(session, slots, max_length)
        self._session, self.config = session, session.config
        self._cache = self._empty()
        self._rows: dict[int, _SlotRow] = {}

    @property
    def kv_bytes_per_slot(self) -> int:
        """Bytes of one slot at its longest."""
        return self._session.held_kv_bytes(1, self.max_length)

    def prefill(self, slot: int, input_ids: Sequence[int]) -> Logits:
        """As `RowRunner.prefill`. Raises GlmExportError for ids that are no prompt or too many."""
        prompt = prepare_prompt([[*input_ids]], self._session.config.special_ids)
        taken = {row.place for row in self._rows.values()}
        place = next(number for number in range(self.slots) if number not in taken)
        hidden = self._session.forward_slots(
            self._cache,
            prompt.input_ids,
            prompt.attention_mask,
            prompt.position_ids,
            np.zeros(1, np.int64),
            first_slot=place,
        )
        logits = _logits(self._session.head(hidden[-1:]))
        self._rows[slot] = _SlotRow(place, len(input_ids), prompt)
        first: Logits = logits[0]
        return first

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Logits:
        """As `RowRunner.decode`, all rows at once. Raises BundleError where a graph fails."""
        rows = [self._rows[slot] for slot in slots]
        first = min(row.place for row in rows)
        count = max(row.place for row in rows) - first + 1
        along = [row for row in self._rows.values() if 0 <= row.place - first < count]
        total = max(row.length for row in along) + 1
        ids, indices = np.zeros((count, 1), np.int64), np.zeros(count, np.int64)
        positions = np.zeros((count, 2, 1), np.int64)
        mask = np.ones((count, 1, 1, total), np.bool_)
        mask[..., 0] = False  # an empty slot sees one place, as attention over nothing is not defined
        for row, token in zip(rows, tokens, strict=True):
            place = row.place - first
            ids[place] = token
            positions[place] = row.prompt.decode_step(row.fed)[1][0]
            mask[place, ..., : row.length + 1] = False
        for row in along:
            indices[row.place - first] = row.length  # of one that waits, this place is written anew at its turn
        hidden = self._session.forward_slots(self._cache, ids, mask, positions, indices, first_slot=first)
        logits = _logits(self._session.head(hidden))
        for row in rows:
            row.length += 1
            row.fed += 1
        chosen: Logits = logits[[row.place - first for row in rows]]
        return chosen

    def free(self, slot: int) -> None:
        """As `RowRunner.free`."""
        self._rows.pop(slot, None)
        if not self._rows and self._cache.capacity:
            self._cache = self._empty()

    def close(self) -> None:
        """Close the session."""
        self._rows.clear()
        self._session.close()

    def _empty(self) -> SlotCache:
        return self._session.empty_slots(self.slots)


@dataclass(eq=False)
class _SlotRow:
    """place: slot of the cache. length: places that are written. fed: tokens after the prompt."""

    place: int
    length: int
    prompt: Prompt
    fed: int = 0


class PortableRows:
    """A `RowRunner` over the graphs of any bundle, which have no slots: each row has its own past and is fed by itself.

    The session is closed with it. Raises GlmExportError: the bundle gives no logits to choose from, a length of none.
    """

    def __init__(self, session: Session, slots: int, max_length: int | None = None) -> None:
        self.slots, self.max_length = slots, _checked(session, slots, max_length)
        self._session, self.config = session, session.config
        self._rows: dict[int, Decoder] = {}

    @property
    def kv_bytes_per_slot(self) -> int:
        """Bytes of one row's KV cache at its longest."""
        return self._session.kv_bytes(1, self.max_length)

    def prefill(self, slot: int, input_ids: Sequence[int]) -> Logits:
        """As `RowRunner.prefill`. Raises GlmExportError for ids that are no prompt or too many."""
        row = Decoder(self._session, [list(input_ids)])
        logits: Logits = _logits(row.prefill())[0]
        self._rows[slot] = row
        return logits

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Logits:
        """As `RowRunner.decode`, one row after the other. Raises BundleError where a graph fails."""
        return np.stack([_logits(self._rows[slot].step([token]))[0] for slot, token in zip(slots, tokens, strict=True)])

    def free(self, slot: int) -> None:
        """As `RowRunner.free`."""
        self._rows.pop(slot, None)

    def close(self) -> None:
        """Close the session."""
        self._rows.clear()
        self._session.close()


def _logits(outputs: dict[str, npt.NDArray[np.float32]]) -> Logits:
    """Float32 [batch, vocab]."""
    logits: Logits = outputs[names.LOGITS].astype(np.float32, copy=False)
    return logits


def _checked(session: Session, slots: int, max_length: int | None) -> int:
    """Places of a row. Raises GlmExportError where rows cannot be had so, or give nothing to choose from."""
    if session.bundle.argmax == "only":
        raise GlmExportError(
            f"{session.bundle.directory} gives the greedy token alone (--argmax only), nothing to choose an answer "
            "from; split again without --argmax only."
        )
    limit = session.config.max_positions
    if slots < 1 or (max_length is not None and not 2 <= max_length <= limit):
        raise GlmExportError(
            f"{slots} rows of {max_length} places were asked for, expected at least 1 and 2 to {limit}."
        )
    return max_length or limit
