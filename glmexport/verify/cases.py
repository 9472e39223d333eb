"""What is run through graphs and reference: prompts of several lengths, positions and batch sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glmexport.config import ModelConfig
from glmexport.prompt import BoolArray, IntArray, Prompt, prepare_prompt


@dataclass(frozen=True)
class Case:
    """A batch of prompts and the number of decode steps after it.

    offsets: added to positions and to (non-zero) block positions, to reach the model's last ones with a short prompt.
    """

    name: str
    prompt: Prompt
    steps: int
    offsets: tuple[int, int] = (0, 0)

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return int(self.prompt.input_ids.shape[0])

    def inputs(self, step: int) -> tuple[BoolArray, IntArray]:
        """Mask and positions of step 0 (prefill) or of decode step `step` (from 1)."""
        prompt = self.prompt
        mask, positions = (prompt.attention_mask, prompt.position_ids) if step == 0 else prompt.decode_step(step - 1)
        shifted = positions.copy()
        shifted[:, 0] += self.offsets[0]
        shifted[:, 1] += np.where(positions[:, 1] > 0, self.offsets[1], 0)
        return mask, shifted


LONGEST = 256
"""Tokens of the longest prompt: a full-size block takes it within seconds."""


def longest_case(config: ModelConfig) -> Case:
    """One prompt of `LONGEST` tokens, or as many as the model has positions for, of every kind but the special ones."""
    ids = config.special_ids
    random = np.random.default_rng(1)
    count = max(min(LONGEST, config.max_positions) - 2, 1)
    words = random.integers(config.num_image_tokens, config.vocab_size, count)
    text = [ids.pad if word in (ids.mask, ids.gmask, ids.bos, ids.eos) else int(word) for word in words]
    return Case("longest", prepare_prompt([[*text, ids.gmask, ids.bos]], ids), 0)


def make_cases(config: ModelConfig, steps: int) -> tuple[Case, ...]:
    """The cases for a model: none of the lengths is the traced one; ids are seeded and the same on every machine."""
    ids = config.special_ids
    random = np.random.default_rng(0)
    special = {ids.mask, ids.gmask, ids.bos, ids.eos, ids.pad}
    text = [token for token in range(config.num_image_tokens, config.vocab_size) if token not in special] or [0]

    def words(count: int) -> list[int]:
        return [int(token) for token in random.choice(text, count)]

    longest = max(min(65, config.max_positions - steps - 1), 2)
    chat = [ids.gmask, ids.bos]
    cases = (
        Case("shortest", prepare_prompt([chat], ids), steps),
        Case("short", prepare_prompt([words(5) + chat], ids), steps),
        Case("long", prepare_prompt([words(longest - 2) + chat], ids), steps),
        Case("infill", prepare_prompt([[*words(4), ids.mask, *words(6), ids.bos]], ids), steps),
        Case("batch", prepare_prompt([words(2) + chat, words(9) + chat], ids), steps),
    )
    last = prepare_prompt([words(4) + chat], ids)
    to_last = max(config.max_positions - 1 - int(last.position_ids[:, 0].max()), 0)
    to_last_block = max(config.max_positions - 2 - steps, 0)
    return (*cases, Case("last positions", last, steps, (to_last, to_last_block)))
