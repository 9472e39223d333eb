"""Attention masks and two-dimensional positions of a prompt and of the tokens after it, in numpy.

The rules are those of the original modeling code, v1.1.0: a prompt sees all of itself (prefix attention), what follows
is causal; the first position row counts through the context and then stays at the mask token, the second counts from
the first generated place on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from glmexport.config import ModelConfig, SpecialIds
from glmexport.errors import GlmExportError

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts, padded on the left to one length, with all that the blocks need to know about it.

    input_ids: int64 [batch, seq]. attention_mask: bool [batch, 1, seq, seq], True hides. position_ids: int64
    [batch, 2, seq]. mask_positions: int64 [batch], the position of every later token. context_lengths: int64 [batch],
    places before `<sop>`, padding not counted. pad_lengths: int64 [batch].
    """

    input_ids: IntArray
    attention_mask: BoolArray
    position_ids: IntArray
    mask_positions: IntArray
    context_lengths: IntArray
    pad_lengths: IntArray

    def decode_step(self, generated: int) -> tuple[BoolArray, IntArray]:
        """Mask [batch, 1, 1, total] and positions [batch, 2, 1] for feeding generated token `generated` (from 0).

        The token sees everything before it but the padding.
        """
        batch, seq = self.input_ids.shape
        total = seq + generated + 1
        mask = np.zeros((batch, 1, 1, total), np.bool_)
        mask[:, 0, 0, :] = np.arange(total) < self.pad_lengths[:, None]
        block_positions = total - 1 - self.pad_lengths - self.context_lengths + 1
        positions = np.stack([self.mask_positions, block_positions], axis=1)[:, :, None]
        return mask, positions


def prepare_prompt(rows: list[list[int]], ids: SpecialIds) -> Prompt:
    """Pad `rows` of token ids on the left to one length and work out masks and positions.

    Each row holds `<sop>` and, before it, a `[gMASK]` or, for infilling, a `[MASK]`; what follows `<sop>` is an answer.
    Raises GlmExportError for a row that does not.
    """
    batch, seq = len(rows), max((len(row) for row in rows), default=0)
    input_ids = np.full((batch, seq), ids.pad, np.int64)
    positions = np.zeros((batch, 2, seq), np.int64)
    hidden = np.empty((batch, 1, seq, seq), np.bool_)
    mask_positions, contexts, pads = (np.zeros(batch, np.int64) for _ in range(3))
    for i, row in enumerate(rows):
        context = row.index(ids.bos) if ids.bos in row else 0
        token = ids.gmask if ids.gmask in row[:context] else ids.mask
        if token not in row[:context]:
            raise GlmExportError(
                f"Prompt {i} needs [gMASK] or [MASK] (ids {ids.gmask}, {ids.mask}) and <sop> (id {ids.bos}) after it, "
                f"found {row[:8]}{'…' if len(row) > 8 else ''}; append both to the encoded text."
            )
        pad = seq - len(row)
        pads[i], contexts[i], mask_positions[i] = pad, context, row.index(token)
        input_ids[i, pad:] = row
        after = np.arange(len(row)) >= context
        positions[i, 0, pad:] = np.where(after, mask_positions[i], np.arange(len(row)))
        positions[i, 1, pad:] = np.where(after, np.arange(len(row)) - context + 1, 0)
        place = np.arange(seq)
        hidden[i, 0] = ((place[None, :] > place[:, None]) & (place >= pad + context)[None, :]) | (place < pad)[None, :]
    return Prompt(input_ids, hidden, positions, mask_positions, contexts, pads)


def sample_prompt(config: ModelConfig, count: int) -> list[int]:
    """A prompt of `count` ids to measure with: one word of text again and again, and what begins an answer."""
    ids = config.special_ids
    special = {ids.mask, ids.gmask, ids.bos, ids.eos, ids.pad}
    word = next((number for number in range(config.num_image_tokens, config.vocab_size) if number not in special), 0)
    return [*[word] * (count - 2), ids.gmask, ids.bos]
