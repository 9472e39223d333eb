"""Bundles run within limits of memory: the same numbers bit for bit, never more held than allowed, opened in time."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections import Counter

import numpy as np
import pytest
from checkpoints import write_checkpoint
from conftest import record_again, split_directory
from derived_bundles import derived, quantize_pass

from glmexport import names
from glmexport.errors import BundleError
from glmexport.form import RAW, SHARED, EmbeddingForm
from glmexport.graph_pool import GraphPool
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.prompt import prepare_prompt
from glmexport.session import Session

BF16, SHARE = EmbedPass(EmbeddingForm(RAW, "bfloat16")), EmbedPass(EmbeddingForm(SHARED))
BLOCKS = 6
SIZES = {"vocab_size": 500, "hidden_size": 40, "inner": 300, "num_blocks": BLOCKS, "tied": True, "seed": 21}
FORMS = {
    "float": (),
    "int8": (quantize_pass(8, num_blocks=BLOCKS),),
    "int4": (quantize_pass(4, num_blocks=BLOCKS),),
    "int4-qdq": (quantize_pass(4, layout="qdq", num_blocks=BLOCKS),),
    "bf16": (BF16,),
    "shared": (quantize_pass(4, num_blocks=BLOCKS), SHARE),
}
PROMPTS = [[50, 60, 70, 80], [90]]
STEPS = 3


@pytest.fixture(scope="module")
def form(shared):
    """`form(name)`: a bundle of six blocks in one of FORMS; never change it."""
    checkpoint = shared("six-checkpoint", lambda path: write_checkpoint(path, tokenizer=False, **SIZES))
    floating = shared("six-float", lambda path: split_directory(checkpoint, path, opset=17))

    def make(name):
        passes = FORMS[name]
        return shared(f"six-{name}", lambda path: derived(floating, path, *passes)) if passes else floating

    return make


def opened(bundle, **options):
    return Session(bundle, threads=1, **options)


def answers(session, prompts=PROMPTS, steps=STEPS):
    """Hidden states, logits and the greedy token of a batch at every step."""
    ids = session.config.special_ids
    rows = [[*words, ids.gmask, ids.bos] for words in prompts]
    prompt = prepare_prompt(rows, ids)
    pasts = session.empty_pasts(len(rows))
    fed, mask, positions = prompt.input_ids, prompt.attention_mask, prompt.position_ids
    found = []
    for step in range(steps):
        hidden = session.forward(fed, mask, positions, pasts)
        logits = session.head(hidden[-1:])[names.LOGITS]
        found += [hidden, logits]
        fed = logits.argmax(-1)[:, None]
        found.append(fed)
        mask, positions = prompt.decode_step(step)
    return [*found, *pasts]


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


@pytest.fixture
def watched(monkeypatch):
    """What pools did: graphs asked for, those open just then, loads, and most that was held beyond the limit."""

    class Watch:
        def __init__(self):
            self.asked, self.loads, self.late, self.beyond = [], [], [], []
            self.alive = []

    watch, get, load = Watch(), GraphPool.get, GraphPool._load

    def watched_get(pool, graph):
        watch.asked.append(graph)
        if graph not in pool._open:
            watch.late.append(graph)
        session = get(pool, graph)
        placement = pool.placement
        if placement.limit is not None:
            resident = sum(pool.sizes[name] for name in placement.resident)
            free = placement.window_bytes + resident  # what is left of the limit beside the KV cache
            watch.beyond.append((graph, pool.held_bytes - free))
        return session

    def watched_load(pool, graph):
        watch.loads.append(graph)
        session = load(pool, graph)
        watch.alive.append(weakref.ref(session))
        return session

    monkeypatch.setattr(GraphPool, "get", watched_get)
    monkeypatch.setattr(GraphPool, "_load", watched_load)
    return watch


def kv_bytes(session, prompts=PROMPTS, steps=STEPS):
    longest = max(map(len, prompts)) + 2 + steps - 1
    return session.kv_bytes(len(prompts), longest)


# The same numbers


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("qdq")) for name in FORMS]
)
def test_every_limit_gives_the_same_bits(form, name, watched):
    with opened(form(name)) as session:
        sizes, kv = session.graph_sizes, kv_bytes(session)
        expected = answers(session)
        assert (session.placement.limit, session.placement.streamed) == (None, ())
    total, largest = sum(sizes.values()), max(sizes.values())
    limits = {1, (total + largest) // 2 + kv, total + kv}
    if name == "float":
        limits |= {largest + kv - 1, largest + kv, total + kv - 1}
    placed = set()
    for limit in sorted(limits):
        watched.beyond.clear()
        with opened(form(name), memory_limit=limit) as session:
            assert_same_bits(answers(session), expected)
            placement = session.placement
            assert placement.raised == (limit < largest + kv)
            assert (placement.streamed == ()) == (limit == total + kv)
            placed.add((placement.resident, placement.streamed))
        for graph, beyond in watched.beyond:
            assert beyond <= 0 or (beyond == sizes[graph] - max(limit - kv, 0) and placement.raised) or limit == 1
    assert len(placed) >= 3, "limits that place the graphs differently"


def test_what_is_held_is_never_more_than_the_limit(form, watched):
    """Graphs and KV cache together, after every graph that was asked for, at every limit that is not raised."""
    with opened(form("float")) as session:
        sizes = session.graph_sizes
        full = session.kv_bytes(2, 9)
    total, largest = sum(sizes.values()), max(sizes.values())
    for limit in np.linspace(largest + full, total + full, 9).astype(int).tolist():
        held = []
        with opened(form("float"), memory_limit=limit) as session:
            get = session._pool.get

            def watching(graph, get=get, held=held, session=session):
                result = get(graph)
                held.append(session.held_bytes)
                return result

            session._pool.get = watching
            pasts = session.empty_pasts(2)
            rows = [[50, 60, 70, 80, session.config.special_ids.gmask, session.config.special_ids.bos]] * 2
            prompt = prepare_prompt(rows, session.config.special_ids)
            session.forward(prompt.input_ids, prompt.attention_mask, prompt.position_ids, pasts)
            session.head(np.zeros((1, 2, session.config.hidden_size), np.float32))
            assert not session.placement.raised
            assert max(held) + session.kv_bytes(2, 6) <= limit
            assert max(held) > 0


def test_a_raised_limit_holds_one_graph_at_a_time_and_what_was_asked_for_else(form):
    with opened(form("float"), memory_limit=1) as session:
        assert session.placement.raised
        assert session.placement.limit == max(session.graph_sizes.values())
        get, held = session._pool.get, []

        def watching(graph):
            result = get(graph)
            held.append((session.held_bytes, session.graph_sizes[graph]))
            return result

        session._pool.get = watching
        answers(session)
        assert {count == size for count, size in held} == {True}


# Opening and closing


def test_streamed_graphs_are_opened_once_a_token_and_ahead_of_their_turn(form, watched):
    with opened(form("float")) as session:
        sizes, kv = session.graph_sizes, kv_bytes(session)
    with opened(form("float"), memory_limit=2 * max(sizes.values()) + kv) as session:
        answers(session)
        assert len(session.placement.streamed) == len(sizes)
    assert watched.asked == list(sizes) * STEPS
    assert watched.late == ["embedding"], "all but the first were being opened before they were asked for"
    opens = Counter(watched.loads)
    assert set(opens.values()) <= {STEPS, STEPS + 1}, "each once a token, and ahead of a token that did not come"
    assert opens["glm_block_5"] == STEPS


def test_without_reading_ahead_each_graph_is_opened_when_it_is_asked_for(form, watched):
    with opened(form("float")) as session:
        sizes, kv = session.graph_sizes, kv_bytes(session, steps=1)
    limit = max(sizes.values()) + min(sizes.values()) - 1 + kv
    with opened(form("float"), memory_limit=limit, read_ahead=0) as session:
        answers(session, steps=1)
        assert session.placement.resident == (), "even the smallest beside the largest would be too much"
    assert watched.late == watched.asked == watched.loads == list(sizes)


def test_resident_graphs_are_opened_once(form, watched):
    with opened(form("float")) as session:
        sizes = session.graph_sizes
        answers(session)
    assert Counter(watched.loads) == dict.fromkeys(sizes, 1)
    watched.loads.clear()
    with opened(form("float"), memory_limit=sum(sizes.values()) - 1, read_ahead=0) as session:
        kept = session.plan(6).resident
        answers(session)
        assert kept
        assert {watched.loads.count(name) for name in session.placement.resident} == {1}
        assert {watched.loads.count(name) for name in session.placement.streamed} >= {STEPS}


def test_streamed_graphs_are_closed_for_good(form, watched):
    with opened(form("float"), memory_limit=1) as session:
        answers(session)
        gc.collect()
        assert len(watched.loads) == STEPS * len(session.graph_sizes)
        assert sum(reference() is not None for reference in watched.alive) == 1, "the one that ran last"
        assert session.held_bytes == session.graph_sizes["lm"]
    gc.collect()
    assert sum(reference() is not None for reference in watched.alive) == 0


@pytest.mark.parametrize("limit", [1, 500_000])
def test_a_graph_that_is_asked_for_again_is_not_opened_again(form, watched, limit):
    with opened(form("float"), memory_limit=limit) as session:
        for _ in range(3):
            session.head(np.zeros((1, 1, 40), np.float32))
        assert watched.loads.count("lm") == 1


def test_nothing_is_opened_before_it_is_needed(form, watched):
    with opened(form("float"), memory_limit=1) as session:
        assert session.plan(100).raised
        assert session.held_bytes == 0
        assert session.kv_bytes(2, 10) == BLOCKS * 2 * 2 * 10 * 40 * 4
    assert watched.loads == []


def test_load_opens_what_is_kept_and_tells_every_byte(form, watched):
    told = []
    with opened(form("float")) as session:
        session.load(lambda graph, count: told.append((graph, count)))
        assert told == list(session.graph_sizes.items())
        assert session.held_bytes == sum(session.graph_sizes.values())
        assert sorted(watched.loads) == sorted(session.graph_sizes)
        answers(session)
        assert len(watched.loads) == len(session.graph_sizes)


def test_load_within_a_limit_keeps_to_it(form, watched):
    told = []
    with opened(form("float")) as session:
        limit = sum(session.graph_sizes.values()) - 1
    with opened(form("float"), memory_limit=limit) as session:
        session.load(lambda graph, count: told.append((graph, count)))
        assert [graph for graph, _ in told] == list(session.placement.resident)
        assert {count - session.graph_sizes[graph] for graph, count in told} == {0}
        assert session.held_bytes <= limit


# A KV cache that grows


def test_a_kv_cache_that_grows_demotes_graphs_and_changes_nothing(form, watched):
    long = [[50 + i % 400 for i in range(300)], [60] * 200, [70]]
    with opened(form("float")) as session:
        sizes = session.graph_sizes
        kv = kv_bytes(session, long)
        expected_long, expected_short = answers(session, long), answers(session)
    limit = max(max(sizes.values()) + kv, sum(sizes.values()))
    assert limit < sum(sizes.values()) + kv
    with opened(form("float"), memory_limit=limit) as session:
        assert session.placement.streamed == ()
        assert_same_bits(answers(session), expected_short)
        before = session.placement
        assert_same_bits(answers(session, long), expected_long)
        after = session.placement
        assert len(after.streamed) > len(before.streamed)
        assert max(beyond for _, beyond in watched.beyond) <= 0
        assert_same_bits(answers(session), expected_short)
        assert session.placement == before, "a new, short prompt has the room again"


def test_a_plan_for_a_length_is_what_a_run_of_that_length_gets(form):
    with opened(form("float"), memory_limit=900_000) as session:
        planned = session.plan(7)
        answers(session, [[50, 60, 70]], steps=3)
        assert session.placement == planned


# Any order


@pytest.mark.parametrize("limit", ["one byte", "some", "most"])
def test_any_order_of_use_works(form, limit, watched):
    random = np.random.default_rng(2)
    with opened(form("float")) as free:
        sizes = free.graph_sizes
        limit = {
            "one byte": 1,
            "some": max(sizes.values()) + min(sizes.values()),
            "most": sum(sizes.values()) - 1,
        }[limit]
        hidden = random.standard_normal((3, 1, 40)).astype(np.float32)
        mask = np.zeros((1, 1, 3, 3), np.bool_)
        positions = np.zeros((1, 2, 3), np.int64)
        runs = {
            "embedding": lambda session: session.embed(np.array([[4, 5]])),
            "glm_block_0": lambda session: session.block(0, hidden, mask, positions, session.empty_past(1))[0],
            "glm_block_1": lambda session: session.block(1, hidden, mask, positions, session.empty_past(1))[1],
            "lm": lambda session: session.head(hidden)[names.LOGITS],
        }
        expected = {name: run(free) for name, run in runs.items()}
        watched.beyond.clear()
        with opened(form("float"), memory_limit=limit) as session:
            for name in random.choice(list(runs), 40).tolist():
                assert np.array_equal(runs[name](session), expected[name])
        assert limit == 1 or max(beyond for _, beyond in watched.beyond) <= 0


# What can be wrong


@pytest.fixture
def damaged(form, tmp_path):
    """A copy whose second block is no graph, which its size does not tell."""
    copy = shutil.copytree(form("float"), tmp_path / "damaged")
    path = copy / "glm_block_1.onnx"
    count = path.stat().st_size
    path.unlink()
    path.write_bytes(b"\xff" * count)
    record_again(copy, "glm_block_1.onnx")
    return copy


@pytest.mark.parametrize("options", [{}, {"memory_limit": 1}, {"memory_limit": 500_000}])
def test_a_damaged_graph_is_told_when_it_is_its_turn(damaged, options, watched):
    hidden = np.zeros((1, 1, 40), np.float32)
    mask, positions = np.zeros((1, 1, 1, 1), np.bool_), np.zeros((1, 2, 1), np.int64)
    with opened(damaged, **options) as session:
        assert ("glm_block_1" in session.placement.streamed) == bool(options)
        session.embed(np.array([[1]]))
        session.block(0, hidden, mask, positions, session.empty_past(1))
        assert ("glm_block_1" in session._pool._open) == (options == {"memory_limit": 500_000}), "opened ahead"
        for _ in range(2):
            with pytest.raises(
                BundleError,
                match=r"^glm_block_1\.onnx is not a readable ONNX model; the file is damaged, split again\.$",
            ):
                session.block(1, hidden, mask, positions, session.empty_past(1))
        session.head(hidden)
        session.block(0, hidden, mask, positions, session.empty_past(1))
        assert len(watched.loads) >= 5


def test_a_damaged_graph_is_told_on_load(damaged):
    with opened(damaged) as session, pytest.raises(BundleError, match=r"^glm_block_1\.onnx is not a readable"):
        session.load()


@pytest.mark.parametrize("name", ["glm_block_1.onnx", "glm_block_1.onnx.data"])
@pytest.mark.parametrize("options", [{}, {"memory_limit": 1}, {"memory_limit": 500_000}])
def test_a_file_that_went_away_is_told_in_a_sentence(form, tmp_path, name, options):
    copy = shutil.copytree(form("float"), tmp_path / "bundle")
    with opened(copy, **options) as session:
        (copy / name).unlink()
        with pytest.raises(
            BundleError, match=r"^[^\n]+glm_block_1\.onnx[^\n]* found no such file, expected \d+ bytes; [^\n]+\.$"
        ):
            answers(session)


def test_data_that_is_cut_short_is_told(form, tmp_path):
    copy = shutil.copytree(form("float"), tmp_path / "bundle")
    with opened(copy) as session:
        path = copy / "lm.onnx.data"
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BundleError, match=r"^[^\n]+lm\.onnx\.data: found \d+ bytes, expected \d+ bytes; [^\n]+\.$"):
            answers(session)


def test_inputs_that_do_not_fit_are_told_in_a_sentence(form):
    with opened(form("float")) as session:
        with pytest.raises(BundleError, match=r"^lm\.onnx failed to run \([^\n]+\); [^\n]+\.$"):
            session.head(np.zeros((1, 1, 7), np.float32))
        for ids in ([[-1]], [[session.config.vocab_size]], [[0, 10**9]]):
            with pytest.raises(BundleError, match=rf"expected 0 to {session.config.vocab_size - 1}\.$"):
                session.embed(np.array(ids))
        assert session.embed(np.array([[0, session.config.vocab_size - 1]])).shape == (2, 1, 40)


def test_an_unknown_provider_gives_one_sentence_that_lists_those_there_are(form):
    import onnxruntime

    with opened(form("float"), providers=("CPUExecutionProvider", "SuchExecutionProvider")) as session:
        with pytest.raises(BundleError, match=r"^[^\n]*\bSuchExecutionProvider\b[^\n]*\.$") as caught:
            session.load()
        for name in onnxruntime.get_available_providers():
            assert name in str(caught.value)
        with pytest.raises(BundleError, match="SuchExecutionProvider"):
            answers(session)


def test_the_cpu_can_be_named(form):
    with opened(form("float")) as plain, opened(form("float"), providers=("CPUExecutionProvider",)) as named:
        assert_same_bits(answers(named), answers(plain))


def without_gpu():
    import onnxruntime

    return not set(onnxruntime.get_available_providers()) - {"CPUExecutionProvider", "AzureExecutionProvider"}


@pytest.mark.skipif(not without_gpu(), reason="onnxruntime has a GPU's provider here")
def test_gpu_memory_without_a_gpu_can_be_planned_and_not_loaded(form):
    with opened(form("float"), gpu_memory=10**11, memory_limit=10**9) as session:
        assert session.placement.gpu == (*(f"glm_block_{i}" for i in range(BLOCKS)), "lm")
        assert session.placement.resident == ("embedding",)
        with pytest.raises(BundleError, match=r"^[^\n]*onnxruntime here has no execution provider[^\n]*\.$"):
            session.load()
        session.embed(np.array([[1]]))
        with pytest.raises(BundleError, match=r"^[^\n]*onnxruntime here has no execution provider[^\n]*\.$"):
            answers(session)


def test_too_little_gpu_memory_puts_all_on_the_cpu(form):
    with opened(form("float")) as plain, opened(form("float"), gpu_memory=1000) as session:
        assert session.placement.gpu == ()
        session.load()
        assert_same_bits(answers(session), answers(plain))


def test_a_directory_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"^[^\n]*\.$"):
        Session(tmp_path)


def test_closing_twice_is_closing_once(form):
    session = opened(form("float"), memory_limit=1)
    answers(session)
    session.close()
    session.close()
    assert session.held_bytes == 0


# Nothing of the exporter


WITHOUT_TORCH = """
import json, sys
for name in ("torch", "transformers", "onnxscript", "onnxsim", "onnx_ir"):
    sys.modules[name] = None
from glmexport.cli.main import run
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["glmexport", *arguments]
    try:
        run()
    except SystemExit as done:
        assert not done.code, (arguments, done.code)
"""


@pytest.mark.parametrize("passes", [(), (quantize_pass(4), SHARE)], ids=["float", "int4-shared"])
def test_running_a_bundle_needs_no_torch(bundle, tmp_path, passes):
    examples = tmp_path / "examples.jsonl"
    if passes:
        derived(bundle, tmp_path / "bundle", *passes)
        bundle = tmp_path / "bundle"
    bundle = str(bundle)
    examples.write_text(json.dumps({"prompt": "你好", "answer": "a"}), "utf-8")
    commands = [
        ["tokenize", bundle, "你好"],
        ["generate", bundle, "你好", "--max-tokens", "3", "--memory-limit", "1MB", "--stats"],
        ["eval", bundle, str(examples), "-q"],
        ["inspect", bundle],
        ["chat", bundle, "--max-tokens", "3", "--greedy"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)],
        input="a\n/stats\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("decode 2 tokens") == 1, "the chat was asked"


def test_what_is_streamed_can_be_released(form):
    sizes = form("float")
    with opened(sizes, memory_limit=1) as session:
        session.embed(np.array([[5]]))
        assert session.held_bytes > 0
        session.release()
        assert session.held_bytes == 0
        assert session.embed(np.array([[5]])).shape[-1] == session.config.hidden_size
    with opened(sizes) as session:
        session.load()
        held = session.held_bytes
        session.release()
        assert session.held_bytes == held > 0, "what is kept stays"
