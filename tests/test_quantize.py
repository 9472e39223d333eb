"""Quantizing: every layout computes, in plain onnxruntime, with the numbers that its bytes say."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checkpoints import write_checkpoint
from conftest import split_directory
from derived_bundles import (
    OPSET,
    assert_intact,
    assert_one_sentence,
    chain,
    contents,
    decoded,
    derived,
    distance,
    exact_session,
    float_twin,
    glmexport,
    inode,
    inputs_of,
    load,
    manifest_of,
    place_of,
    plain_bundle,
    plain_checkpoint,
    quantize_pass,
    quantized_matrices,
    recipe_pass,
    session,
    steps_of,
    untouched,
    weights_of,
)

from glmexport.affine import Affine
from glmexport.bundle import open_bundle
from glmexport.derive import derive
from glmexport.draft import draft_of_bundle
from glmexport.errors import BundleError, GlmExportError, RecipeError
from glmexport.form import SHARED, EmbeddingForm
from glmexport.passes import choose_bits
from glmexport.passes.choose_bits import choose_recipe
from glmexport.passes.quantize_weights import matrices_of
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.quantize_report import quantize_report
from glmexport.recipe import FORMATS, parse_recipe
from glmexport.session import Session

GRAPHS = ("glm_block_0", "glm_block_1", "lm")
MATRICES = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
GROUPS = (32, pytest.param(64, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow), "channel")
SAME_NUMBERS = 1e-5  # float32 sums in another order, measured up to 1e-6
ROUNDED_TO_16 = 1e-4  # activations to 127 steps of 127 steps: some 3e-5
ROUNDED_TO_8 = 0.02  # activations to 127 steps: some 0.6 % a product, four of them in a block


@pytest.fixture(scope="session")
def plain(shared) -> Path:
    return plain_bundle(shared)


@pytest.fixture(scope="session")
def int4(shared, bundle) -> Path:
    return shared("odd-int4", lambda path: derived(bundle, path, quantize_pass(4)))


@pytest.fixture(scope="session")
def weights(checkpoint) -> dict[str, np.ndarray]:
    return weights_of(checkpoint)


def outputs(run, bundle: Path, graph: str) -> np.ndarray:
    return run.run(None, inputs_of(bundle, graph))[0]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


# The bytes


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("layout", FORMATS)
def test_graphs_compute_with_the_stored_numbers(bundle, weights, tmp_path, layout, bits, group_size, symmetric):
    """Widths 40 and 300, which no group divides, 1897 and 120 rows."""
    target = tmp_path / "quantized"
    derived(bundle, target, quantize_pass(bits, group_size, layout, symmetric=symmetric, head=bits))
    for graph in ("glm_block_1", "lm"):
        records = quantized_matrices(target, graph)
        assert len(records) == (1 if graph == "lm" else 4)
        for name, record in records.items():
            found = decoded(target, graph, name)
            error = distance(found, weights[name])
            assert error < (0.012 if bits == 8 else 0.2), "measured up to 0.0081 and 0.135"
            assert record["relative_error"] == pytest.approx(error, rel=1e-4)
            assert record["cosine"] == pytest.approx(cosine(found, weights[name]), abs=1e-6)
            assert (record["bits"], record["group_size"], record["symmetric"]) == (bits, group_size, symmetric)
        expected = outputs(float_twin(bundle, target, graph), bundle, graph)
        assert distance(outputs(exact_session(target, graph), bundle, graph), expected) < SAME_NUMBERS
        bound = ROUNDED_TO_16 if bits == 8 else ROUNDED_TO_8
        assert distance(outputs(session(target / f"{graph}.onnx"), bundle, graph), expected) < bound
    assert_intact(target)


def test_one_wrong_code_is_not_within_those_bounds(bundle, int4, tmp_path):
    copy = shutil.copytree(int4, tmp_path / "copy")
    place = place_of(copy, "glm_block_1", "dense_4h_to_h.weight.codes")
    data = bytearray(copy.joinpath("glm_block_1.onnx.data").read_bytes())
    data[place.offset] ^= 0x08
    (copy / "glm_block_1.onnx.data").write_bytes(data)
    expected = outputs(float_twin(bundle, int4, "glm_block_1"), bundle, "glm_block_1")
    assert distance(outputs(exact_session(int4, "glm_block_1"), bundle, "glm_block_1"), expected) < SAME_NUMBERS
    assert distance(outputs(exact_session(copy, "glm_block_1"), bundle, "glm_block_1"), expected) > 10 * SAME_NUMBERS


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("layout", FORMATS)
def test_activations(bundle, tmp_path, layout, bits):
    """int16 is as good as float32, which int8 is not; the last group of each width is a partial one.

    Compared are the new keys and values of a block, which come straight from a product, and what the block adds up.
    """
    found = {}
    for activations in ("int8", "int16", "float32")[: 3 if layout == "matmulnbits" else 2]:
        target = tmp_path / activations
        derived(bundle, target, quantize_pass(bits, 64, layout, activations=activations))
        assert manifest_of(target)["quantization"][f"int{bits}_activations"] == activations
        for graph in ("glm_block_0", "lm"):
            feeds, twin = inputs_of(bundle, graph), float_twin(bundle, target, graph)
            pairs = zip(session(target / f"{graph}.onnx").run(None, feeds), twin.run(None, feeds), strict=True)
            for number, (ours, theirs) in enumerate(pairs):
                fresh = (
                    slice(3, None) if number == 1 else slice(None)
                )  # three cached positions come through as they are
                ours, theirs = (value.swapaxes(0, number)[fresh] for value in (ours, theirs))
                found[activations, graph, number] = distance(ours, theirs)
    places = [("glm_block_0", 0), ("glm_block_0", 1), ("lm", 0)]
    for place in places:
        assert found["int16", *place] < min(ROUNDED_TO_16, found["int8", *place] / 50), place
        assert found.get(("float32", *place), 0) < SAME_NUMBERS
    assert all(0.002 < found["int8", *place] < ROUNDED_TO_8 for place in places[1:]), "else the bounds say nothing"


def test_a_token_alone_and_one_of_zeros(bundle, tmp_path):
    """Rows are rounded each on its own; a group of zeros has no largest magnitude to divide by."""
    derived(bundle, tmp_path / "int8", quantize_pass(8))
    head, twin = session(tmp_path / "int8" / "lm.onnx"), float_twin(bundle, tmp_path / "int8", "lm")
    for hidden in (np.zeros((1, 1, 40), np.float32), np.eye(40, dtype=np.float32)[None, :3] * 1e4):
        (found,), (expected,) = (run.run(None, {"hidden_states": hidden}) for run in (head, twin))
        assert np.isfinite(found).all()
        assert distance(found, expected) < ROUNDED_TO_16


@pytest.mark.parametrize("layout", FORMATS)
def test_the_chain_is_close_to_the_float_one(bundle, tmp_path, layout):
    derived(bundle, tmp_path / "int8", quantize_pass(8, 128, layout))
    expected = chain(bundle)
    for ours, theirs in zip(chain(tmp_path / "int8"), expected, strict=True):
        assert distance(ours, theirs) < 0.01


def test_methods_beat_plain_rounding_on_every_matrix(bundle, tmp_path):
    errors = {}
    for method in ("rtn", "mse", "hqq"):
        derived(bundle, tmp_path / method, quantize_pass(4, method=method, head=4))
        for graph in GRAPHS:
            for name, record in quantized_matrices(tmp_path / method, graph).items():
                errors.setdefault(name, {})[method] = record["relative_error"]
    assert len(errors) == 9
    for name, found in errors.items():
        assert found["mse"] < 0.95 * found["rtn"], name


# The bundle


def test_what_is_written_and_what_is_linked(bundle, int4):
    assert steps_of(int4) == ["split", "quantize"]
    assert manifest_of(int4)["history"][-1] == {
        "step": "quantize",
        "format": "matmulnbits",
        "int8_activations": "int16",
        "int4_activations": "int8",
    }
    assert {*contents(int4)} - {*contents(bundle)} == {"recipe.toml"}
    linked = {name for name in contents(bundle) if inode(bundle, name) == inode(int4, name)}
    assert linked == {"embedding.onnx", "embedding.onnx.data", "ice_text.model", "tokenizer_config.json"}
    entry = next(entry for entry in manifest_of(int4)["graphs"] if entry["name"] == "glm_block_0")
    assert entry["weights"] == "int4, float32"
    assert entry["operators"]["com.microsoft.MatMulNBits"] == 4
    assert entry["transposed"] == []
    before = next(entry for entry in manifest_of(bundle)["graphs"] if entry["name"] == "glm_block_0")
    assert entry["parameters"] == before["parameters"], "of the model, whatever they are stored as"


def test_the_source_stays_as_it_is(bundle, tmp_path):
    with untouched(bundle):
        for layout in FORMATS:
            derived(bundle, tmp_path / layout, quantize_pass(4, layout=layout))


def test_a_head_in_float32(bundle, tmp_path):
    for layout in FORMATS:
        derived(bundle, tmp_path / layout, quantize_pass(8, layout=layout, head=None))
        assert quantized_matrices(tmp_path / layout, "lm") == {}
        assert inode(tmp_path / layout, "lm.onnx.data") == inode(bundle, "lm.onnx.data")
        found, expected = (outputs(session(path / "lm.onnx"), bundle, "lm") for path in (tmp_path / layout, bundle))
        assert distance(found, expected) < SAME_NUMBERS
    assert inode(tmp_path / "matmulnbits", "lm.onnx") == inode(bundle, "lm.onnx")


@pytest.mark.parametrize("opset", [14, pytest.param(18, marks=pytest.mark.slow)])
def test_qdq_lifts_the_graphs(checkpoint, shared, bundle, tmp_path, opset):
    source = shared(f"odd-bundle-{opset}", lambda path: split_directory(checkpoint, path, opset=opset))
    notices = derived(source, tmp_path / "qdq", quantize_pass(4, layout="qdq", head=None))
    assert notices == [f"The graphs are lifted from opset {opset} to 21, which qdq needs."]
    manifest = manifest_of(tmp_path / "qdq")
    assert manifest["opset"] == 21
    for entry in manifest["graphs"]:
        model = load(tmp_path / "qdq" / entry["file"])
        assert [(one.domain, one.version) for one in model.opset_import] == [("", 21)], "no operator of onnxruntime's"
    for name in ("embedding.onnx.data", "lm.onnx.data", "ice_text.model"):
        assert inode(source, name) == inode(tmp_path / "qdq", name)
    same = derived_from_17(shared, bundle)
    ours, theirs = contents(tmp_path / "qdq"), contents(same)
    assert {name for name in ours if ours[name] != theirs[name]} == {"manifest.json"}, "whatever they were lifted from"
    assert {key for key in manifest if manifest[key] != manifest_of(same)[key]} == {"digest", "history"}


def derived_from_17(shared, bundle: Path) -> Path:
    return shared("odd-qdq-4", lambda path: derived(bundle, path, quantize_pass(4, layout="qdq", head=None)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, "channel"])
@pytest.mark.parametrize("head", [4, 8])
def test_rows_of_a_qdq_head_as_embedding(bundle, weights, tmp_path, head, group_size, symmetric):
    """An odd number of rows, so that every other input's begin in the upper half of a byte."""
    step = quantize_pass(4, group_size, "qdq", head=head, symmetric=symmetric)
    derived(bundle, tmp_path / "shared", step, EmbedPass(EmbeddingForm(SHARED)))
    expected = decoded(tmp_path / "shared", "lm", "lm_head.weight")
    assert distance(expected, weights["lm_head.weight"]) < (0.2 if head == 4 else 0.012)
    ids = np.array([[0, 1, 39, 40, 1895, 1896], [7, 7, 300, 5, 1896, 0]])
    with Session(open_bundle(tmp_path / "shared")) as running:
        np.testing.assert_array_equal(running.embed(ids), expected[ids].transpose(1, 0, 2))
        np.testing.assert_array_equal(running.embed(np.arange(1897)[None])[:, 0], expected)


def test_a_bundle_of_a_high_opset_stays_at_it(checkpoint, shared, tmp_path):
    source = shared("odd-bundle-21", lambda path: split_directory(checkpoint, path, opset=21))
    assert derived(source, tmp_path / "qdq", quantize_pass(4, layout="qdq", head=None)) == []
    assert inode(source, "embedding.onnx") == inode(tmp_path / "qdq", "embedding.onnx")
    assert manifest_of(tmp_path / "qdq")["opset"] == 21


def test_any_conforming_runtime_reads_qdq(bundle, tmp_path):
    from onnx.reference import ReferenceEvaluator

    derived(bundle, tmp_path / "qdq", quantize_pass(4, 32, "qdq", symmetric=False, head=4))
    run = ReferenceEvaluator(str(tmp_path / "qdq" / "lm.onnx"))
    expected = outputs(float_twin(bundle, tmp_path / "qdq", "lm"), bundle, "lm")
    assert distance(outputs(run, bundle, "lm"), expected) < SAME_NUMBERS


@pytest.mark.parametrize("layout", FORMATS)
def test_quantizing_twice_is_refused(int4, tmp_path, layout):
    with untouched(int4):
        result = glmexport("quantize", int4, "-o", tmp_path / "again", "--bits", 8, "--format", layout)
        assert_one_sentence(result, "quantized already (matmulnbits)")
        result = glmexport("quantize", int4, "-o", tmp_path / "again", "--auto", "--target-size", "1GB")
        assert_one_sentence(result, "quantized already")
    assert list(tmp_path.iterdir()) == []


# Sizes


def arithmetic(manifest: dict, bits: int, head_bits: int) -> int:
    """Weights at so many bits and a float32 scale for every 32, vectors and the embedding at 4 and 2 bytes."""
    model = manifest["model"]
    hidden, inner, vocab, blocks = (model[key] for key in ("hidden_size", "inner_size", "vocab_size", "num_blocks"))
    matrices = blocks * (4 * hidden * hidden + 2 * hidden * inner)
    vectors = blocks * (9 * hidden + inner) + 2 * hidden
    return int(matrices * (bits / 8 + 4 / 32) + vocab * hidden * (head_bits / 8 + 4 / 32 + 2) + vectors * 4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMATS)
def test_file_sizes_are_those_of_the_arithmetic(tmp_path, layout):
    sizes = {"hidden_size": 256, "inner": 1024, "heads": 4, "vocab_size": 8192, "num_blocks": 2}
    source = write_checkpoint(tmp_path / "checkpoint", tokenizer=False, tied=True, **sizes)
    options = ["--opset", OPSET, "--embedding", "bf16", "--quantize", "int4", "--format", layout]
    result = glmexport("split", source, "-o", tmp_path / "bundle", "-q", *options)
    assert result.status == 0, result
    stored = sum(path.stat().st_size for path in (tmp_path / "bundle").iterdir() if path.suffix in (".data", ".bin"))
    assert stored == pytest.approx(arithmetic(manifest_of(tmp_path / "bundle"), 4, 8), rel=0.02)
    shape = 8192 * 256
    assert (tmp_path / "bundle" / "lm.onnx.data").stat().st_size == pytest.approx(shape * (1 + 4 / 32), rel=0.02)
    assert (tmp_path / "bundle" / "word_embeddings_bf16.bin").stat().st_size == 2 * shape


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_recorded_bytes_are_those_in_the_file(bundle, tmp_path, layout, bits, symmetric):
    derived(bundle, tmp_path / "q", quantize_pass(bits, 64, layout, symmetric=symmetric, head=bits))
    for graph in GRAPHS:
        for name, record in quantized_matrices(tmp_path / "q", graph).items():
            parts = ["codes", "scales", *([] if symmetric else ["zero_points"])]
            places = [place_of(tmp_path / "q", graph, f"{name}.{part}") for part in parts]
            assert record["bytes"] == sum(place.length for place in places)


# Weights that cannot be quantized


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["matmulnbits", pytest.param("qdq", marks=pytest.mark.slow)])
def test_weights_that_are_no_numbers(plain, shared, tmp_path, layout, value):
    name = "transformer.layers.1.mlp.dense_h_to_4h.weight"
    source = shutil.copytree(plain_checkpoint(shared), tmp_path / "source" / "checkpoint")
    tensors = torch.load(source / "pytorch_model.bin")
    tensors[name][7, 3] = value
    torch.save(tensors, source / "pytorch_model.bin")
    split_directory(source, tmp_path / "source" / "bundle", opset=OPSET)
    words = [f"{name} cannot be quantized", "1 of its 12000 weights are NaN or infinite"]
    with untouched(tmp_path / "source"):
        result = glmexport(
            "quantize", tmp_path / "source" / "bundle", "-o", tmp_path / "q", "--bits", 4, "--format", layout
        )
        assert_one_sentence(result, *words)
        options = ["--quantize", "int8", "--opset", OPSET, "--format", layout]
        assert_one_sentence(glmexport("split", source, "-o", tmp_path / "q", *options), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Recipes


RECIPE = """
[[rule]]
pattern = "*.mlp.*"
blocks = "1, 5-7"
bits = 8
group_size = "channel"
symmetric = false
method = "rtn"

[[rule]]
pattern = "*.attention.dense.weight"
bits = "none"

[[rule]]
pattern = "*.mlp.*"
bits = 8
group_size = 64

[[rule]]
bits = 4
method = "hqq"
"""


def test_a_recipe_says_how_each_matrix_is_stored(bundle, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE)
    result = glmexport("quantize", bundle, "-o", tmp_path / "mixed", "--recipe", file, "-q")
    assert result.status == 0, result
    found = {
        name.removeprefix("transformer.layers."): (
            record["bits"],
            record["group_size"],
            record["symmetric"],
            record["method"],
        )
        for graph in GRAPHS
        for name, record in quantized_matrices(tmp_path / "mixed", graph).items()
    }
    small = (4, 32, True, "hqq")
    assert found == {
        "0.attention.query_key_value.weight": small,
        "0.mlp.dense_h_to_4h.weight": (8, 64, True, "mse"),
        "0.mlp.dense_4h_to_h.weight": (8, 64, True, "mse"),
        "1.attention.query_key_value.weight": small,
        "1.mlp.dense_h_to_4h.weight": (8, "channel", False, "rtn"),
        "1.mlp.dense_4h_to_h.weight": (8, "channel", False, "rtn"),
        "lm_head.weight": small,
    }
    for graph in GRAPHS:
        found, expected = (
            outputs(run, bundle, graph)
            for run in (exact_session(tmp_path / "mixed", graph), float_twin(bundle, tmp_path / "mixed", graph))
        )
        assert distance(found, expected) < SAME_NUMBERS
    assert parse_recipe((tmp_path / "mixed" / "recipe.toml").read_text(), "x") == parse_recipe(RECIPE, "x")


def test_a_gap_in_the_rules_and_one_rule_too_many(bundle, tmp_path):
    gap = parse_recipe('[[rule]]\npattern = "*.mlp.*"\nbits = 4\n', "x")
    with pytest.raises(RecipeError, match=r"No rule of the recipe matches transformer\.layers\.0\.attention\.query_"):
        derived(bundle, tmp_path / "q", recipe_pass(gap))
    assert list(tmp_path.iterdir()) == []
    surplus = parse_recipe('[[rule]]\nbits = 8\n[[rule]]\npattern = "lm_head*"\nbits = 4\n', "x")
    assert derived(bundle, tmp_path / "q", recipe_pass(surplus)) == ["Rule 2 of the recipe decides about no matrix."]
    assert quantized_matrices(tmp_path / "q", "lm")["lm_head.weight"]["bits"] == 8, "the first rule matched"


def test_the_recipe_of_a_bundle_makes_it_again(bundle, tmp_path):
    for number, options in enumerate((["--bits", 4], ["--bits", 8, "--asymmetric", "--lm-bits", "none"])):
        first, second = tmp_path / f"{number}-first", tmp_path / f"{number}-second"
        assert glmexport("quantize", bundle, "-o", first, "-q", *options).status == 0
        assert glmexport("quantize", bundle, "-o", second, "-q", "--recipe", first / "recipe.toml").status == 0
        assert contents(first) == contents(second)


# --auto


def total(bundle: Path) -> int:
    return sum(path.stat().st_size for path in bundle.iterdir())


def planned(bundle: Path, bits: int, layout: str = "matmulnbits", num_blocks: int = 2) -> int:
    """What quantizing everything to so many bits is taken to give."""
    step = quantize_pass(bits, layout=layout, head=bits, num_blocks=num_blocks)
    draft, int4, int8 = draft_of_bundle(open_bundle(bundle)), Affine(4, 32), Affine(8, 32)
    return choose_bits._size(draft, step.recipe, step.form, choose_bits._graph_bytes(draft, int4, int8, step.form))


def bits_of(bundle: Path) -> dict[str, int]:
    return {
        name: record["bits"] for entry in manifest_of(bundle)["graphs"] for name, record in entry["matrices"].items()
    }


@pytest.mark.parametrize(
    ("layout", "share"),
    [("matmulnbits", 0.01), ("matmulnbits", 0.3), ("matmulnbits", 0.85), ("matmulnbits", 1.01), ("qdq", 0.85)],
)
def test_auto_fits_under_the_size_and_makes_the_same_again(bundle, tmp_path, layout, share):
    smallest, largest = (planned(bundle, bits, layout) for bits in (4, 8))
    target = int(smallest + share * (largest - smallest))
    auto = ["--auto", "--target-size", target, "--format", layout]
    result = glmexport("quantize", bundle, "-o", tmp_path / "auto", "-q", *auto)
    assert result.status == 0, result
    assert total(tmp_path / "auto") <= target
    bits = bits_of(tmp_path / "auto")
    assert set(bits.values()) >= ({8} if share > 1 else {4, 8} if share > 0.1 else {4})
    assert share < 1 or 4 not in bits.values()
    assert bits["lm_head.weight"] == (8 if share > 0.5 else 4), "the first to get 8 bits, if that fits"
    recipe = tmp_path / "auto" / "recipe.toml"
    again = ["--recipe", recipe, "--format", layout]
    assert glmexport("quantize", bundle, "-o", tmp_path / "again", "-q", *again).status == 0
    assert contents(tmp_path / "auto") == contents(tmp_path / "again")


@pytest.mark.parametrize("opset", [14, pytest.param(17, marks=pytest.mark.slow)])
def test_auto_keeps_its_promise_with_many_blocks(tmp_path, opset):
    """Graph files of lower opsets are larger, and so are those of 8-bit matrices."""
    sizes = {"hidden_size": 8, "inner": 16, "num_blocks": 12, "heads": 1}
    source = write_checkpoint(tmp_path / "checkpoint", tokenizer=False, **sizes)
    split_directory(source, tmp_path / "bundle", opset=opset)
    target = planned(tmp_path / "bundle", 8, num_blocks=12) + 2000  # the recipe of one that chose has some more rules
    result = glmexport("quantize", tmp_path / "bundle", "-o", tmp_path / "q", "-q", "--auto", "--target-size", target)
    assert result.status == 0, result
    assert set(bits_of(tmp_path / "q").values()) >= {8}
    assert total(tmp_path / "q") <= target


def test_auto_gives_bits_to_the_matrices_that_gain_most(bundle):
    """One matrix has outliers in every group, which 4 bits do not resolve; there is room for one of its size."""
    name = "transformer.layers.1.attention.query_key_value.weight"
    draft, smallest = draft_with_outliers(bundle, name), planned(bundle, 4)
    int4, int8 = Affine(4, 32), Affine(8, 32)
    room = int8.sizes(120, 40).total - int4.sizes(120, 40).total + 4096 + 300  # a page of the file, one more rule
    told = []
    recipe = choose_recipe(draft, smallest + room, int4, int8, quantize_pass().form, lambda *said: told.append(said))
    matrices = list(matrices_of(draft))
    bits = {matrix.name: recipe.affine(matrix.name, block_id).bits for block_id, matrix in matrices}
    assert bits.pop(name) == 8
    assert set(bits.values()) <= {4, 8}
    assert 8 not in [found for other, found in bits.items() if "query_key_value" in other or "mlp" in other]
    assert told == [(f"measure {one.name}", 4 * one.shape[0] * one.shape[1]) for _, one in matrices]


def draft_with_outliers(bundle: Path, name: str):
    class Heavy:
        def __init__(self, tensor) -> None:
            self.name, self.shape, self.dtype = tensor.name, tensor.shape, tensor.dtype
            self.transposed, self._tensor = tensor.transposed, tensor

        def bands(self):
            for band in self._tensor.bands():
                heavy = np.array(band)
                heavy[:, ::32] *= 8
                yield heavy

        slices = bands

    draft = draft_of_bundle(open_bundle(bundle))
    graph = draft.graph("glm_block_1")
    tensors = tuple(Heavy(tensor) if tensor.name == name else tensor for tensor in graph.tensors)
    return draft.with_graph(dataclasses.replace(graph, tensors=tensors))


def test_too_small_a_target(bundle, tmp_path):
    result = glmexport("quantize", bundle, "-o", tmp_path / "q", "-q", "--auto", "--target-size", "0.1MB")
    assert_one_sentence(result, "With int4 everywhere the bundle takes", "more than the 100,000 asked for")
    assert list(tmp_path.iterdir()) == []


# The report


def test_the_report(bundle, int4, tmp_path):
    result = glmexport("quantize", bundle, "-o", tmp_path / "q", "--bits", 4, "--json", tmp_path / "report.json", "-q")
    assert (result.status, result.stderr) == (0, "")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == quantize_report(open_bundle(bundle), open_bundle(tmp_path / "q"))
    assert report["format"] == "matmulnbits"
    files = {path.name: path.stat().st_size for path in (tmp_path / "q").iterdir() if path.name != "manifest.json"}
    assert report["bytes"] == sum(files.values()) == sum(report["parts"].values())
    assert report["parts"]["LM head"] == files["lm.onnx"] + files["lm.onnx.data"]
    assert report["parts"]["embedding"] == report["parts_before"]["embedding"]
    assert report["bytes_before"] > report["bytes"]
    assert [row["name"] for row in report["matrices"]] == [
        *(f"transformer.layers.{block}.{matrix}.weight" for block in (0, 1) for matrix in MATRICES),
        "lm_head.weight",
    ]
    first = report["matrices"][0]
    assert first == {
        "graph": "glm_block_0",
        "block_id": 0,
        "name": "transformer.layers.0.attention.query_key_value.weight",
        **quantized_matrices(int4, "glm_block_0")["transformer.layers.0.attention.query_key_value.weight"],
    }
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["graph", "matrix", "bits", "group", "bytes", "relative", "error", "cosine", "method"]
    (line,) = (line for line in lines if first["name"] in line)
    expected = ["4", "32", f"{first['bytes']:,}", f"{first['relative_error']:.3e}", f"{first['cosine']:.6f}", "mse"]
    assert line.split()[2:] == expected
    assert len([line for line in lines if " transformer." in line or "lm_head" in line]) == 9


def test_json_on_stdout_is_json_alone(bundle, tmp_path):
    result = glmexport("quantize", bundle, "-o", tmp_path / "q", "--bits", 8, "--json", "-", "-q")
    assert len(json.loads(result.stdout)["matrices"]) == 9


def test_of_many_matrices_the_worst_of_each_kind_is_shown(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("glmexport.cli.quantize.FEW_MATRICES", 5)
    result = glmexport("quantize", bundle, "-o", tmp_path / "q", "--bits", 4, "-q")
    rows = [line.split() for line in result.stdout.splitlines() if " transformer." in line]
    worst = {
        kind: max(
            record["relative_error"]
            for graph in GRAPHS
            for name, record in quantized_matrices(tmp_path / "q", graph).items()
            if kind in name
        )
        for kind in MATRICES
    }
    assert [row[5] for row in rows] == [f"{worst[kind]:.3e}" for kind in MATRICES]
    assert "The worst of each kind of 9 matrices" in result.stdout
    result = glmexport("quantize", bundle, "-o", tmp_path / "all", "--bits", 4, "-q", "--all")
    assert len([line for line in result.stdout.splitlines() if " transformer." in line]) == 8


def test_a_report_that_cannot_be_written(bundle, tmp_path):
    result = glmexport("quantize", bundle, "-o", tmp_path / "q", "--bits", 4, "-q", "--json", tmp_path / "no" / "file")
    assert result.status == 2
    assert "could not be written" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
def test_the_plot(bundle, tmp_path):
    result = glmexport("quantize", bundle, "-o", tmp_path / "q", "--bits", 4, "-q", "--plot", tmp_path / "errors.png")
    assert result.status == 0, result
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / "errors.png").stat().st_size > 10_000
    result = glmexport("quantize", bundle, "-o", tmp_path / "r", "--bits", 4, "-q", "--plot", tmp_path / "no" / "x.png")
    assert result.status == 2
    assert "could not be written" in result.stderr


def test_no_matplotlib_is_told_before_anything_is_done(bundle, tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    result = glmexport("quantize", bundle, "-o", tmp_path / "q", "--bits", 4, "--plot", tmp_path / "x.png")
    assert_one_sentence(result, "--plot needs matplotlib", "glmexport[plot]")
    assert list(tmp_path.iterdir()) == []


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", 3], ["bits 3", "8, 4"]),
        (["--bits", "eight"], ["bits 'eight'"]),
        (["--bits", "4.0"], ["bits '4.0'"]),
        (["--bits", 4, "--group-size", 33], ["group size 33", "32, 64, 128, channel"]),
        (["--bits", 4, "--group-size", "row"], ["group size 'row'"]),
        (["--bits", 4, "--method", "x"], ["method 'x'", "rtn, mse, hqq"]),
        (["--bits", 4, "--lm-bits", 5], ["bits 5"]),
        ([], ["Give --bits 8 or 4"]),
        (["--auto"], ["--auto and --target-size go together"]),
        (["--target-size", "3GB"], ["--auto and --target-size go together"]),
        (["--auto", "--target-size", "3GB", "--bits", 4], ["leave out --bits"]),
        (["--auto", "--target-size", "large"], ["'large'", "3.2GB"]),
        (["--bits", 4, "--recipe", "RECIPE"], ["leave out --bits or --recipe"]),
        (["--group-size", 32, "--recipe", "RECIPE"], ["leave out --group-size or --recipe"]),
        (["--asymmetric", "--recipe", "RECIPE"], ["leave out --asymmetric or --recipe"]),
        (["--recipe", "absent.toml"], ["absent.toml cannot be read"]),
        (["--bits", 4, "--format", "qdq", "--activations", "float32"], ["leave --activations out"]),
    ],
)
def test_bad_arguments(bundle, tmp_path, options, words):
    (tmp_path / "recipe.toml").write_text("[[rule]]\nbits = 4\n")
    options = [tmp_path / "recipe.toml" if word == "RECIPE" else word for word in options]
    with untouched(bundle, tmp_path):
        assert_one_sentence(glmexport("quantize", bundle, "-o", tmp_path / "q", *options), *words)


def test_an_unknown_format(bundle, tmp_path):
    result = glmexport("quantize", bundle, "-o", tmp_path / "q", "--bits", 4, "--format", "gguf")
    assert result.status == 2
    assert "'gguf' is not one of 'matmulnbits', 'qdq'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quantize", "int3"], ["--quantize is 'int3', expected int8 or int4"]),
        (["--quantize", "int4", "--group-size", 33], ["group size 33"]),
        (["--group-size", 64], ["--group-size says how to quantize; add --quantize"]),
        (["--asymmetric"], ["--asymmetric says how to quantize"]),
        (["--lm-bits", 4], ["--lm-bits says how to quantize"]),
        (["--method", "rtn"], ["--method says how to quantize"]),
        (["--activations", "int8"], ["--activations says how to quantize"]),
        (["--format", "qdq"], ["--format says how to quantize"]),
        (["--quantize", "int4", "--recipe", "RECIPE"], ["leave out", "--recipe"]),
        (["--embedding", "float16", "--rounding", "truncate"], ["Rounding truncate", "float16"]),
        (["--rounding", "truncate"], ["--rounding"]),
        (["--embedding", "shared"], ["quantize the head first"]),
        (["--embedding", "shared", "--quantize", "int4", "--lm-bits", "none"], ["quantize the head first"]),
    ],
)
def test_bad_arguments_of_split(checkpoint, tmp_path, options, words):
    (tmp_path / "recipe.toml").write_text("[[rule]]\nbits = 4\n")
    options = [tmp_path / "recipe.toml" if word == "RECIPE" else word for word in options]
    with untouched(checkpoint, tmp_path):
        result = glmexport("split", checkpoint, "-o", tmp_path / "bundle", "--opset", OPSET, *options)
        assert_one_sentence(result, *words)


def test_a_matrix_that_two_products_read_is_refused(bundle, tmp_path):
    """Such a graph is none of ours; replacing one product would leave the other without its weight."""
    from conftest import record_again

    copy = shutil.copytree(bundle, tmp_path / "copy")
    model = load(copy / "lm.onnx")
    node = next(node for node in model.graph.node if node.op_type == "Gemm")
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    twin.name, twin.output[0] = "twin", "unread"
    model.graph.node.append(twin)
    (copy / "lm.onnx").write_bytes(model.SerializeToString())
    record_again(copy, "lm.onnx")
    with pytest.raises(GlmExportError, match=r"lm_head\.weight is not the weight of exactly one product"):
        derived(copy, tmp_path / "q", quantize_pass(4))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_interrupted_run_leaves_nothing(bundle, tmp_path, monkeypatch):
    calls = itertools.count()

    def interrupting(what: str, count: int) -> None:
        if next(calls) == 25:
            raise KeyboardInterrupt

    with untouched(bundle), pytest.raises(KeyboardInterrupt):
        derive(open_bundle(bundle), lambda _: quantize_pass(4), tmp_path / "q", notice=print, advance=interrupting)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path / "q")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--plot", "no/such/folder/plot.png"), "no directory to write in"),
        (("--plot", "plot.jpg"), "does not end in .png"),
        (("--json", "no/such/folder/report.json"), "no directory to write in"),
        (("--json", "{target}/report.json"), "lies in the bundle"),
    ],
)
def test_reports_that_cannot_be_written_are_refused_before_the_work(bundle, tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "q"
    words = [word.format(target=target) for word in options]
    assert_one_sentence(glmexport("quantize", bundle, "-o", target, "--bits", 4, "-q", *words), told)
    assert list(tmp_path.iterdir()) == []
