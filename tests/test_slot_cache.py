"""Graphs that write into their KV cache: by plain onnxruntime against the unpatched model, and in a session."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import record_again
from derived_bundles import derived, glmexport, odd_checkpoint, quantize_pass
from flavor_bundles import CALLS, expected_of, flavor_bundle, reference_model, run_bound, words
from hypothesis import given
from hypothesis import strategies as st

from glmexport import graph_pool, names
from glmexport.config import ModelConfig, SpecialIds
from glmexport.errors import BundleError, GlmExportError
from glmexport.form import RAW, SHARED, EmbeddingForm
from glmexport.generation import Decoder, generate
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.prompt import prepare_prompt
from glmexport.sampling import Sampling
from glmexport.session import Session
from glmexport.slot_cache import SlotCache, capacity_for
from glmexport.trace import TRACED_LENGTHS

CLOSE = 2e-5  # float32 sums in another order, through one block or two
CONFIG = ModelConfig("chatglm-6b", 64, 48, 2, 3, 80, 2048, 1e-5, 0, SpecialIds(50, 51, 54, 55, 3, 5))


# The cache itself


@given(st.integers(0, 100_000))
def test_a_capacity_holds_the_length_and_little_more(length):
    capacity = capacity_for(length)
    assert capacity % 64 == 0
    assert max(length, 64) <= capacity <= length * (1 + 1 / 8) + 64
    assert capacity_for(length + 1) >= capacity
    assert capacity_for(capacity) == capacity


def test_capacities_grow_in_steps():
    assert [capacity_for(length) for length in (0, 1, 64, 65, 128, 129, 1024, 1025, 2048)] == [
        *(64, 64, 64, 128, 128, 192, 1024, 1152, 2048)
    ]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 99))
def test_room_is_made_and_what_was_written_stays(lengths, slots, seed):
    random = np.random.default_rng(seed)
    cache, written = SlotCache(CONFIG, slots, blocks=range(1, 3)), []
    held = [np.zeros((slots, 3, 0, 16), np.float32)] * 4
    for length in lengths:
        before = cache.capacity
        cache.reserve(length)
        assert cache.capacity == (before if length <= before else capacity_for(length))
        arrays = [*cache.of(1), *cache.of(2)]
        for array, content in zip(arrays, held, strict=True):
            assert array.shape == (slots, 3, cache.capacity, 16)
            assert array.flags.c_contiguous
            assert np.array_equal(array[:, :, : content.shape[2]], content)
            assert not array[:, :, content.shape[2] :].any(), "places that nobody wrote are zeros"
        for array in arrays:
            array[:, :, :length] = random.standard_normal((slots, 3, length, 16))
        held = [array[:, :, : max(length, *(content.shape[2] for content in held))].copy() for array in arrays]
        written.append(length)
        assert cache.nbytes == sum(array.nbytes for array in (*cache.keys, *cache.values)) == 4 * arrays[0].nbytes


def test_slots_in_front_are_one_view():
    cache = SlotCache(CONFIG, 4, "float16")
    assert (cache.capacity, cache.nbytes, len(cache.keys), cache.blocks) == (0, 0, 2, range(2))
    cache.reserve(70)
    assert cache.keys[0].dtype == np.float16
    front = cache.of(1)[0][:2]
    assert front.flags.c_contiguous
    assert front.ctypes.data == cache.keys[1].ctypes.data


# The graphs, by plain onnxruntime, against the unpatched model


@pytest.fixture(scope="module")
def both(shared) -> Path:
    return flavor_bundle(shared, "both")


@pytest.fixture(scope="module")
def ort(shared) -> Path:
    return flavor_bundle(shared, "ort")


@pytest.fixture(scope="module")
def reference(shared):
    return reference_model(odd_checkpoint(shared))


@pytest.fixture(scope="module")
def opened(both) -> dict[str, onnxruntime.InferenceSession]:
    """Every graph in `ort/`, by its name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return {
        path.stem: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for path in (both / "ort").glob("*.onnx")
    }


def test_the_graphs_have_the_interface_that_is_written_down(opened, reference):
    config, _ = reference
    hidden, heads, width, vocab = config.hidden_size, config.num_heads, config.head_dim, config.vocab_size
    cache = ["batch", heads, "capacity", width]
    states, ids = ["batch", "seq", hidden], ["batch", "seq"]
    expected = {
        "embedding": ([("input_ids", "int64", ids)], [("inputs_embeds", "float", states)]),
        "lm": ([("hidden_states", "float", states)], [("logits", "float", ["batch", vocab])]),
        "glm_block_1": (
            [
                ("inputs_embeds", "float", states),
                ("attention_mask", "bool", ["batch", 1, "seq", "capacity"]),
                ("position_ids", "int64", ["batch", 2, "seq"]),
                ("write_indices", "int64", ["batch"]),
                ("key_cache", "float", cache),
                ("value_cache", "float", cache),
            ],
            [
                ("hidden_states", "float", states),
                ("key_cache_out", "float", cache),
                ("value_cache_out", "float", cache),
            ],
        ),
    }
    expected["glm_block_0"] = expected["glm_block_1"]
    found = {
        name: tuple(
            [(value.name, value.type.removeprefix("tensor(").removesuffix(")"), value.shape) for value in values]
            for values in (session.get_inputs(), session.get_outputs())
        )
        for name, session in opened.items()
    }
    assert found == expected


def assert_computed(inputs, before, rows, hidden, keys, values) -> None:
    """Rows, new places and every other place of the caches are what they must be."""
    seq = hidden.shape[1]
    for row, start in enumerate(inputs["write_indices"].tolist()):
        told = ~inputs["attention_mask"][row, 0].all(-1)  # a row that sees nothing gives what nobody reads
        assert told.any()
        np.testing.assert_allclose(hidden[row][told], rows[row][0][told], atol=CLOSE, rtol=CLOSE)
        for cache, name, new in ((keys, "key_cache", rows[row][1]), (values, "value_cache", rows[row][2])):
            np.testing.assert_allclose(cache[row, :, start : start + seq], new, atol=CLOSE, rtol=CLOSE)
            assert np.array_equal(cache[row, :, :start], before[name][row, :, :start])
            assert np.array_equal(cache[row, :, start + seq :], before[name][row, :, start + seq :])


@pytest.mark.parametrize("name", CALLS)
def test_a_cache_bound_as_input_and_output_is_written_where_it_lies(opened, reference, name):
    call = CALLS[name]
    if name != "the traced lengths":
        assert (len(call.starts), call.seq, call.capacity) != tuple(
            TRACED_LENGTHS[axis] for axis in ("batch", "seq", "capacity")
        )
    for block_id in range(2):
        inputs = call.inputs(reference[0], seed=block_id)
        before = {name: array.copy() for name, array in inputs.items()}
        rows = expected_of(reference, block_id, inputs)
        hidden = run_bound(opened[f"glm_block_{block_id}"], inputs)
        assert_computed(inputs, before, rows, hidden, inputs["key_cache"], inputs["value_cache"])
        for untouched in ("inputs_embeds", "attention_mask", "position_ids", "write_indices"):
            assert np.array_equal(inputs[untouched], before[untouched])


@pytest.mark.parametrize("name", CALLS)
def test_without_binding_the_same_comes_out_and_the_input_stays(opened, reference, name):
    inputs = CALLS[name].inputs(reference[0])
    before = {name: array.copy() for name, array in inputs.items()}
    hidden, keys, values = opened["glm_block_1"].run(["hidden_states", "key_cache_out", "value_cache_out"], inputs)
    assert_computed(inputs, before, expected_of(reference, 1, before), hidden, keys, values)
    for name, array in inputs.items():
        assert np.array_equal(array, before[name])


def test_what_is_hidden_changes_nothing(opened, reference):
    """Noise or zeros in places behind the length: the same bits."""
    call = CALLS["rows at different places"]
    found = []
    for hidden_places in (1.0, 0.0, 1e4):
        inputs = call.inputs(reference[0])
        for row, start in enumerate(call.starts):
            for name in ("key_cache", "value_cache"):
                inputs[name][row, :, start + 1 :] *= np.float32(hidden_places)
        found.append(run_bound(opened["glm_block_0"], inputs))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_a_place_behind_the_cache_is_refused_and_not_written(opened, reference):
    for start in (64, 1 << 40, -2):
        inputs = CALLS["one more token"].inputs(reference[0])
        before = inputs["key_cache"].copy()
        inputs["write_indices"][:] = start
        with pytest.raises(Exception, match=r"(?i)write_indices|index|indices"):
            run_bound(opened["glm_block_0"], inputs)
        assert np.array_equal(inputs["key_cache"], before)


# In a session


def prompt_steps(session: Session, rows: list[list[int]], steps: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """Greedy tokens and logits of a batch, prompt first."""
    decoder = Decoder(session, rows)
    logits = [decoder.prefill()[names.LOGITS]]
    for _ in range(steps):
        logits.append(decoder.step(logits[-1].argmax(-1).tolist())[names.LOGITS])
    return [one.argmax(-1).tolist() for one in logits], logits


@pytest.fixture(scope="module")
def sessions(both):
    with Session(both, threads=1, flavor="ort") as fast, Session(both, threads=1, flavor="portable") as portable:
        yield fast, portable


@pytest.mark.parametrize(
    "lengths",
    [(2,), (9,), (63,), (64,), (66,), (126, 5), (131,), (4, 20, 7), (300, 2)],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_greedy_tokens_are_those_of_the_portable_flavor(sessions, lengths):
    fast, portable = sessions
    rows = [words(fast.config, length, seed) for seed, length in enumerate(lengths)]
    found, logits = prompt_steps(fast, rows, 5)
    expected, theirs = prompt_steps(portable, rows, 5)
    assert found == expected
    for ours, other in zip(logits, theirs, strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-4, rtol=1e-4)


def test_the_cache_grows_in_steps_while_tokens_come(sessions):
    fast, portable = sessions
    rows = [words(fast.config, 60), words(fast.config, 12)]
    ours, theirs = Decoder(fast, rows), Decoder(portable, rows)
    cache, capacities = ours._pasts, []
    assert isinstance(cache, SlotCache)
    token = ours.prefill()[names.LOGITS].argmax(-1)
    assert token.tolist() == theirs.prefill()[names.LOGITS].argmax(-1).tolist()
    for _ in range(75):
        capacities.append(cache.capacity)
        token, other = (decoder.step(token.tolist())[names.LOGITS].argmax(-1) for decoder in (ours, theirs))
        assert token.tolist() == other.tolist()
    assert capacities == [64] * 5 + [128] * 64 + [192] * 6


@pytest.mark.parametrize("limit", ["one byte", "two graphs", "all but one"])
def test_streamed_graphs_give_the_same_bits(both, sessions, limit):
    sizes = [*sessions[0].graph_sizes.values()]
    fast, rows = sessions[0], [words(sessions[0].config, 61), words(sessions[0].config, 4)]
    limit = {"one byte": 1, "two graphs": 2 * max(sizes), "all but one": sum(sizes)}[limit]
    expected = prompt_steps(fast, rows, 6)[1]
    with Session(both, threads=1, memory_limit=limit) as session:
        assert session.flavor == "ort"
        assert all(map(np.array_equal, prompt_steps(session, rows, 6)[1], expected))
        assert session.placement.streamed
        assert session.placement.raised == (limit == 1)


def test_a_cache_that_is_used_again_counts_with_all_its_places(both):
    """It does not shrink; and a graph that is streamed from now on is not kept open by its binding."""
    with Session(both, threads=1) as session:
        total, config = sum(session.graph_sizes.values()), session.config
        room = session.kv_bytes(1, 64)
    with Session(both, threads=1, memory_limit=total + room) as session:
        pasts = session.empty_pasts(1)
        for length in (3, 200, 3, 200):
            prompt = prepare_prompt([words(config, length)], config.special_ids)
            session.forward(prompt.input_ids, prompt.attention_mask, prompt.position_ids, pasts)
            assert bool(session.placement.streamed) == (pasts.capacity > 64)
            assert {*session._in_place._step.bound}.isdisjoint(session.placement.streamed)
        short = prepare_prompt([words(config, 3)], config.special_ids)
        session.forward(short.input_ids, short.attention_mask, short.position_ids, session.empty_pasts(1))
        assert not session.placement.streamed


def test_two_caches_in_turn_do_not_meet(sessions):
    """Bindings are kept while calls are of one shape; none may write into the other's cache."""
    fast, _ = sessions
    prompts = [words(fast.config, 12, seed) for seed in (1, 2)]
    expected = [prompt_steps(fast, [prompt], 6)[1] for prompt in prompts]
    decoders = [Decoder(fast, [prompt]) for prompt in prompts]
    found = [[decoder.prefill()[names.LOGITS]] for decoder in decoders]
    for _ in range(6):
        for decoder, logits in zip(decoders, found, strict=True):
            logits.append(decoder.step(logits[-1].argmax(-1).tolist())[names.LOGITS])
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(np.array_equal, ours, theirs))


def test_a_cache_that_grew_between_two_steps_is_the_one_that_is_written(sessions):
    fast, _ = sessions
    prompt = words(fast.config, 20)
    expected = prompt_steps(fast, [prompt], 6)[0]
    decoder = Decoder(fast, [prompt])
    token, found = decoder.prefill()[names.LOGITS].argmax(-1), []
    for room in (10, 70, 70, 400, 30, 401):
        found.append(token.tolist())
        decoder._pasts.reserve(room)
        token = decoder.step(token.tolist())[names.LOGITS].argmax(-1)
    assert [*found, token.tolist()] == expected
    assert decoder._pasts.capacity == capacity_for(401)


def test_a_cache_made_where_another_lay_is_not_taken_for_it(sessions):
    """Two caches of one id, as Python gives them out, one after the other."""
    fast, _ = sessions
    for seed in range(4):
        prompt = words(fast.config, 9, seed)
        first = prompt_steps(fast, [prompt], 2)[1]
        fast._in_place.forget()
        assert all(map(np.array_equal, prompt_steps(fast, [prompt], 2)[1], first))


def test_rows_in_slots_of_their_own_take_one_step_together(sessions):
    """Each prompt alone into its slot, then all decode at their own lengths: what each gives alone."""
    fast, portable = sessions
    config = fast.config
    prompts = [prepare_prompt([words(config, length, length)], config.special_ids) for length in (9, 62, 4)]
    expected = [prompt_steps(portable, [words(config, length, length)], 6)[0] for length in (9, 62, 4)]
    cache, found = SlotCache(config, 4), list[list[int]]()
    for slot, prompt in enumerate(prompts):
        given = (prompt.input_ids, prompt.attention_mask, prompt.position_ids, np.zeros(1, np.int64))
        hidden = fast.forward_slots(cache, *given, first_slot=slot + 1)
        found.append(fast.head(hidden)[names.LOGITS].argmax(-1).tolist())
    assert not cache.keys[0][0].any(), "the slot in front is nobody's"
    lengths = np.array([prompt.input_ids.shape[1] for prompt in prompts])
    for step in range(6):
        ends = lengths + step
        mask = (np.arange(ends.max() + 1) > ends[:, None])[:, None, None]
        positions = np.concatenate([prompt.decode_step(step)[1] for prompt in prompts])
        tokens = np.array([row[-1:] for row in found])
        logits = fast.head(fast.forward_slots(cache, tokens, mask, positions, ends, first_slot=1))[names.LOGITS]
        for row, token in zip(found, logits.argmax(-1).tolist(), strict=True):
            row.append(token)
    assert found == [[token for (token,) in row] for row in expected]
    assert cache.capacity == 128
    assert not cache.keys[0][0].any()


def test_parts_of_a_session_have_the_shapes_of_the_portable_flavor(sessions):
    config, random = sessions[0].config, np.random.default_rng(3)
    ids = np.array([[50, 60, 70], [80, 90, 100]])
    embedded = [session.embed(ids) for session in sessions]
    assert embedded[0].shape == (3, 2, config.hidden_size)
    assert np.array_equal(*embedded)
    mask = np.zeros((2, 1, 3, 8), np.bool_)
    mask[:, 0] = np.arange(8) > np.arange(3)[:, None] + 5
    mask[1, ..., :2] = True
    positions = random.integers(0, 20, (2, 2, 3))
    past = random.standard_normal((2, 5, 2, config.num_heads, config.head_dim), np.float32)
    before = past.copy()
    found, expected = (session.block(1, embedded[1], mask, positions, past) for session in sessions)
    assert np.array_equal(past, before)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=CLOSE)
    assert np.array_equal(found[1][:, :5], before), "what was there is handed on, bit for bit"
    heads = [session.head(expected[0])[names.LOGITS] for session in sessions]
    assert heads[0].shape == (2, config.vocab_size)
    np.testing.assert_allclose(*heads, atol=1e-4)

    caches = [session.empty_pasts(2) for session in sessions]
    hidden = [one.copy() for one in embedded]
    first = (np.zeros((2, 1, 3, 3), np.bool_), positions)
    for block_id in range(config.num_blocks):
        hidden = [
            session.step(block_id, states, *first, cache)
            for session, states, cache in zip(sessions, hidden, caches, strict=True)
        ]
        assert hidden[0].shape == (3, 2, config.hidden_size)
        np.testing.assert_allclose(*hidden, atol=CLOSE)
        for array, theirs in zip(caches[0].of(block_id), caches[1][block_id], strict=True):
            np.testing.assert_allclose(array[:, :, :3].transpose(2, 0, 1, 3), theirs, atol=CLOSE)


def test_what_comes_out_is_not_overwritten_by_the_next_call(sessions):
    fast, _ = sessions
    config = fast.config
    prompt = prepare_prompt([words(config, 7)], config.special_ids)
    given = (prompt.input_ids, prompt.attention_mask, prompt.position_ids)
    first = fast.forward(*given, fast.empty_pasts(1))
    kept = first.copy()
    fast.forward(prompt.input_ids[:, ::-1].copy(), *given[1:], fast.empty_pasts(1))
    assert np.array_equal(first, kept)


def test_a_cache_of_the_wrong_kind_is_refused(sessions):
    fast, portable = sessions
    prompt = prepare_prompt([words(fast.config, 4)], fast.config.special_ids)
    given = (prompt.input_ids, prompt.attention_mask, prompt.position_ids)
    with pytest.raises(TypeError, match="a cache that is written into goes with a session of the flavor ort"):
        portable.forward(*given, fast.empty_pasts(1))


# Which flavor it is


def test_the_flavor_that_is_run_by_default(both, ort, shared):
    portable = flavor_bundle(shared, "portable")
    for bundle, options, flavor in (
        (both, {}, "ort"),
        (both, {"providers": "CPUExecutionProvider"}, "ort"),
        (both, {"memory_limit": 1}, "ort"),
        (both, {"gpu_memory": 1000}, "portable"),
        (both, {"providers": ("CUDAExecutionProvider",)}, "portable"),
        (both, {"flavor": "portable"}, "portable"),
        (portable, {}, "portable"),
        (ort, {}, "ort"),
    ):
        with Session(bundle, **options) as session:
            assert session.flavor == flavor
            assert isinstance(session.empty_pasts(1), SlotCache) == (flavor == "ort")


@pytest.mark.parametrize(("kind", "flavor"), [("ort", "portable"), ("portable", "ort"), ("both", "fast")])
def test_a_flavor_that_there_is_not_is_one_sentence(shared, kind, flavor):
    with pytest.raises(BundleError, match=rf"^[^\n]+ and none of '{flavor}'; split with --flavor both\.$"):
        Session(flavor_bundle(shared, kind), flavor=flavor)


def test_generation_uses_it(both, shared):
    greedy = Sampling(greedy=True)
    with Session(both) as fast, Session(both, flavor="portable") as portable:
        answers = [generate(session, "你好", sampling=greedy, max_tokens=6) for session in (fast, portable)]
        assert answers[0].text == answers[1].text
        assert answers[0].ids == answers[1].ids
        assert len(answers[0].ids) > 1
        assert isinstance(answers[0]._decoder._pasts, SlotCache)


def test_commands_use_it(both, ort, monkeypatch):
    opened: list[str] = []
    load = graph_pool.GraphPool._load

    def watched(pool, graph):
        opened.append(pool._flavor)
        return load(pool, graph)

    monkeypatch.setattr(graph_pool.GraphPool, "_load", watched)
    answers = [glmexport("generate", bundle, "你好", "--greedy", "--max-tokens", "4", "-q") for bundle in (both, ort)]
    assert {answer.status for answer in answers} == {0}
    assert answers[0].stdout == answers[1].stdout
    assert {*opened} == {"ort"}


@pytest.mark.parametrize("embedding", [EmbeddingForm(RAW, "bfloat16"), EmbeddingForm(SHARED)], ids=["raw", "shared"])
def test_rows_that_are_no_graph_come_in_the_order_of_the_flavor(both, tmp_path, embedding):
    derived(both, tmp_path / "made", quantize_pass(8), EmbedPass(embedding))
    rows = [words(open_config(both), 5), words(open_config(both), 9)]
    with Session(tmp_path / "made") as fast, Session(tmp_path / "made", flavor="portable") as portable:
        assert np.array_equal(fast.embed(np.array([[50, 60, 70]])), portable.embed(np.array([[50, 60, 70]])))
        ours, theirs = (prompt_steps(session, rows, 2)[1] for session in (fast, portable))
    for found, expected in zip(ours, theirs, strict=True):
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected), "activations are rounded to int8"


def open_config(bundle: Path) -> ModelConfig:
    from glmexport.bundle import open_bundle

    return open_bundle(bundle).config


# What can be wrong


def test_inputs_that_do_not_fit_are_told_in_a_sentence(both):
    with Session(both, threads=1) as session:
        with pytest.raises(BundleError, match=r"^ort/lm\.onnx failed to run \([^\n]+\); [^\n]+\.$"):
            session.head(np.zeros((1, 1, 7), np.float32))
        mask, positions = np.zeros((1, 1, 1, 1), np.bool_), np.zeros((1, 2, 1), np.int64)
        with pytest.raises(BundleError, match=r"^ort/glm_block_0\.onnx failed to run \([^\n]+\); [^\n]+\.$"):
            session.block(0, np.zeros((1, 1, 7), np.float32), mask, positions, session.empty_past(1))
        right = np.zeros((1, 1, session.config.hidden_size), np.float32)
        session.block(0, right, mask, positions, session.empty_past(1))


@pytest.mark.parametrize("options", [{}, {"memory_limit": 1}])
def test_a_damaged_graph_is_told_with_its_folder(both, tmp_path, options):
    copy = shutil.copytree(both, tmp_path / "copy")
    path = copy / "ort" / "glm_block_1.onnx"
    count = path.stat().st_size
    path.unlink()
    path.write_bytes(b"\xff" * count)
    record_again(copy, "ort/glm_block_1.onnx")
    with Session(copy, threads=1, **options) as session:
        decoder = Decoder(session, [words(session.config, 4)])
        with pytest.raises(BundleError, match=r"^ort/glm_block_1\.onnx is not a readable ONNX model; [^\n]+\.$"):
            decoder.prefill()
    with Session(copy, threads=1, flavor="portable") as session:
        Decoder(session, [words(session.config, 4)]).prefill()


@pytest.mark.parametrize("name", ["ort/glm_block_0.onnx", "ort/glm_block_1.onnx.data"])
def test_a_file_that_went_away_is_told(both, tmp_path, name):
    copy = shutil.copytree(both, tmp_path / "copy")
    with Session(copy, threads=1) as session:
        (copy / name).unlink()
        with pytest.raises(
            BundleError, match=rf"^[^\n]+{name}[^\n]* found no such file, expected \d+ bytes; [^\n]+\.$"
        ):
            Decoder(session, [words(session.config, 4)]).prefill()


# Threads


TOGETHER = """
import json, sys
import onnxruntime
from glmexport import Session
from glmexport.generation import generate
from glmexport.sampling import Sampling
from glmexport.thread_pool import run_alone

bundle, graph = sys.argv[1:]

def plain():
    options = onnxruntime.SessionOptions()
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"], enable_fallback=False)

def answer(**options):
    with Session(bundle, **options) as session:
        answer = generate(session, "a", sampling=Sampling(greedy=True), max_tokens=3)
        return [answer.text, *answer.ids]

answers = [answer(threads=2), answer(threads=1), answer()]
plain()  # whoever else uses onnxruntime in this process goes on
run_alone()
answers += [answer(threads=2), answer(threads=3), answer()]
try:
    plain()
except RuntimeError:
    answers.append("refused")
print(json.dumps(answers))
"""


def test_graphs_share_threads_in_a_process_of_their_own_and_nowhere_else(both):
    """There is one pool, whose size the first to ask decides; every session after that has to use it."""
    command = [sys.executable, "-c", TOGETHER, str(both), str(both / "lm.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *answers, last = json.loads(done.stdout)
    assert len(answers) == 6
    assert all(answer == answers[0] for answer in answers)
    assert last == "refused", "if onnxruntime opens it, all processes can have one pool"


def test_sessions_here_leave_others_alone(both, sessions):
    """In one process with plain sessions of onnxruntime, and with as many threads as each is given."""
    expected = prompt_steps(sessions[0], [words(sessions[0].config, 30)], 3)[0]
    for threads in (2, 3, None):
        with Session(both, threads=threads) as session:
            assert prompt_steps(session, [words(session.config, 30)], 3)[0] == expected
    onnxruntime.InferenceSession(both / "lm.onnx", providers=["CPUExecutionProvider"], enable_fallback=False)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_command_runs_with_the_threads_that_it_is_given(both, threads):
    command = ["generate", str(both), "a", "--greedy", "--max-tokens", "2", "--threads", threads, "-q"]
    done = subprocess.run([sys.executable, "-m", "glmexport", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_threads_that_are_none_are_refused(both):
    with pytest.raises(GlmExportError, match="threads is 0"):
        Session(both, threads=0)
