"""Which graphs stay, are streamed or run on a GPU: the arithmetic by hand, at full size too, and what always holds."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from glmexport.config import ModelConfig, SpecialIds
from glmexport.placement import (
    PROVIDER_BYTES,
    READ_AHEAD,
    Placement,
    gpu_needs,
    graphs_for_gpu,
    kv_cache_bytes,
    place,
)

SPECIAL = SpecialIds(130000, 130001, 130004, 130005, 3, 5)
FULL = ModelConfig("chatglm_6b", 130528, 4096, 28, 32, 16384, 2048, 1e-5, 0, SPECIAL)
BLOCK, HEAD = 126_000_000, 550_000_000
BLOCKS = tuple(f"glm_block_{i}" for i in range(28))
INT4 = dict.fromkeys(BLOCKS, BLOCK) | {"lm": HEAD}  # a raw embedding is no graph
FLOAT = {"embedding": 2_138_570_752} | dict.fromkeys(BLOCKS, 805_000_000) | {"lm": 2_138_570_752}
GB = 10**9

# The KV cache


def test_the_kv_cache_holds_keys_and_values_of_every_place_in_float32():
    assert kv_cache_bytes(FULL, 1, 1) == 2 * 4096 * 4 == 32768
    assert kv_cache_bytes(FULL, 1, 2048) == 67_108_864
    assert kv_cache_bytes(FULL, 3, 10) == 983_040
    assert kv_cache_bytes(FULL, 5, 0) == 0


# GPU


def test_what_a_gpu_needs_by_hand():
    """At 2048 places attention is the largest: scores [32, 2048, 2048] twice, and six of [2048, 4096]."""
    attention = 2 * 32 * 2048 * 2048 + 6 * 2048 * 4096
    mlp = 3 * 2048 * 16384
    assert attention > mlp
    in_and_out = 2 * 2048 * 4096
    needs = gpu_needs(FULL, 2048)
    assert needs.block == 67_108_864
    assert needs.fixed == 500_000_000 + 4 * (attention + in_and_out) + 67_108_864 == 1_909_286_144


def test_what_a_gpu_needs_for_a_short_prompt_is_the_mlps():
    """At 256 places the MLP is the largest: three of [256, 16384]."""
    assert 3 * 16384 > 2 * 32 * 256 + 6 * 4096
    needs = gpu_needs(FULL, 256)
    assert needs.block == 8_388_608
    assert needs.fixed == 500_000_000 + 4 * 256 * (3 * 16384 + 2 * 4096) + 8_388_608


@pytest.mark.parametrize(
    ("gigabytes", "blocks", "head"),
    [(1, 0, False), (2, 0, False), (3, 5, False), (4, 10, False), (6, 21, False), (7.5, 28, False), (8, 28, True)],
)
def test_how_many_blocks_a_gpu_takes_at_full_size(gigabytes, blocks, head):
    free, fitting = gigabytes * GB - 1_909_286_144, 0
    while fitting < 28 and free >= BLOCK + 67_108_864:
        free -= BLOCK + 67_108_864
        fitting += 1
    assert (fitting, fitting == 28 and free >= HEAD) == (blocks, head), "the numbers above, counted one by one"
    expected = BLOCKS[:blocks] + ("lm",) * head
    assert graphs_for_gpu(INT4, FULL, int(gigabytes * GB)) == expected
    assert graphs_for_gpu({"embedding": 5} | INT4, FULL, int(gigabytes * GB)) == expected, "never the embedding"


def test_the_last_byte_of_gpu_memory_decides():
    exact = gpu_needs(FULL, 2048).fixed + 3 * (BLOCK + 67_108_864)
    assert graphs_for_gpu(INT4, FULL, exact) == BLOCKS[:3]
    assert graphs_for_gpu(INT4, FULL, exact - 1) == BLOCKS[:2]
    whole = gpu_needs(FULL, 2048).fixed + 28 * (BLOCK + 67_108_864) + HEAD
    assert graphs_for_gpu(INT4, FULL, whole) == (*BLOCKS, "lm")
    assert graphs_for_gpu(INT4, FULL, whole - 1) == BLOCKS
    assert graphs_for_gpu(INT4, FULL, 0) == ()


def test_a_block_that_does_not_fit_ends_it_so_that_hidden_states_cross_once():
    sizes = {"glm_block_0": 10, "glm_block_1": 10**12, "glm_block_2": 10, "lm": 10}
    assert graphs_for_gpu(sizes, FULL, 20 * GB) == ("glm_block_0",)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=28), st.integers(0, 2 * 10**10), st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_a_gpu_is_never_given_more_than_it_holds_and_more_memory_is_never_fewer_graphs(blocks, memory, more):
    sizes = {"embedding": 7} | {f"glm_block_{i}": size for i, size in enumerate(blocks)} | {"lm": 3 * 10**8}
    needs, taken = gpu_needs(FULL, FULL.max_positions), graphs_for_gpu(sizes, FULL, memory)
    assert list(sizes)[1 : 1 + len(taken)] == list(taken), "the first ones, in order"
    count = needs.fixed + sum(sizes[name] + needs.block * (name != "lm") for name in taken)
    assert count <= memory or not taken
    assert graphs_for_gpu(sizes, FULL, memory + more)[: len(taken)] == taken


def test_a_model_of_fewer_positions_needs_less_of_a_gpu():
    short = dataclasses.replace(FULL, max_positions=256)
    assert len(graphs_for_gpu(INT4, short, 3 * GB)) > len(graphs_for_gpu(INT4, FULL, 3 * GB))
    assert PROVIDER_BYTES == 500_000_000


# Memory


def test_without_a_limit_all_is_kept():
    placement = place(INT4, kv_bytes=10**15)
    assert (placement.gpu, placement.resident, placement.streamed) == ((), tuple(INT4), ())
    assert (placement.limit, placement.raised) == (None, False)


def test_all_is_kept_up_to_the_last_byte():
    total = 28 * BLOCK + HEAD
    assert place(INT4, kv_bytes=100, memory_limit=total + 100).resident == tuple(INT4)
    assert place(INT4, kv_bytes=101, memory_limit=total + 100).streamed != ()


def test_full_size_int4_within_2_gigabytes():
    """Three streamed blocks and the head leave room for eight more blocks."""
    placement = place(INT4, memory_limit=2 * GB)
    blocks = (2 * GB - HEAD - 3 * BLOCK) // BLOCK
    assert blocks == 8
    assert placement.resident == (*BLOCKS[:8], "lm")
    assert placement.streamed == BLOCKS[8:]
    assert placement.window_bytes == 2 * GB - HEAD - 8 * BLOCK == 442_000_000
    assert (placement.limit, placement.raised) == (2 * GB, False)


@pytest.mark.parametrize("gigabytes", [1, 1.5, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 100, 500])
def test_full_size_int4_within_a_limit_counted_one_by_one(gigabytes, length):
    kv = 28 * 32768 * length
    free = int(gigabytes * GB) - kv
    kept = 0
    if free >= HEAD + 3 * BLOCK:
        while HEAD + (kept + 1) * BLOCK + min(3, 28 - kept - 1) * BLOCK <= free:
            kept += 1
    else:  # the head is streamed, and while blocks are there is room for reading ahead
        kept = max(free - HEAD, 0) // BLOCK
    placement = place(INT4, kv_bytes=kv, memory_limit=int(gigabytes * GB))
    assert sum(name != "lm" for name in placement.resident) == kept
    assert ("lm" in placement.resident) == (free >= HEAD + 3 * BLOCK)


def test_full_size_at_2048_places_raises_a_limit_of_2_gigabytes():
    """28 times 67 MB of KV cache beside a head of 550 MB are more."""
    kv = 28 * 67_108_864
    placement = place(INT4, kv_bytes=kv, memory_limit=2 * GB)
    assert placement.raised
    assert placement.limit == kv + HEAD
    assert (placement.resident, placement.streamed) == ((), tuple(INT4))
    assert placement.window_bytes == 2 * GB - kv, "what does not need more takes no more than was asked for"
    assert place(INT4, kv_bytes=3 * GB, memory_limit=2 * GB).window_bytes == 0


def test_full_size_float_within_4_gigabytes_streams_all():
    placement = place(FLOAT, memory_limit=4 * GB)
    assert not placement.raised
    assert set(placement.resident) <= set(BLOCKS)
    assert {"embedding", "lm"} <= set(placement.streamed)


def test_a_little_more_memory_keeps_no_fewer_float_blocks():
    """Embedding and head stand side by side in the round of a token; reading both ahead must not cost what is kept."""
    placements = [place(FLOAT, memory_limit=limit * 10**8) for limit in range(22, 280, 2)]
    kept = [sum(FLOAT[name] for name in placement.resident) for placement in placements]
    assert kept == sorted(kept), "bytes, for the head is worth several blocks"


def test_the_largest_are_kept_first_and_listed_in_the_order_of_the_data():
    sizes = {"embedding": 1, "glm_block_0": 2, "glm_block_1": 9, "glm_block_2": 2, "lm": 5}
    placement = place(sizes, memory_limit=17, read_ahead=0)
    assert placement.resident == ("embedding", "glm_block_1", "lm")
    assert placement.streamed == ("glm_block_0", "glm_block_2")
    assert placement.window_bytes == 2


def test_what_runs_on_a_gpu_takes_no_memory():
    gpu = (*BLOCKS[:20],)
    placement = place(INT4, memory_limit=GB + HEAD, gpu=gpu)
    assert placement.gpu == gpu
    assert set(placement.resident) | set(placement.streamed) == set(INT4) - set(gpu)
    assert place(INT4, memory_limit=8 * BLOCK + HEAD, gpu=gpu).streamed == ()
    assert place(INT4, memory_limit=1, gpu=tuple(INT4)) == Placement(tuple(INT4), (), limit=1)


def test_without_reading_ahead_more_is_kept():
    counts = [len(place(INT4, memory_limit=2 * GB, read_ahead=ahead).resident) for ahead in range(4)]
    assert counts == [11, 10, 9, 8]
    assert READ_AHEAD == 2


# What always holds

SIZES = st.lists(st.integers(1, 1000) | st.sampled_from([100, 400]), min_size=1, max_size=12)
MODELS = SIZES.map(lambda counts: {f"graph_{i}": count for i, count in enumerate(counts)})


@given(MODELS, st.data())
@settings(max_examples=400, deadline=None)
def test_every_graph_is_in_one_place_and_what_is_held_is_within_the_limit(sizes, data):
    limit = data.draw(st.integers(1, 2 * sum(sizes.values())))
    kv = data.draw(st.integers(0, 1500))
    gpu = tuple(name for name in sizes if data.draw(st.integers(0, 4)) == 0)
    placement = place(sizes, kv_bytes=kv, memory_limit=limit, gpu=gpu, read_ahead=data.draw(st.integers(0, 4)))
    parts = (placement.gpu, placement.resident, placement.streamed)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    for part in parts:
        assert list(part) == [name for name in sizes if name in part], "the order of the data"
    assert placement.gpu == gpu
    ours = {name: size for name, size in sizes.items() if name not in gpu}
    kept = sum(sizes[name] for name in placement.resident)
    largest = max((sizes[name] for name in placement.streamed), default=0)
    everything = sum(ours.values()) + kv
    needed = max(ours.values(), default=0) + kv
    assert placement.raised == (needed > limit), "only where there is no other way"
    if placement.raised:
        assert placement.limit == needed
        assert (placement.resident, placement.streamed) == ((), tuple(ours))
        assert placement.window_bytes == max(limit - kv, 0)
    elif ours:
        assert placement.limit == limit
        assert kept + largest + kv <= limit
        assert (placement.streamed == ()) == (everything <= limit)
        if placement.streamed:
            assert kept + placement.window_bytes + kv == limit, "all of it is of use"
            assert placement.window_bytes >= largest


@given(MODELS, st.integers(0, 4), st.data())
@settings(max_examples=200, deadline=None)
def test_no_other_graph_would_fit_beside_what_is_kept(sizes, read_ahead, data):
    limit = data.draw(st.integers(max(sizes.values()), sum(sizes.values())))
    placement = place(sizes, memory_limit=limit, read_ahead=read_ahead)
    kept = sum(sizes[name] for name in placement.resident)
    for name in placement.streamed:
        others = sorted((sizes[other] for other in placement.streamed if other != name), reverse=True)
        assert not others or kept + sizes[name] + sum(others[: 1 + read_ahead]) > limit


@given(st.integers(2, 30), st.integers(1, 100), st.integers(0, 300), st.integers(0, 4), st.data())
@settings(max_examples=300, deadline=None)
def test_more_memory_never_keeps_fewer_bytes_of_blocks_of_one_size(count, block, head, read_ahead, data):
    sizes = {f"glm_block_{i}": block for i in range(count)} | ({"lm": head} if head else {})
    whole_window = (1 + read_ahead) * block + head  # below it more memory first goes into reading ahead
    limit = whole_window + data.draw(st.integers(0, 2 * sum(sizes.values())))
    more = limit + data.draw(st.integers(0, sum(sizes.values())))
    kept = [place(sizes, memory_limit=n, read_ahead=read_ahead).resident for n in (limit, more)]
    assert sum(sizes[name] for name in kept[0]) <= sum(sizes[name] for name in kept[1])


@given(st.integers(2, 30), st.integers(1, 100), st.integers(1, 300), st.integers(0, 4), st.data())
@settings(max_examples=300, deadline=None)
def test_more_memory_never_keeps_fewer_bytes_beside_an_embedding_of_the_heads_size(count, block, ends, ahead, data):
    sizes = {"embedding": ends} | {f"glm_block_{i}": block for i in range(count)} | {"lm": ends}
    assume(ends >= block)
    limit = (1 + ahead) * block + 2 * ends + data.draw(st.integers(0, 2 * sum(sizes.values())))
    more = limit + data.draw(st.integers(0, sum(sizes.values())))
    kept = [place(sizes, memory_limit=n, read_ahead=ahead).resident for n in (limit, more)]
    assert sum(sizes[name] for name in kept[0]) <= sum(sizes[name] for name in kept[1])


@given(MODELS, st.integers(0, 3), st.data())
@settings(max_examples=100, deadline=None)
def test_a_larger_kv_cache_is_as_good_as_a_smaller_limit(sizes, read_ahead, data):
    limit = data.draw(st.integers(max(sizes.values()), sum(sizes.values())))
    kv = data.draw(st.integers(0, limit - max(sizes.values())))
    beside = place(sizes, kv_bytes=kv, memory_limit=limit, read_ahead=read_ahead)
    alone = place(sizes, memory_limit=limit - kv, read_ahead=read_ahead)
    assert (beside.resident, beside.window_bytes) == (alone.resident, alone.window_bytes)
