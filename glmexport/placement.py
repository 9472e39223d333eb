"""Which graphs of a bundle stay in memory, which are streamed from disk, which run on a GPU: arithmetic and no more.

What is counted is the bytes of the bundle's graphs and of the KV cache. Nothing here opens a file or asks a device, so
a plan can be shown, and tested, on a machine that has neither the memory nor the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low

from glmexport import names
from glmexport.config import ModelConfig

FLOAT_BYTES = 4
"""Of KV cache and activations, where a bundle is not float16."""

READ_AHEAD = 2
"""Streamed graphs opened beyond the one that runs: the next one is ready when its turn comes, the one after it is being
read, which keeps disk and processor busy at once."""

PROVIDER_BYTES = 500_000_000
"""Taken for a GPU provider's own context, libraries and workspace: a round number, not a measurement."""


@dataclass(frozen=True)
class Placement:
    """Where each graph is, in the order of the data; every graph is in one of the three.

    gpu: run by the GPU provider. resident: opened once and kept. streamed: opened when their turn comes and closed
    after it, so many at a time that they take at most `window_bytes`, but for one that takes more by itself. limit:
    bytes of graphs and KV cache in the computer's memory, None for any number. raised: whether that is more than was
    asked for.
    """

    gpu: tuple[str, ...]
    resident: tuple[str, ...]
    streamed: tuple[str, ...] = ()
    window_bytes: int = 0
    limit: int | None = None
    raised: bool = False


@dataclass(frozen=True)
class GpuNeeds:
    """What a GPU must hold, in bytes. fixed: whatever runs there. block: more for each block, beside its weights."""

    fixed: int
    block: int


def kv_cache_bytes(config: ModelConfig, batch: int, length: int, float_bytes: int = FLOAT_BYTES) -> int:
    """Keys and values of one block for so many rows and places. float_bytes: of one number."""
    return 2 * length * batch * config.hidden_size * float_bytes


def held_on_cpu(sizes: Mapping[str, int], float_bytes: int) -> dict[str, int]:
    """Bytes that onnxruntime's CPU provider holds of each graph. sizes: of the files. float_bytes: of their numbers.

    It has no float16 products: it makes float32 copies of float16 matrices, and holds those beside nothing but mapped
    files (805 MB for a full-size block, onnxruntime 1.31). An embedding is only looked up.
    """
    copies = FLOAT_BYTES // float_bytes
    return {name: size * (1 if name == names.EMBEDDING else copies) for name, size in sizes.items()}


def gpu_needs(config: ModelConfig, length: int, float_bytes: int = FLOAT_BYTES) -> GpuNeeds:
    """What a GPU needs beside weights to prefill a prompt of `length` tokens and to decode up to that length.

    Each block has room for its KV cache, though that is copied there and back at every token as yet. Whichever block
    runs has its past and its presents at once, and the larger of attention (scores before and after the softmax, query,
    key and value as they are turned) and MLP (input, tanh and output of the activation), beside hidden states in and
    out. float_bytes: of a number of KV cache and activations; scores are float32 all the same.
    """
    attention = 2 * config.num_heads * length * FLOAT_BYTES + 6 * config.hidden_size * float_bytes
    largest = max(attention, 3 * config.inner_size * float_bytes)
    activations = length * (largest + 2 * config.hidden_size * float_bytes)
    kv_cache = kv_cache_bytes(config, 1, length, float_bytes)
    return GpuNeeds(PROVIDER_BYTES + activations + kv_cache, kv_cache)


def graphs_for_gpu(
    sizes: Mapping[str, int], config: ModelConfig, gpu_memory: int, float_bytes: int = FLOAT_BYTES
) -> tuple[str, ...]:
    """The graphs that a GPU with so many bytes free takes: as many blocks as fit, from the first; after them the head.

    Hidden states cross between devices once then. sizes: bytes of every graph, in the order of the data.
    """
    needs = gpu_needs(config, config.max_positions, float_bytes)
    free = gpu_memory - needs.fixed
    taken: list[str] = []
    for name, size in sizes.items():
        if name == names.EMBEDDING:
            continue  # it only looks rows up
        size += needs.block * (name != names.HEAD)
        if size > free:
            break
        free -= size
        taken.append(name)
    return tuple(taken)


def place(
    sizes: Mapping[str, int],
    *,
    kv_bytes: int = 0,
    memory_limit: int | None = None,
    gpu: tuple[str, ...] = (),
    read_ahead: int = READ_AHEAD,
) -> Placement:
    """Place every graph.

    Graphs take turns, each once a token, so the best that memory can do is to keep some for good: the largest that
    leave room for streaming the others, for the largest of them and for reading ahead among those of the usual size. A
    limit below what the largest graph and the KV cache need is raised to that; nothing is kept then, so that only the
    graphs that need it take more than was asked for.

    sizes: bytes of every graph, in the order of the data. gpu: those that are not in the computer's memory.
    read_ahead: graphs to be opened beyond the one that runs, where they fit.
    """
    ours = {name: size for name, size in sizes.items() if name not in gpu}
    everything = sum(ours.values()) + kv_bytes
    if memory_limit is None or everything <= memory_limit:
        return Placement(gpu, tuple(ours), limit=memory_limit)
    needed = max(ours.values(), default=0) + kv_bytes
    if needed > memory_limit:
        return Placement(gpu, (), tuple(ours), max(memory_limit - kv_bytes, 0), needed, raised=True)
    free, order = memory_limit - kv_bytes, list(ours)
    typical = median_low(ours.values())
    count = min(1 + read_ahead, free // max(typical, 1))
    resident: set[str] = set()
    while True:
        for name in sorted(ours.keys() - resident, key=lambda name: (-ours[name], order.index(name))):
            others = sorted(ours[other] for other in ours.keys() - resident - {name})
            needed = max(others[-1], min(count * typical, sum(others[-count:]))) if others else free
            if sum(ours[kept] for kept in resident) + ours[name] + needed <= free:
                resident.add(name)
                break  # with fewer to stream, a larger one may fit now
        else:
            break
    kept = tuple(name for name in ours if name in resident)
    streamed = tuple(name for name in ours if name not in resident)
    return Placement(gpu, kept, streamed, free - sum(ours[name] for name in kept), memory_limit)
