"""A KV cache of float16 that graphs write into: what is in the bundle, what it computes, what refuses it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import record_again, split_directory
from derived_bundles import (
    OPSET,
    assert_intact,
    assert_one_sentence,
    derived,
    distance,
    glmexport,
    manifest_of,
    odd_checkpoint,
    quantize_pass,
    steps_of,
)
from flavor_bundles import (
    CALLS,
    expected_of,
    flavor_bundle,
    manifest_with,
    reference_model,
    relative_files,
    run_bound,
    words,
)

from glmexport.bundle import open_bundle
from glmexport.checkpoint import open_checkpoint
from glmexport.doctor import bundle_needs
from glmexport.errors import BundleError
from glmexport.form import RAW, EmbeddingForm
from glmexport.generation import Decoder
from glmexport.passes.half_cache import HalfCachePass
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.passes.slim_vocab import SlimPass
from glmexport.patches.chatglm_6b import CHATGLM_6B
from glmexport.serve.rows import open_rows
from glmexport.session import Session
from glmexport.verify import verify

pytestmark = pytest.mark.usefixtures("without_equivalence")
BLOCKS = ("glm_block_0", "glm_block_1")
HALF_UNIT = 2.0**-11
"""Half a unit in the last place of float16: what rounding to it is off at most, in parts of the number."""

CLOSE = 5e-4
"""Of ‖numbers‖: keys and values rounded to float16."""


@pytest.fixture(scope="module")
def full(shared) -> Path:
    return flavor_bundle(shared, "both")


@pytest.fixture(scope="module")
def half(shared) -> Path:
    """The same with a float16 cache; never change it."""

    def make(path: Path) -> None:
        split_directory(odd_checkpoint(shared), path, opset=OPSET, flavor="both", passes=(HalfCachePass(),))

    return shared("half-cache", make)


@pytest.fixture(scope="module")
def reference(shared):
    return reference_model(odd_checkpoint(shared))


@pytest.fixture
def copy(half, tmp_path) -> Path:
    return shutil.copytree(half, tmp_path / "copy")


def report_of(shared, bundle: Path):
    with open_checkpoint(odd_checkpoint(shared)) as source:
        return verify(open_bundle(bundle), source, steps=1)


# The bundle


def test_only_the_blocks_in_ort_are_others(full, half):
    found, expected = relative_files(half), relative_files(full)
    assert {*found} == {*expected}
    differ = {name for name in found if found[name] != expected[name]}
    assert differ == {"manifest.json", *(f"ort/{block}.onnx" for block in BLOCKS)}
    assert_intact(half)
    manifest = manifest_of(half)
    assert (manifest["kv_cache"], manifest_of(full)["kv_cache"]) == ("float16", "float32")
    assert steps_of(half) == ["split", "kv_cache"]
    for entry in manifest["graphs"]:
        values = [*entry["ort"]["inputs"], *entry["ort"]["outputs"]]
        dtypes = {value["name"]: value["dtype"] for value in values if "cache" in value["name"]}
        caches = ("key_cache", "value_cache", "key_cache_out", "value_cache_out")
        assert dtypes == (dict.fromkeys(caches, "float16") if entry["name"] in BLOCKS else {})


@pytest.mark.parametrize("flavor", ["ort", "both"])
def test_the_command_makes_the_same(shared, half, tmp_path, flavor):
    options = ("--flavor", flavor, "--kv-cache-dtype", "float16", "--opset", OPSET)
    assert glmexport("split", odd_checkpoint(shared), "-o", tmp_path / "made", *options, "-q").status == 0
    found, expected = relative_files(tmp_path / "made"), relative_files(half)
    ours = {name for name in expected if flavor == "both" or name.startswith("ort/")} - {"manifest.json"}
    assert {name: found[name] for name in ours} == {name: expected[name] for name in ours}
    assert "float16 KV cache" in glmexport("inspect", tmp_path / "made").stdout


def test_steps_after_it_give_what_split_gives_at_once(shared, half, tmp_path):
    passes = (SlimPass(), EmbedPass(EmbeddingForm(RAW, "bfloat16")), quantize_pass(4))
    derived(half, tmp_path / "steps", *passes)
    split_directory(
        odd_checkpoint(shared), tmp_path / "once", opset=OPSET, flavor="both", passes=(HalfCachePass(), *passes)
    )
    found, expected = (relative_files(tmp_path / name) for name in ("steps", "once"))
    assert {name for name in expected if found[name] != expected[name]} <= {"manifest.json"}
    assert [step["step"] for step in manifest_of(tmp_path / "steps")["history"]] == [
        step["step"] for step in manifest_of(tmp_path / "once")["history"]
    ]


def test_what_has_no_such_cache_is_refused_in_a_sentence(shared, half, tmp_path):
    for options in ((), ("--flavor", "portable"), ("--dtype", "float16")):
        done = glmexport("split", odd_checkpoint(shared), "-o", tmp_path / "b", "--kv-cache-dtype", "float16", *options)
        assert_one_sentence(done, "A float16 KV cache is for graphs that write into it", "--flavor both")
        assert not (tmp_path / "b").exists()
    with pytest.raises(BundleError, match="float16 already"):
        derived(half, tmp_path / "twice", HalfCachePass())


@pytest.mark.parametrize(
    "change",
    [
        {"kv_cache": "int8"},
        {"kv_cache": None},
        {"kv_cache": ["float16"]},
        {"kv_cache": {}},
    ],
)
def test_a_manifest_with_another_cache_is_refused_in_a_sentence(copy, change):
    manifest_with(copy, lambda manifest: manifest.update(change))
    assert_one_sentence(glmexport("inspect", copy), "kv_cache")


def test_portable_graphs_have_no_such_cache(shared, tmp_path):
    shutil.copytree(flavor_bundle(shared, "portable"), tmp_path / "copy")
    manifest_with(tmp_path / "copy", lambda manifest: manifest.update(kv_cache="float16"))
    assert_one_sentence(glmexport("inspect", tmp_path / "copy"), "kv_cache")


def test_a_manifest_that_says_nothing_of_it_is_float32(full, tmp_path):
    shutil.copytree(full, tmp_path / "copy")
    manifest_with(tmp_path / "copy", lambda manifest: manifest.pop("kv_cache"))
    assert open_bundle(tmp_path / "copy").form.kv_cache == "float32"


def test_a_graph_of_another_cache_than_the_manifest_s_is_refused(copy):
    manifest_with(copy, lambda manifest: manifest.update(kv_cache="float32"))
    with Session(copy) as session, pytest.raises(BundleError, match="glm_block_0"):
        session.load()


def test_conversion_for_mnn_forgets_it(half, tmp_path):
    pytest.importorskip("MNN")
    assert glmexport("convert", "mnn", half, "-o", tmp_path / "mnn", "-q").status == 0
    assert open_bundle(tmp_path / "mnn").form.kv_cache == "float32"


# What it computes


@pytest.mark.parametrize("name", CALLS)
def test_blocks_are_near_the_unpatched_ones_and_write_rounded_numbers(half, reference, name):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for block_id, block in enumerate(BLOCKS):
        session = onnxruntime.InferenceSession(half / "ort" / f"{block}.onnx", options)
        inputs = CALLS[name].inputs(reference[0], seed=block_id)
        for cache in ("key_cache", "value_cache"):
            inputs[cache] = inputs[cache].astype(np.float16)
        before = {key: array.copy() for key, array in inputs.items()}
        rows = expected_of(reference, block_id, {key: as_float(array) for key, array in inputs.items()})
        hidden = run_bound(session, inputs)
        for row, start in enumerate(inputs["write_indices"].tolist()):
            told = ~inputs["attention_mask"][row, 0].all(-1)
            assert distance(hidden[row][told], rows[row][0][told]) < CLOSE
            new = slice(start, start + hidden.shape[1])
            for cache, expected in (("key_cache", rows[row][1]), ("value_cache", rows[row][2])):
                written = inputs[cache][row]
                np.testing.assert_allclose(written[:, new].astype(np.float32), expected, rtol=HALF_UNIT, atol=2e-5)
                written[:, new] = before[cache][row][:, new]
                assert np.array_equal(written, before[cache][row]), "and nothing else"


def test_scores_beyond_float16_are_computed(half, reference):
    """Of keys that float16 holds, whose products with the query it does not."""
    config, model = reference
    inputs = CALLS["one more token"].inputs(config)
    inputs["position_ids"][:] = 0  # where queries are not turned
    block = model.get_submodule(CHATGLM_6B.block.format(block_id=0))
    with torch.inference_mode():
        states = torch.from_numpy(inputs["inputs_embeds"])
        mixed = block.attention.query_key_value(block.input_layernorm(states))
    queries = mixed.reshape(config.num_heads, 3, config.head_dim)[:, 0].numpy() / config.head_dim**0.5
    keys = np.sign(queries) * np.float32(6e4)
    assert 0.95 * (queries * keys).sum(-1).max() > 65520
    inputs["key_cache"][:] = keys[:, None] * np.linspace(0.95, 1, 64, dtype=np.float32)[:, None]
    for cache in ("key_cache", "value_cache"):
        inputs[cache] = inputs[cache].astype(np.float16)
    rows = expected_of(reference, 0, {key: as_float(array) for key, array in inputs.items()})
    hidden = run_bound(onnxruntime.InferenceSession(half / "ort" / "glm_block_0.onnx"), inputs)
    assert np.isfinite(hidden).all()
    assert distance(hidden[0], rows[0][0]) < CLOSE


def as_float(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def test_the_cache_takes_half_the_memory(full, half):
    with Session(full) as session:
        whole = session.held_kv_bytes(3, 100), session.kv_bytes(1, 7)
    with Session(half) as session, Session(half, flavor="portable") as portable:
        assert (session.held_kv_bytes(3, 100), session.kv_bytes(1, 7)) == tuple(count // 2 for count in whole)
        assert portable.kv_bytes(1, 7) == whole[1]
        cache = session.empty_slots(3)
        cache.reserve(100)
        assert cache.nbytes == session.held_kv_bytes(3, 100)
    assert bundle_needs(open_bundle(half)).memory < bundle_needs(open_bundle(full)).memory


@pytest.mark.parametrize("lengths", [(3,), (70,), (12, 4, 9)])
def test_a_session_gives_nearly_the_same_logits(half, lengths):
    logits = []
    for flavor in ("ort", "portable"):
        with Session(half, flavor=flavor) as session:
            rows = [words(session.config, length, length) for length in lengths]
            decoder = Decoder(session, rows)
            steps = [decoder.prefill()]
            steps += [decoder.step([7 + row for row in range(len(rows))]) for _ in range(5)]
            logits.append(np.stack([step["logits"] for step in steps]))
    assert logits[0].dtype == np.float32
    assert 0 < distance(*logits) < CLOSE


def test_rows_of_a_server_have_slots_in_it(half):
    runner = open_rows(Session(half), 3, 100)
    with Session(half) as session:
        assert runner.kv_bytes_per_slot == session.held_kv_bytes(1, 100)
        prompts = [words(session.config, length, length) for length in (9, 30)]
        alone = [Decoder(session, [prompt]).prefill()["logits"][0] for prompt in prompts]
    found = [runner.prefill(slot, prompt) for slot, prompt in enumerate(prompts)]
    for ours, theirs in zip(found, alone, strict=True):
        assert distance(ours, theirs) < 1e-5
    assert runner.decode([0, 1], [7, 8]).shape == (2, runner.config.vocab_size)
    runner.close()


# In verification


def test_it_passes_with_every_check_of_the_portable_graphs(shared, half):
    report = report_of(shared, half)
    assert report.failures == []
    worst = {row.case: row for row in report.rows if row.graph == "glm_block_1"}
    assert worst["long, ort"].max_abs_error > 1e-5, "float16 can be told from float32"
    assert worst["long"].max_abs_error < 1e-5, "and portable graphs are held to float32 all the same"
    assert any(row.graph == "chain" and row.case == "next token, ort" for row in report.rows)


def test_it_passes_in_quantized_forms(shared, half, tmp_path):
    derived(half, tmp_path / "made", SlimPass(), EmbedPass(EmbeddingForm(RAW, "bfloat16")), quantize_pass(4))
    assert report_of(shared, tmp_path / "made").failures == []


def scaled(model: onnx.ModelProto) -> None:
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    (scale,) = (attribute for attribute in attention.attribute if attribute.name == "scale")
    scale.f = 40.0


def keys_as_values(model: onnx.ModelProto) -> None:
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    attention.input[2] = attention.input[1]


@pytest.mark.parametrize("change", [scaled, keys_as_values])
def test_a_changed_graph_fails_in_its_numbers(shared, copy, change):
    path = copy / "ort" / "glm_block_1.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    record_again(copy, "ort/glm_block_1.onnx")
    failed = {(row.graph, row.case) for row in report_of(shared, copy).failures}
    assert ("glm_block_1", "long, ort") in failed
    assert ("glm_block_1", "long") not in failed
