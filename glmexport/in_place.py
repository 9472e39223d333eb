"""The blocks of the flavor `ort` in a chain: each writes into its part of a KV cache, bound where it lies."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport import names
from glmexport.errors import BundleError, reason_of
from glmexport.graph_pool import GraphPool
from glmexport.slot_cache import SlotCache

Array = npt.NDArray[Any]

DEVICE = "cpu"
LONG = 64
"""Places of a prompt from which on memory is given back after it: what 512 take is half a gigabyte at full size, and
nothing that follows needs as much."""


class _Step:
    """The arrays of one call of the chain, and what binds the graphs to them: kept while calls are of one shape.

    hidden: [batch, seq, hidden], the one that a block reads and the one that it writes. mask: over the capacity.
    """

    def __init__(self, cache: SlotCache, first: int, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
        """first: slot of the first row. shape: batch, seq, hidden. dtype: of hidden states."""
        batch, seq, _ = shape
        self.key = _key(cache, first, shape)
        self.cache, self.slots = cache, slice(first, first + batch)
        self.hidden = [np.empty(shape, dtype) for _ in range(2)]
        self.mask = np.ones((batch, 1, seq, cache.capacity), np.bool_)
        self.positions = np.zeros((batch, 2, seq), np.int64)
        self.write_indices = np.zeros(batch, np.int64)
        self.bound: dict[str, tuple[Any, int, Any]] = {}  # graph -> what it was opened as, turn, binding

    def fill(self, hidden: Array, mask: Array, positions: Array, write_indices: Array) -> None:
        """Take what a call is given."""
        self.hidden[0][...] = hidden
        self.mask[..., : mask.shape[-1]] = mask
        self.mask[..., mask.shape[-1] :] = True
        self.positions[...], self.write_indices[...] = positions, write_indices

    def bind(self, session: Any, block_id: int, turn: int) -> Any:
        """A binding of a block's graph to the arrays. turn: which of `hidden` it reads."""
        binding = session.io_binding()
        keys, values = (array[self.slots] for array in self.cache.of(block_id))
        inputs = {
            names.INPUTS_EMBEDS: self.hidden[turn],
            names.ATTENTION_MASK: self.mask,
            names.POSITION_IDS: self.positions,
            names.WRITE_INDICES: self.write_indices,
            names.KEY_CACHE: keys,
            names.VALUE_CACHE: values,
        }
        outputs = {
            names.HIDDEN_STATES: self.hidden[1 - turn],
            names.KEY_CACHE_OUT: keys,
            names.VALUE_CACHE_OUT: values,
        }
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, DEVICE, 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding


class InPlaceBlocks:
    """Runs the blocks that a pool opens, of the flavor `ort`. Not by two threads at once."""

    def __init__(self, pool: GraphPool) -> None:
        self._pool = pool
        self._step: _Step | None = None

    def run(
        self,
        cache: SlotCache,
        hidden: Array,
        attention_mask: Array,
        position_ids: Array,
        write_indices: Array,
        *,
        first_slot: int = 0,
        blocks: range | None = None,
    ) -> Array:
        """Hidden states [batch, seq, hidden] through the blocks; what they add to the cache is written into it.

        attention_mask: bool [batch, 1, seq, total], True hides; `cache` is grown to `total` places. position_ids: int64
        [batch, 2, seq]. write_indices: int64 [batch], the place of each row's first new key. first_slot: of the cache,
        for the first row. blocks: ids, by default those that the cache is for.
        Returns an array that the next call overwrites. Raises BundleError.
        """
        if self._step is not None and self._step.cache is not cache:
            self._step = None  # an earlier cache may go before this one grows
        cache.reserve(attention_mask.shape[-1])
        batch, seq, width = hidden.shape
        step = self._step
        if step is None or step.key != _key(cache, first_slot, (batch, seq, width)):
            self._step = step = _Step(cache, first_slot, (batch, seq, width), hidden.dtype)
        step.fill(hidden, attention_mask, position_ids, write_indices)
        turn, ids = 0, cache.blocks if blocks is None else blocks
        for block_id in ids:
            self._run_block(step, block_id, turn, tidy=block_id == ids[-1] and seq >= LONG)
            turn = 1 - turn
        return step.hidden[turn]

    def forget(self) -> None:
        """Let go of the arrays of the latest call, the cache among them."""
        self._step = None

    def _run_block(self, step: _Step, block_id: int, turn: int, *, tidy: bool) -> None:
        graph = names.block_name(block_id)
        session: Any = self._pool.get(graph)
        opened, of_turn, binding = step.bound.get(graph, (None, turn, None))
        try:
            if opened is not session or of_turn != turn:
                binding = step.bind(session, block_id, turn)
            session.run_with_iobinding(binding, _giving_back() if tidy else None)
        except Exception as error:  # onnxruntime's own errors share no public base class
            file = names.in_flavor(names.graph_file(graph), names.ORT)
            raise BundleError(
                f"{file} failed to run ({reason_of(error)}); see `glmexport inspect --check`, or make the bundle again."
            ) from error
        if graph in self._pool.placement.streamed:  # a binding keeps its graph open
            step.bound.pop(graph, None)
        else:
            step.bound[graph] = session, turn, binding


@functools.cache
def _giving_back() -> Any:
    """Options of a run after which onnxruntime gives back the memory that its computations took."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _key(cache: SlotCache, first: int, shape: tuple[int, int, int]) -> tuple[Any, ...]:
    """What the arrays and bindings of a step follow from."""
    return id(cache), cache.capacity, first, shape
