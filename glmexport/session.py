"""onnxruntime or MNN over a bundle: embedding, blocks and LM head in a chain, within a limit of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport import names
from glmexport.bundle import Bundle, open_bundle
from glmexport.bundle_tokenizer import tokenizer_of_bundle
from glmexport.embedding_rows import embedding_rows
from glmexport.errors import BundleError, GlmExportError, reason_of
from glmexport.form import GRAPH
from glmexport.graph_pool import CPU_PROVIDER, GraphPool
from glmexport.in_place import InPlaceBlocks
from glmexport.placement import READ_AHEAD, Placement, kv_cache_bytes
from glmexport.sizes import parse_size
from glmexport.slot_cache import SlotCache, capacity_for
from glmexport.tokenizer import Tokenizer

MAX_THREADS = 1024
"""More would only exhaust what the system gives; onnxruntime starts them all."""

Array = npt.NDArray[Any]
Pasts = list[Array] | SlotCache
"""KV cache of every block: each [2, total, batch, heads, head_dim] of the bundle's dtype, or what graphs write into."""


class Session:
    """Runs the graphs of one bundle; a context manager that closes them.

    bundle: an opened one, or its directory. threads: of each graph, None for onnxruntime's choice.
    memory_limit: bytes of graphs and KV cache to hold at most, or a text such as `2GB`; None for any number. Graphs
    beyond it are streamed from disk, token by token. It is raised where the largest graph alone is more; see
    `placement.raised`.
    providers: onnxruntime's execution providers for every graph, first choice first; none is the CPU.
    gpu_memory: bytes that are free on a GPU; as many blocks as fit run there, on `providers` (default: whichever GPU
    provider onnxruntime has), the others on the CPU.
    read_ahead: streamed graphs to open beyond the one that runs, where the limit has room.
    flavor: of the graphs to run, of `names.FLAVORS`; None is `ort` where the bundle has it and all runs on the CPU.
    mnn_memory: how MNN holds the weights of a bundle for it, `low` or `normal` (see `mnn.module.MEMORY`); None for what
    the bundle was made for. Such a bundle's `providers` are MNN's backends (`mnn.module.BACKENDS`).

    Nothing is opened before it is needed, unless `load` is called. Rows of a raw embedding are mapped and not counted.
    Hidden states, KV cache and logits are of the bundle's dtype (`bundle.form.dtype`), float32 or float16; a cache that
    graphs write into, of `bundle.form.kv_cache`.
    Raises BundleError: no bundle; GlmExportError: sizes or threads that are none.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        threads: int | None = None,
        memory_limit: int | str | None = None,
        providers: Sequence[str] = (),
        gpu_memory: int | str | None = None,
        read_ahead: int = READ_AHEAD,
        mnn_memory: str | None = None,
        flavor: str | None = None,
    ) -> None:
        memory_limit, gpu_memory = (
            parse_size(size) if isinstance(size, str) else size for size in (memory_limit, gpu_memory)
        )
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise GlmExportError(f"threads is {threads}, expected 1 to {MAX_THREADS}.")
        if any(size is not None and size < 0 for size in (memory_limit, gpu_memory)):
            raise GlmExportError("A memory size is below 0; give a number of bytes.")
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
        self.config = self.bundle.config
        providers = (providers,) if isinstance(providers, str) else tuple(providers)
        on_cpu = gpu_memory is None and providers in ((), (CPU_PROVIDER,))
        self.flavor = flavor or self.bundle.flavors[-1 if on_cpu else 0]
        if self.flavor not in self.bundle.flavors:
            raise BundleError(
                f"{self.bundle.directory} has graphs of the flavor {' and '.join(self.bundle.flavors)} and none of "
                f"{self.flavor!r:.40}; split with --flavor both."
            )
        self._pool = GraphPool(
            self.bundle,
            memory_limit=memory_limit,
            threads=threads,
            providers=providers,
            gpu_memory=gpu_memory,
            read_ahead=read_ahead,
            mnn_memory=mnn_memory,
            flavor=self.flavor,
        )
        self._in_place = InPlaceBlocks(self._pool) if self.flavor == names.ORT else None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every graph."""
        if self._in_place is not None:
            self._in_place.forget()
        self._pool.close()

    def load(self, advance: Callable[[str, int], None] = lambda graph, count: None) -> None:
        """Open all graphs that are to be kept, side by side. advance: takes (graph, its bytes) as each is done.

        Raises BundleError for a graph or an execution provider that is not what it must be.
        """
        self._pool.open_resident(advance)

    def release(self) -> None:
        """Let go of the streamed graphs that are open and of a cache in use, for memory that something else needs."""
        if self._in_place is not None:
            self._in_place.forget()
        self._pool.release()

    @property
    def placement(self) -> Placement:
        """Where the graphs are, as planned for the KV cache of the latest `forward`."""
        return self._pool.placement

    def plan(self, length: int) -> Placement:
        """Where the graphs would be with a KV cache of so many places."""
        return self._pool.placed(self.held_kv_bytes(1, length))

    @property
    def graph_sizes(self) -> Mapping[str, int]:
        """Bytes that are held of every graph, its data included, in the order of the data."""
        return self._pool.sizes

    @property
    def held_bytes(self) -> int:
        """Bytes of the bundle's graphs that are open in the computer's memory."""
        return self._pool.held_bytes

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle holds what it takes to tokenize text."""
        return names.TOKENIZER_MODEL in self.bundle.files

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to and from the bundle's ids. Raises BundleError where the bundle has no tokenizer."""
        return tokenizer_of_bundle(self.bundle)

    def kv_bytes(self, batch: int, length: int) -> int:
        """Bytes of the KV cache of all blocks for so many rows and places."""
        width = self.bundle.form.cache_float_bytes(self.flavor)
        return self.config.num_blocks * kv_cache_bytes(self.config, batch, length, width)

    def forward(self, input_ids: Array, attention_mask: Array, position_ids: Array, pasts: Pasts) -> Array:
        """Run embedding and blocks; returns hidden states [seq, batch, hidden] and grows `pasts` in place.

        input_ids: int64 [batch, seq]; attention_mask: bool [batch, 1, seq, total], True hides; position_ids: int64
        [batch, 2, seq]; pasts: one KV cache a block, as `empty_pasts` gives and earlier calls grew. Raises BundleError.
        """
        batch, total = input_ids.shape[0], attention_mask.shape[-1]
        if isinstance(pasts, SlotCache):
            self._reserve(pasts, total)
            return self._in_place_steps(pasts, self._embed(input_ids), attention_mask, position_ids)
        self._pool.reserve(self.held_kv_bytes(batch, total))
        hidden = self.embed(input_ids)
        for block_id in range(self.config.num_blocks):
            hidden = self.step(block_id, hidden, attention_mask, position_ids, pasts)
        return hidden

    def step(self, block_id: int, hidden: Array, attention_mask: Array, position_ids: Array, pasts: Pasts) -> Array:
        """One block of `forward`: hidden states [seq, batch, hidden] in and out; grows its part of `pasts`."""
        if isinstance(pasts, SlotCache):
            blocks = range(block_id, block_id + 1)
            turned = hidden.transpose(1, 0, 2)
            return self._in_place_steps(pasts, turned, attention_mask, position_ids, blocks=blocks)
        hidden, pasts[block_id] = self.block(block_id, hidden, attention_mask, position_ids, pasts[block_id])
        return hidden

    def forward_slots(
        self,
        cache: SlotCache,
        input_ids: Array,
        attention_mask: Array,
        position_ids: Array,
        write_indices: Array,
        first_slot: int = 0,
    ) -> Array:
        """`forward` for rows that lie in slots of their own, each as long as it is; hidden states [seq, batch, hidden].

        write_indices: int64 [batch], the place of each row's first new token. first_slot: of the first row. Raises
        BundleError; TypeError in a session of another flavor than ort.
        """
        self._reserve(cache, attention_mask.shape[-1])
        embedded = self._embed(input_ids)
        return self._in_place_steps(cache, embedded, attention_mask, position_ids, write_indices, first_slot)

    def _reserve(self, cache: SlotCache, length: int) -> None:
        """Plan for a cache as large as `length` places make it; it does not shrink."""
        self._pool.reserve(self.held_kv_bytes(cache.slots, max(length, cache.capacity)))

    def held_kv_bytes(self, batch: int, length: int) -> int:
        """`kv_bytes` with the room to grow that a cache of the session's flavor has."""
        return self.kv_bytes(batch, length if self._in_place is None else capacity_for(length))

    def _in_place_steps(
        self,
        cache: SlotCache,
        hidden: Array,
        mask: Array,
        positions: Array,
        write_indices: Array | None = None,
        first_slot: int = 0,
        blocks: range | None = None,
    ) -> Array:
        """Hidden states [batch, seq, hidden] through blocks that write into the cache; [seq, batch, hidden]."""
        if self._in_place is None:
            raise TypeError("a cache that is written into goes with a session of the flavor ort")
        batch, seq, _ = hidden.shape
        indices = np.full(batch, mask.shape[-1] - seq, np.int64) if write_indices is None else write_indices
        found = self._in_place.run(cache, hidden, mask, positions, indices, first_slot=first_slot, blocks=blocks)
        return found.transpose(1, 0, 2).copy()  # the next call overwrites what it is a view of

    def empty_pasts(self, batch: int) -> Pasts:
        """KV caches of length 0 for every block."""
        if self._in_place is not None:
            return self.empty_slots(batch)
        return [self.empty_past(batch) for _ in range(self.config.num_blocks)]

    def empty_slots(self, slots: int) -> SlotCache:
        """A cache of length 0 that graphs of the flavor ort write into."""
        return SlotCache(self.config, slots, self.bundle.form.cache_dtype(self.flavor))

    def empty_past(self, batch: int) -> Array:
        """A KV cache of length 0: [2, 0, batch, heads, head_dim]."""
        return np.zeros((2, 0, batch, self.config.num_heads, self.config.head_dim), self.bundle.form.dtype)

    def embed(self, input_ids: Array) -> Array:
        """input_ids int64 [batch, seq] -> [seq, batch, hidden]; raises BundleError for ids without a row."""
        if self._in_place is not None:
            return self._embed(input_ids).transpose(1, 0, 2)
        return self._embed(input_ids)

    def _embed(self, input_ids: Array) -> Array:
        """The same in the order of the session's flavor."""
        vocab_size = self.config.vocab_size
        if input_ids.size and not (input_ids.min() >= 0 and input_ids.max() < vocab_size):
            raise BundleError(
                f"Ids from {input_ids.min()} to {input_ids.max()} were given, expected 0 to {vocab_size - 1}."
            )
        if self.bundle.form.embedding.kind == GRAPH:
            return self._run(names.EMBEDDING, {names.INPUT_IDS: input_ids})[names.INPUTS_EMBEDS]
        ids = input_ids.T if self._in_place is None else input_ids
        rows = self._rows(ids.reshape(-1)).reshape(*ids.shape, self.config.hidden_size)
        return rows.astype(self.bundle.form.dtype, copy=False)

    def block(
        self, block_id: int, hidden: Array, attention_mask: Array, position_ids: Array, past: Array
    ) -> tuple[Array, Array]:
        """(hidden_states [seq, batch, hidden], presents [2, total, batch, heads, head_dim]), as in `block_spec`.

        For one block alone, in every flavor: what is written in place is copied there and back.
        """
        if self._in_place is not None:
            return self._block_in_place(block_id, hidden, attention_mask, position_ids, past)
        feeds = {
            names.INPUTS_EMBEDS: hidden,
            names.ATTENTION_MASK: attention_mask,
            names.POSITION_IDS: position_ids,
            names.PAST: past,
        }
        outputs = self._run(names.block_name(block_id), feeds)
        return outputs[names.HIDDEN_STATES], outputs[names.PRESENTS]

    def _block_in_place(
        self, block_id: int, hidden: Array, attention_mask: Array, position_ids: Array, past: Array
    ) -> tuple[Array, Array]:
        _, length, batch = past.shape[:3]
        total = attention_mask.shape[-1]
        form, blocks = self.bundle.form, range(block_id, block_id + 1)
        cache = SlotCache(self.config, batch, form.cache_dtype(self.flavor), blocks=blocks)
        cache.reserve(total)
        for array, before in zip(cache.of(block_id), past, strict=True):
            array[:, :, :length] = before.transpose(1, 2, 0, 3)
        found = self.step(block_id, hidden, attention_mask, position_ids, cache)
        places = [array[:, :, :total].transpose(2, 0, 1, 3) for array in cache.of(block_id)]
        return found, np.stack(places).astype(form.dtype, copy=False)

    def head(self, hidden: Array) -> dict[str, Array]:
        """Hidden states [seq, batch, hidden] -> `logits` [batch, vocab] and/or `token_id` [batch]."""
        if self._in_place is not None:  # the last place is all that it reads
            hidden = np.ascontiguousarray(hidden[-1:].transpose(1, 0, 2))
        return self._run(names.HEAD, {names.HIDDEN_STATES: hidden})

    @cached_property
    def _rows(self) -> Callable[[Array], Array]:
        return embedding_rows(self.bundle)

    def _run(self, graph: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        session = self._pool.get(graph)
        spec = self.bundle.form.spec_of(graph, self.config, self.bundle.argmax, self.flavor)
        outputs = [output.name for output in spec.outputs]
        try:
            values = session.run(outputs, dict(feeds))
        except Exception as error:  # onnxruntime's own errors share no public base class
            file = names.in_flavor(names.graph_file(graph, self.bundle.runtime), self.flavor)
            raise BundleError(
                f"{file} failed to run ({reason_of(error)}); see `glmexport inspect --check`, or make the bundle again."
            ) from error
        if graph in self._pool.placement.streamed:
            # what onnxruntime gives lies in memory of the graph, all of which it would keep when the graph is closed
            values = [np.array(value) for value in values]
        return dict(zip(outputs, values, strict=True))
