"""Passes: functions from the draft of a bundle to the draft of another, in a fixed order.

1. `half_cache` first, as only `split` makes it: then the steps after it leave the same history, taken at once or not.
2. `slim_vocab` next: it renumbers the ids, and rows that are dropped need not be rounded or quantized.
3. `raw_embedding` next, where the embedding becomes a raw file: it is independent of what follows.
4. `quantize_weights` after that: rows of a qdq head cannot be selected any more.
5. `raw_embedding` again, where the embedding becomes the LM head's rows: they are quantized rows, which must exist.
6. `half_weights` last: it takes whatever is a float32 matrix still, and the others need float32 matrices.
"""

from __future__ import annotations

from typing import Protocol

from glmexport.draft import BundleDraft, Notice


class Pass(Protocol):
    """One step from draft to draft; what it is to do is frozen in it."""

    def apply(self, draft: BundleDraft, notice: Notice) -> BundleDraft:
        """The changed draft. Raises GlmExportError where the draft cannot be changed so."""
        ...
