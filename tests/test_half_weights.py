"""Matrices stored as float16 are the same numbers, at half the size."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from checkpoints import write_checkpoint
from conftest import record_again, split_directory
from derived_bundles import assert_intact, assert_one_sentence, derived, glmexport, quantize_pass
from hypothesis import example, given, settings
from hypothesis import strategies as st

import glmexport as api
from glmexport.bundle import open_bundle
from glmexport.checkpoint import open_checkpoint
from glmexport.errors import BundleError, RecipeError
from glmexport.form import RAW, SHARED, EmbeddingForm
from glmexport.passes.half_weights import _HALVE, HalfMatrix, HalfWeightsPass
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.passes.slim_vocab import SlimPass
from glmexport.tensors import ArrayTensor
from glmexport.verify import verify


@pytest.fixture(scope="module")
def halved(shared, golden_checkpoint):
    return shared(
        "halved", lambda path: split_directory(golden_checkpoint, path, opset=17, passes=(HalfWeightsPass(),))
    )


def report_of(bundle, checkpoint):
    with open_checkpoint(checkpoint) as source:
        return verify(open_bundle(bundle), source, steps=1)


@pytest.mark.parametrize("case", ["short", "one", "long"])
def test_the_tokens_are_the_originals(halved, golden, case):
    with api.Session(halved, threads=1) as session:
        answer = api.generate(session, golden[f"{case}.input_ids"][0].tolist(), greedy=True, max_tokens=8)
        assert answer.text is not None
        expected = golden[f"{case}.greedy"].reshape(-1).tolist()
        assert answer.ids[: len(expected)] == expected[:8]


def test_it_takes_half_and_verifies(halved, golden_checkpoint, golden_bundle):
    ours, theirs = open_bundle(halved), open_bundle(golden_bundle)
    for name in ("embedding", "lm", "glm_block_0"):
        assert ours.graph_sizes[name] < 0.7 * theirs.graph_sizes[name]
    assert ours.graph("lm")["weights"] == "float16, float32"
    report = report_of(halved, golden_checkpoint)
    assert report.passed, report.failures
    assert report.worst < 1e-4, "held to what float32 is held to"


def test_the_embedding_is_cast_after_rows_are_looked_up(halved):
    model = onnx.load(halved / "embedding.onnx", load_external_data=False)
    order = [node.op_type for node in model.graph.node]
    assert order.index("Gather") < order.index("Cast")


@pytest.mark.parametrize(
    "passes",
    [
        (SlimPass(), EmbedPass(EmbeddingForm(RAW, "bfloat16")), HalfWeightsPass()),
        (quantize_pass(4, 32), EmbedPass(EmbeddingForm(SHARED)), HalfWeightsPass()),
        (quantize_pass(8, 32, head=None), HalfWeightsPass()),
    ],
    ids=["slim bf16", "shared int4", "int8 with a float head"],
)
def test_with_other_passes(shared, tmp_path, passes):
    checkpoint = shared(
        "tied-for-halves", lambda path: write_checkpoint(path, image_tokens=20, tied=True, first_revision=True)
    )
    split_directory(checkpoint, tmp_path / "bundle", opset=17, passes=passes)
    report = report_of(tmp_path / "bundle", checkpoint)
    assert report.passed, report.failures


def test_slimmed_afterwards_it_is_what_slimmed_before_gives(shared, tmp_path):
    checkpoint = shared("images-for-halves", lambda path: write_checkpoint(path, image_tokens=20))
    split_directory(checkpoint, tmp_path / "before", opset=17, passes=(SlimPass(), HalfWeightsPass()))
    split_directory(checkpoint, tmp_path / "half", opset=17, passes=(HalfWeightsPass(),))
    assert glmexport("slim", tmp_path / "half", "-o", tmp_path / "after").status == 0
    for name in ("embedding.onnx.data", "lm.onnx.data", "glm_block_0.onnx.data", "lm.onnx"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    assert_intact(tmp_path / "after")


def test_what_float16_cannot_hold_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer=False, dtype=torch.float32)
    result = glmexport("split", checkpoint, "-o", tmp_path / "out", "--weights", "float16", "--opset", 17)
    assert_one_sentence(result, "which float16 cannot", "leave --weights out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_twice_and_quantized_after_are_refused(halved, tmp_path):
    with pytest.raises(BundleError, match="float16 already"):
        derived(halved, tmp_path / "out", HalfWeightsPass())
    assert_one_sentence(glmexport("quantize", halved, "-o", tmp_path / "out", "--bits", 4), "stored as float16")


def test_a_wrong_weight_is_found(halved, golden_checkpoint, tmp_path):
    copy = shutil.copytree(halved, tmp_path / "copy")
    data = bytearray((copy / "glm_block_1.onnx.data").read_bytes())
    data[4096 * 2] ^= 1
    (copy / "glm_block_1.onnx.data").write_bytes(data)
    record_again(copy, "glm_block_1.onnx.data")
    report = report_of(copy, golden_checkpoint)
    assert ("glm_block_1", "weights") in {(row.graph, row.case) for row in report.failures}


def test_a_manifest_that_does_not_say_means_float32(golden_bundle, tmp_path):
    copy = shutil.copytree(golden_bundle, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    del manifest["weights"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert open_bundle(copy).form.weights == "float32"


@given(st.lists(st.floats(width=16), min_size=1, max_size=20))
def test_every_float16_comes_back(values):
    matrix = np.array([values], np.float32)
    (half,) = HalfMatrix(ArrayTensor("w", matrix)).slices()
    assert half.dtype == np.float16
    assert np.array_equal(half.astype(np.float32), matrix, equal_nan=True)


def is_half(value: float) -> bool:
    with np.errstate(over="ignore"):
        return float(np.float16(value)) == value


@given(st.floats(width=32, allow_nan=False).filter(lambda value: not is_half(value)))
def test_no_other_number_does(value):
    with pytest.raises(RecipeError, match="float16 cannot"):
        list(HalfMatrix(ArrayTensor("w", np.array([[1.0, value]], np.float32))).slices())


def test_every_float16_comes_back_bit_for_bit():
    """NaN with its payload too, as numpy casts it."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        numbers = every.astype(np.float32)
        expected = numbers.astype(np.float16)
    found = np.empty(1 << 16, np.uint16)
    assert _HALVE(numbers.view(np.uint32), found) == -1
    np.testing.assert_array_equal(found, expected.view(np.uint16))


@settings(max_examples=300, deadline=None)
@given(bits=st.integers(0, 2**32 - 1))
@example(bits=0x38800000 - 1)
@example(bits=0x477FF000)
@example(bits=0x47800000)
@example(bits=0x33800000)
@example(bits=0x33000000)
@example(bits=1)
def test_a_float32_is_lost_where_casting_and_back_changes_it(bits):
    number = np.array([bits], np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        kept = np.array_equal(number.astype(np.float16).astype(np.float32), number, equal_nan=True)
    assert (_HALVE(number.view(np.uint32), np.empty(1, np.uint16)) == -1) == kept
