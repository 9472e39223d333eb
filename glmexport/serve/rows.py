"""What computes the rows of a batch: the interface that the engine drives, and what stands behind it today."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from glmexport import names
from glmexport.errors import GlmExportError
from glmexport.generation import Decoder
from glmexport.session import Session

Logits = npt.NDArray[np.float32]


class RowRunner(Protocol):
    """Rows that are computed side by side, each in a slot of its own; driven by one thread.

    slots: how many rows there are at most, numbered from 0. max_length: places of each row, prompt and answer together.
    kv_bytes_per_slot: of the KV cache of one row at that length, reserved for it as long as it is there.
    What a row gives does not depend on its neighbours, but for the last digits of a product that was batched.
    """

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


class PortableRows:
    """A `RowRunner` over the graphs of any bundle, which have no slots: each row has its own past and is fed by itself.

    The session is closed with it. Raises GlmExportError: the bundle gives no logits to choose from, a length of none.
    """

    def __init__(self, session: Session, slots: int, max_length: int | None = None) -> None:
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
        self._session, self._rows = session, dict[int, Decoder]()
        self.slots, self.max_length = slots, max_length or limit

    @property
    def kv_bytes_per_slot(self) -> int:
        """Bytes of one row's KV cache at its longest."""
        return self._session.kv_bytes(1, self.max_length)

    def prefill(self, slot: int, input_ids: Sequence[int]) -> Logits:
        """As `RowRunner.prefill`. Raises GlmExportError for ids that are no prompt or too many."""
        row = Decoder(self._session, [list(input_ids)])
        logits = _logits(row.prefill())
        self._rows[slot] = row
        return logits

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Logits:
        """As `RowRunner.decode`, one row after the other. Raises BundleError where a graph fails."""
        return np.stack([_logits(self._rows[slot].step([token])) for slot, token in zip(slots, tokens, strict=True)])

    def free(self, slot: int) -> None:
        """As `RowRunner.free`."""
        self._rows.pop(slot, None)

    def close(self) -> None:
        """Close the session."""
        self._rows.clear()
        self._session.close()


def _logits(outputs: dict[str, npt.NDArray[np.float32]]) -> Logits:
    logits: Logits = outputs[names.LOGITS][0].astype(np.float32, copy=False)
    return logits
