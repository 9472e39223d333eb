"""A KV cache that graphs write into: for each block two arrays of fixed places, which grow in steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport.config import ModelConfig

Array = npt.NDArray[Any]

SMALLEST = 64
STEP = 8
"""A cache has room for at most one STEP-th more places than are asked for, and at least for SMALLEST more than none:
attention costs as much as there are places, and growing copies them all."""


def capacity_for(length: int) -> int:
    """Places of a cache that is to hold `length`: a multiple of SMALLEST, and a few more for a long one."""
    step = max(SMALLEST, 1 << max((length // STEP).bit_length() - 1, 0))
    return max(-(-length // step) * step, SMALLEST)


class SlotCache:
    """Keys and values of every block, each [slots, heads, capacity, head_dim]; a slot is one row of a batch.

    keys, values: one array a block, in the order of `blocks`. They begin as zeros, never as whatever lay in memory: a
    hidden place has the weight 0, which makes nothing of a number and NaN of a NaN.
    """

    def __init__(self, config: ModelConfig, slots: int, dtype: str = "float32", *, blocks: range | None = None) -> None:
        """Room for nothing. blocks: the ids of those that it is for, all of the model's by default."""
        self._heads = (config.num_heads, config.head_dim)
        self._dtype = np.dtype(dtype)
        self.slots, self.capacity = slots, 0
        self.blocks = range(config.num_blocks) if blocks is None else blocks
        self.keys, self.values = ([self._empty(0) for _ in self.blocks] for _ in range(2))

    def of(self, block_id: int) -> tuple[Array, Array]:
        """Keys and values of a block."""
        number = block_id - self.blocks.start
        return self.keys[number], self.values[number]

    @property
    def nbytes(self) -> int:
        """Bytes of all places."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def reserve(self, length: int) -> None:
        """Make room for `length` places in every slot; what is written stays. One array at a time is copied."""
        if length <= self.capacity:
            return
        capacity = capacity_for(length)
        for arrays in (self.keys, self.values):
            for number, array in enumerate(arrays):
                arrays[number] = grown = self._empty(capacity)
                grown[:, :, : self.capacity] = array
        self.capacity = capacity

    def _empty(self, capacity: int) -> Array:
        return np.zeros((self.slots, self._heads[0], capacity, self._heads[1]), self._dtype)
