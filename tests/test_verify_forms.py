"""Verification passes every form that the passes make, and fails each that was changed, hashes made to fit."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checkpoints import write_checkpoint
from conftest import record_again, split_directory, write_manifest
from derived_bundles import (
    IMAGES,
    OPSET,
    Place,
    contents,
    derived,
    glmexport,
    load,
    manifest_of,
    place_of,
    plain_bundle,
    plain_checkpoint,
    quantize_pass,
    recipe_pass,
    rewrite,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glmexport.affine import Affine
from glmexport.bundle import open_bundle
from glmexport.checkpoint import open_checkpoint
from glmexport.errors import BundleError, GlmExportError
from glmexport.form import RAW, SHARED, TRUNCATE, EmbeddingForm
from glmexport.inventory import form_in_words
from glmexport.onnx_files import ExternalTensor
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.passes.slim_vocab import SlimPass
from glmexport.quantize_kernels import quantize
from glmexport.quantized_rows import QuantizedRows, part_forms, part_name
from glmexport.recipe import parse_recipe, policy_record
from glmexport.verify import Report, progress_total, verify
from glmexport.verify.forms import graph_forms
from glmexport.verify.matrices import check_matrix
from glmexport.verify.report import Row
from glmexport.verify.tolerances import CHAIN_BUDGETS, FORMS, TOLERANCES

STEPS = 1
CASES = {"shortest", "short", "long", "infill", "batch", "last positions"}
GRAPHS = ("glm_block_0", "glm_block_1", "lm")
FOUR_H = "transformer.layers.1.mlp.dense_4h_to_h.weight"


def raw(dtype: str = "bfloat16", *rounding: str) -> EmbedPass:
    return EmbedPass(EmbeddingForm(RAW, dtype, *rounding))


SHARE = EmbedPass(EmbeddingForm(SHARED))
MIXED = parse_recipe(
    """
    [[rule]]
    pattern = "*.attention.dense.*"
    bits = "none"
    [[rule]]
    blocks = [1]
    bits = 8
    group_size = "channel"
    method = "rtn"
    [[rule]]
    pattern = "lm_head*"
    bits = 4
    symmetric = false
    [[rule]]
    bits = 4
    symmetric = false
    method = "hqq"
    """,
    "mixed",
)
FORMS_THAT_PASS = {
    "slim": [SlimPass()],
    "bf16": [raw()],
    "bf16 cut off": [raw("bfloat16", TRUNCATE)],
    "float16": [raw("float16")],
    "float32": [raw("float32")],
    "int8": [quantize_pass(8)],
    "int8 channel": [quantize_pass(8, "channel", symmetric=False, head=None)],
    "int8 float32 activations": [quantize_pass(8, activations="float32")],
    "int8 int8 activations": [quantize_pass(8, activations="int8")],
    "int4": [quantize_pass(4)],
    "int4 asymmetric": [quantize_pass(4, symmetric=False, head=4)],
    "int4 rtn": [quantize_pass(4, 128, method="rtn")],
    "int4 hqq": [quantize_pass(4, 64, method="hqq", symmetric=False)],
    "int4 hqq symmetric": [quantize_pass(4, 32, method="hqq")],
    "mixed": [recipe_pass(MIXED)],
    "all": [SlimPass(), raw(), quantize_pass(4)],
    "shared": [SlimPass(), quantize_pass(4), SHARE],
    "shared int4": [quantize_pass(8, head=4, symmetric=False), SHARE],
    "slim last": [raw("float16"), quantize_pass(4, symmetric=False), SlimPass()],
    "nothing quantized": [recipe_pass(parse_recipe('[[rule]]\nbits = "none"\n', "none"))],
}


@pytest.fixture
def form(shared, bundle, tmp_path) -> Callable[[str], Path]:
    """A copy of a bundle of one of the forms above, to be damaged."""

    def make(name: str) -> Path:
        steps = FORMS_THAT_PASS[name]
        made = shared(f"verify-{name.replace(' ', '-')}", lambda path: derived(bundle, path, *steps))
        return shutil.copytree(made, tmp_path / "copy")

    return make


@pytest.fixture
def check(checkpoint) -> Callable[..., Report]:
    def run(directory: Path, source: Path = checkpoint, steps: int = 0) -> Report:
        with open_checkpoint(source) as opened:
            return verify(open_bundle(directory), opened, steps=steps)

    return run


def failed(report: Report) -> set[tuple[str, str]]:
    return {(row.graph, row.case) for row in report.failures}


def told(report: Report) -> str:
    return " ".join(row.detail for row in report.failures)


# Every form passes


LONG = {"slim", "bf16", "float32", "int8", "int8 float32 activations", "int8 int8 activations", "int4", "int4 rtn"}
LONG |= {"float16", "mixed", "nothing quantized"}
"""Forms that others below contain."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in FORMS_THAT_PASS]
)
def test_every_form_passes(check, form, name):
    report = check(form(name), steps=STEPS)
    assert report.failures == []
    seen = {(row.graph, row.case) for row in report.rows}
    bundle = open_bundle(Path(report.bundle))
    assert seen >= {(graph, case) for graph in ("embedding", *GRAPHS, "chain") for case in CASES}
    assert seen >= {("all", case) for case in ("files", "lint", "manifest", "tokenizer", "structure")}
    checked = [row for row in report.rows if row.case == "quantized"]
    assert len(checked) == sum(len(entry["matrices"]) for entry in bundle.graphs)
    exact = {row.graph for row in report.rows if row.case == "weights"}
    assert ("embedding" in exact) is (bundle.form.embedding.kind != SHARED), "shared rows are compared as the head's"
    assert report.form == report.as_json()["form"] == form_in_words(bundle)
    assert (("chain", "next token") in seen) is bool({*graph_forms(bundle).values()} - {"float32"})
    if bundle.form.slim is not None:
        (row,) = (row for row in report.rows if row.case == "tokenizer")
        assert row.detail.endswith(f"{bundle.config.vocab_size} kept ids make the round trip")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("slim", "slim 1857 of 1897 rows"),
        ("bf16", "bfloat16 embedding"),
        ("all", "slim 1857 of 1897 rows, bfloat16 embedding, int4 and int8 matmulnbits"),
        ("shared", "slim 1857 of 1897 rows, shared embedding, int4 and int8 matmulnbits"),
        ("int8 channel", "int8 matmulnbits"),
    ],
)
def test_the_form_in_words(form, name, words):
    assert form_in_words(open_bundle(form(name))) == words


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("slim", ["float32", "float32", "float32", "float32"]),
        ("all", ["bfloat16", "int4", "int4", "int8"]),
        ("shared", ["int8", "int4", "int4", "int8"]),
        ("shared int4", ["int4", "int8", "int8", "int4"]),
        ("float16", ["float16", "float32", "float32", "float32"]),
        ("mixed", ["float32", "int4", "int8", "int4"]),
        ("int8 channel", ["float32", "int8", "int8", "float32"]),
        ("nothing quantized", ["float32", "float32", "float32", "float32"]),
    ],
)
def test_each_part_is_held_to_its_own_tolerance(form, name, forms):
    found = graph_forms(open_bundle(form(name)))
    assert [found.get(graph, "float32") for graph in ("embedding", *GRAPHS)] == forms


def test_every_form_has_its_tolerance_and_reason():
    assert {*TOLERANCES} == {*FORMS}
    assert {*CHAIN_BUDGETS} == {*FORMS} - {"float32"}
    for row in (*TOLERANCES.values(), *CHAIN_BUDGETS.values()):
        assert len(row.reason) > 20
    norms = [TOLERANCES[form].norm for form in FORMS]
    assert norms == sorted(norms), "the closest to the reference first"
    budgets = [CHAIN_BUDGETS[form] for form in FORMS[1:]]
    for before, after in itertools.pairwise(budgets):
        assert before.logits <= after.logits
        assert before.divergence <= after.divergence
        assert before.greedy >= after.greedy


@pytest.mark.slow
@pytest.mark.parametrize("argmax", ["also", "only"])
def test_heads_that_give_the_greedy_token(check, checkpoint, tmp_path, argmax):
    passes = (SlimPass(), raw(), quantize_pass(4))
    split_directory(checkpoint, tmp_path / "b", opset=OPSET, argmax=argmax, passes=passes)
    assert check(tmp_path / "b").failures == []


@pytest.mark.slow
@pytest.mark.parametrize("head", [8, 4])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_form_of_qdq_passes(check, bundle, tmp_path, bits, head, symmetric):
    derived(bundle, tmp_path / "q", quantize_pass(bits, 64, "qdq", head=head, symmetric=symmetric), SHARE)
    report = check(tmp_path / "q")
    assert report.failures == []
    assert report.form.endswith("qdq")


def test_progress_is_told_as_often_as_promised(form, checkpoint):
    opened = open_bundle(form("shared"))
    times: list[str] = []
    with open_checkpoint(checkpoint) as source:
        verify(opened, source, steps=STEPS, advance=times.append)
    assert len(times) == progress_total(opened, STEPS)


def test_split_verifies_what_it_wrote(checkpoint, tmp_path):
    options = ["--slim", "--embedding", "bf16", "--quantize", "int4", "--opset", OPSET, "--verify"]
    result = glmexport("split", checkpoint, "-o", tmp_path / "bundle", "-q", *options)
    assert (result.status, result.stderr) == (0, "")
    assert "PASS" in result.stdout


# Damage to quantized matrices


def change(bundle: Path, graph: str, ending: str, edit: Callable[[bytes], bytes]) -> None:
    """Other bytes for one tensor, size and hash made to fit."""
    place = place_of(bundle, graph, ending)
    rewrite(place, edit(place.read()))
    record_again(bundle, place.file.name)


def doubled_scale(data: bytes) -> bytes:
    values = np.frombuffer(data, "<f4").copy()
    values[len(values) // 2] *= 2
    return values.tobytes()


def nan_scale(data: bytes) -> bytes:
    values = np.frombuffer(data, "<f4").copy()
    values[3] = math.nan
    return values.tobytes()


def reversed_nibbles(data: bytes) -> bytes:
    values = np.frombuffer(data, np.uint8)
    return (values >> 4 | values << 4).astype(np.uint8).tobytes()


def swapped_groups(size: int) -> Callable[[bytes], bytes]:
    """The first two groups of the first output, exchanged."""
    return lambda data: data[size : 2 * size] + data[:size] + data[2 * size :]


def shifted_points(data: bytes) -> bytes:
    values = np.frombuffer(data, np.uint8)
    return ((values & 0xF0) | ((values & 15) + 1) % 16).astype(np.uint8).tobytes()


DAMAGE = {
    "int4": [
        ("glm_block_0", "query_key_value.weight.scales", nan_scale),
        ("glm_block_0", "mlp.dense_h_to_4h.weight.codes", reversed_nibbles),
        ("glm_block_1", "attention.dense.weight.codes", swapped_groups(16)),
        ("glm_block_1", "dense_4h_to_h.weight.scales", doubled_scale),
        ("lm", "lm_head.weight.scales", doubled_scale),
    ],
    "int4 asymmetric": [
        ("glm_block_1", "attention.dense.weight.zero_points", shifted_points),
        ("lm", "lm_head.weight.zero_points", shifted_points),
    ],
    "int4 hqq": [
        ("glm_block_0", "dense_4h_to_h.weight.zero_points", shifted_points),
        ("glm_block_1", "dense_4h_to_h.weight.scales", doubled_scale),
    ],
    "int4 rtn": [("glm_block_0", "dense_4h_to_h.weight.codes", reversed_nibbles)],
    "int8": [
        ("glm_block_0", "dense_4h_to_h.weight.scales", doubled_scale),
        ("glm_block_1", "dense_4h_to_h.weight.codes", swapped_groups(32)),
    ],
    "int8 channel": [
        ("glm_block_0", "dense_4h_to_h.weight.zero_points", lambda data: bytes([data[0] ^ 1]) + data[1:]),
        ("glm_block_0", "attention.dense.weight.scales", doubled_scale),
    ],
    "shared": [("lm", "lm_head.weight.codes", swapped_groups(64))],
    "slim last": [("lm", "lm_head.weight.scales", doubled_scale)],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_matrices(check, form, name):
    """A scale doubled, two groups swapped, the nibble order reversed, zero points shifted: each is named."""
    copy = form(name)
    for graph, ending, edit in DAMAGE[name]:
        change(copy, graph, ending, edit)
    report = check(copy)
    rows = [row for row in report.failures if row.case == "quantized"]
    assert sorted(
        (row.graph, row.detail.partition(":")[0].removeprefix(block_of(row.graph))) for row in rows
    ) == sorted((graph, matrix_of(graph, ending)) for graph, ending, _ in DAMAGE[name])
    assert all("groups are worse than plain rounding" in row.detail for row in rows)


def block_of(graph: str) -> str:
    return f"transformer.layers.{graph[-1]}."


def matrix_of(graph: str, ending: str) -> str:
    name = ending.rpartition(".")[0]
    if graph == "lm":
        return name
    kind = "attention" if "query" in name or "attention" in name else "mlp"
    return name if name.startswith(kind) else f"{kind}.{name}"


def test_two_blocks_exchanged(check, form):
    """Their data files, which have the same layout: every hash and size fits."""
    copy = form("int4")
    first, second = copy / "glm_block_0.onnx.data", copy / "glm_block_1.onnx.data"
    first.rename(copy / "third")
    second.rename(first)
    (copy / "third").rename(second)
    record_again(copy, first.name, second.name)
    report = check(copy)
    rows = [row.graph for row in report.failures if row.case == "quantized"]
    assert rows == ["glm_block_0"] * 4 + ["glm_block_1"] * 4
    assert ("glm_block_0", "long") in failed(report), "the numbers show it too"


@pytest.mark.slow
def test_damaged_matrices_of_qdq_graphs(check, bundle, tmp_path):
    """The other layout: doubled scale, reversed nibbles, in one bundle."""
    derived(bundle, tmp_path / "q", quantize_pass(4, 32, "qdq", symmetric=False, head=4))
    change(tmp_path / "q", "glm_block_1", "dense_4h_to_h.weight.scales", doubled_scale)
    change(tmp_path / "q", "lm", "lm_head.weight.codes", reversed_nibbles)
    change(tmp_path / "q", "glm_block_0", "dense_4h_to_h.weight.zero_points", shifted_points)
    report = check(tmp_path / "q")
    assert [(row.graph, row.detail.partition(":")[0]) for row in report.failures if row.case == "quantized"] == [
        ("glm_block_0", "transformer.layers.0.mlp.dense_4h_to_h.weight"),
        ("glm_block_1", FOUR_H),
        ("lm", "lm_head.weight"),
    ]
    assert [row.case for row in report.failures if row.graph == "all"] == []


def test_a_vector_beside_the_matrices_is_compared_bit_for_bit(check, form):
    copy = form("int4")
    change(copy, "glm_block_1", "dense_4h_to_h.bias", lambda data: bytes([data[0] ^ 1]) + data[1:])
    (row,) = (row for row in check(copy).failures if row.case == "weights")
    assert row.graph == "glm_block_1"
    assert row.detail.endswith("dense_4h_to_h.bias")


# One code: what is found is a group that is worse than plain rounding, whichever code made it so


class Stored:
    """A small quantized matrix in a file, to change and to check."""

    def __init__(self, directory: Path, weights: np.ndarray, affine: Affine) -> None:
        self.weights, self.affine = weights, affine
        rows, width = weights.shape
        done = quantize(weights, affine)
        parts = {"codes": done.codes, "scales": done.scales, "zero_points": done.zero_points}
        self.values = {part: np.array(parts[part]) for part in part_forms(affine, rows, width, "matmulnbits")}
        self._directory = directory

    def check(self):
        places, offset = {}, 0
        with (self._directory / "data").open("wb") as file:
            for part, value in self.values.items():
                name = part_name("w", part)
                places[name] = ExternalTensor(name, value.dtype.name, value.shape, "data", offset, value.nbytes)
                offset += file.write(value.tobytes())
        record = policy_record(self.affine)
        stored = QuantizedRows(self._directory, places, "w", record, self.weights.shape, "matmulnbits")
        return check_matrix(stored, lambda start, stop: torch.from_numpy(self.weights[start:stop]))

    def code(self, row: int, column: int) -> int:
        block = self.affine.block_size(self.weights.shape[1])
        packed = self.values["codes"][row, column // block]
        index = column % block
        return int(packed[index]) if self.affine.bits == 8 else int(packed[index // 2] >> 4 * (index % 2) & 15)

    def step(self, row: int, column: int, by: int) -> None:
        block = self.affine.block_size(self.weights.shape[1])
        packed, index = self.values["codes"][row, column // block], column % block
        if self.affine.bits == 8:
            packed[index] = int(packed[index]) + by
        else:
            packed[index // 2] = int(packed[index // 2]) + by * 16 ** (index % 2)


def small_weights(rows: int = 4, width: int = 80, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_rounding_has_no_room_for_a_wrong_code(tmp_path, bits, symmetric):
    """One step off the nearest is worse than plain rounding, unless the weight lies halfway between two codes."""
    affine = Affine(bits, 32, symmetric, "rtn")
    seen = count = 0
    for column in range(0, 80, 2):
        stored = Stored(tmp_path, small_weights(), affine)
        code = stored.code(1, column)
        stored.step(1, column, 1 if code < 2**bits - 1 else -1)
        found = stored.check().bad_groups
        assert found in (0, 1)
        seen, count = seen + found, count + 1
    assert seen >= 0.95 * count


@pytest.mark.parametrize("method", ["mse", "hqq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_code_off_by_three_steps_is_found_with_every_method(tmp_path, method, symmetric):
    """They are better than plain rounding by less than such a step costs (one step may hide in that)."""
    affine = Affine(4, 32, symmetric, method)
    for column in range(0, 80, 7):
        stored = Stored(tmp_path, small_weights(), affine)
        assert stored.check().bad_groups == 0
        stored.step(2, column, 3 if stored.code(2, column) < 8 else -3)
        assert stored.check().bad_groups == 1


@pytest.mark.parametrize("method", ["rtn", "mse", "hqq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_too_small_for_a_scale_is_zero_and_right(tmp_path, method, symmetric):
    """Below 2**-100 a group has no scale; float32 and bfloat16 checkpoints can hold such rows."""
    weights = small_weights()
    weights[2] *= np.float32(1e-35)
    assert Stored(tmp_path, weights, Affine(4, 32, symmetric, method)).check().bad_groups == 0


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1.0, 1e15, 1e25])
def test_the_error_found_is_the_error_recorded(tmp_path, size):
    """Whatever the size of the weights: float32 squares of 1e-23 vanish and of 1e20 are infinite."""
    weights, affine = small_weights() * np.float32(size), Affine(4, 32)
    fit, found = quantize(weights, affine).fit, Stored(tmp_path, weights, affine).check()
    assert found.relative_error == pytest.approx(fit.relative_error, abs=1e-5)
    assert found.cosine == pytest.approx(fit.cosine, abs=1e-5)
    assert found.bad_groups == 0


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([4, 8]),
    st.booleans(),
    st.sampled_from(["rtn", "mse"]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 79), st.sampled_from([-2, -1, 1, 2])), max_size=5),
)
def test_exactly_the_groups_worse_than_plain_rounding_are_found(tmp_path_factory, bits, symmetric, method, steps):
    """Whatever was changed: the squared error of each group, here in a loop, against plain rounding's."""
    affine = Affine(bits, 32, symmetric, method)
    stored = Stored(tmp_path_factory.getbasetemp(), small_weights(seed=bits), affine)
    plain = Stored(tmp_path_factory.getbasetemp(), stored.weights, Affine(bits, 32, symmetric, "rtn"))
    for row, column, by in steps:
        if 0 <= stored.code(row, column) + by < 2**bits:
            stored.step(row, column, by)
    ours, theirs = group_errors(stored), group_errors(plain)
    close = np.abs(ours / theirs - 1.001) < 1e-4  # sums in another order
    found = stored.check()
    certain = int((ours[~close] > theirs[~close] * 1.001).sum())
    assert certain <= found.bad_groups <= certain + close.sum()
    assert found.groups == ours.size == 12
    total = math.sqrt(ours.sum() / np.square(stored.weights, dtype=np.float64).sum())
    assert found.relative_error == pytest.approx(total, rel=1e-5)


def group_errors(stored: Stored) -> np.ndarray:
    rows, width = stored.weights.shape
    errors = np.zeros((rows, math.ceil(width / 32)))
    for row in range(rows):
        for column in range(width):
            group, bits = column // 32, stored.affine.bits
            point = 2 ** (bits - 1)
            if not stored.affine.symmetric:
                packed = stored.values["zero_points"][row]
                point = int(packed[group]) if bits == 8 else int(packed[group // 2] >> 4 * (group % 2) & 15)
            value = np.float32(stored.code(row, column) - point) * stored.values["scales"][row, group]
            errors[row, group] += float(stored.weights[row, column] - value) ** 2
    return errors


# What the manifest says


def edit_manifest(bundle: Path, edit: Callable[[dict], None]) -> None:
    manifest = manifest_of(bundle)
    edit(manifest)
    write_manifest(bundle, manifest)


def record(key: str, value: object, graph: int = 2, name: str = FOUR_H) -> Callable[[dict], None]:
    return lambda manifest: manifest["graphs"][graph]["matrices"][name].update({key: value})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (record("relative_error", 0.01), "the manifest says relative_error 0.01, found 0.08"),
        (record("relative_error", "small"), "relative_error 'small'"),
        (record("relative_error", math.nan), "relative_error nan"),
        (record("cosine", 0.9999), "the manifest says cosine 0.9999"),
        (record("bytes", 5), "matrices of glm_block_1"),
        (record("method", "rtn"), "matrices of glm_block_1"),
        (record("group_size", 64), "dense_4h_to_h.weight.codes"),
        (record("symmetric", False), "zero_points"),
        (record("bits", 8), "dense_4h_to_h.weight.codes"),
        (lambda manifest: manifest["graphs"][2]["matrices"].pop(FOUR_H), "matrices"),
        (lambda manifest: manifest["graphs"][1].update(weights="float32"), "weights of glm_block_0"),
        pytest.param(lambda m: m["quantization"].update(format="qdq"), "opset", marks=pytest.mark.slow),
        (lambda manifest: manifest["quantization"].update(int4_activations="float32"), "fresh trace"),
        (lambda manifest: manifest.update(quantization=None), "recipe.toml belongs to no graph"),
        (lambda manifest: manifest.update(tied=False), "tied is False"),
    ],
)
def test_a_manifest_that_says_what_is_not(check, form, edit, words):
    copy = form("int4")
    edit_manifest(copy, edit)
    assert words in told(check(copy))


@pytest.mark.parametrize(
    "edit",
    [
        record("bits", 5),
        record("bits", 4.0),
        record("group_size", 33),
        record("method", "x"),
        record("symmetric", 1),
        record("bytes", "5"),
        lambda manifest: manifest["graphs"][2]["matrices"][FOUR_H].pop("bits"),
        lambda manifest: manifest["graphs"][2].update(matrices=[]),
        lambda manifest: manifest["quantization"].update(format="gguf"),
        lambda manifest: manifest["quantization"].update(int8_activations="int7"),
        lambda manifest: manifest["embedding"].update(kind="gone"),
        lambda manifest: manifest.update(embedding={"kind": "raw", "dtype": "float8", "rounding": "nearest-even"}),
        lambda manifest: manifest.update(embedding={"kind": "raw", "dtype": "bfloat16", "rounding": "up"}),
        lambda manifest: manifest.update(vocabulary={"num_image_tokens": -1, "full_size": 1897, "kept": [[0, 1897]]}),
        lambda manifest: manifest.update(vocabulary={"num_image_tokens": 0, "full_size": 1897, "kept": [[0, 1000]]}),
        lambda manifest: manifest.update(vocabulary={"num_image_tokens": 0, "full_size": 1897, "kept": [[5, 1]]}),
        lambda manifest: manifest.update(vocabulary=[]),
        lambda manifest: manifest.pop("quantization"),
    ],
)
def test_a_manifest_that_no_pass_writes_is_not_opened(form, edit):
    copy = form("int4")
    edit_manifest(copy, edit)
    with pytest.raises(BundleError):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text.replace('"mse"', '"rtn"', 1), "matrices of glm_block_0"),
        (lambda text: text.replace("bits = 4", "bits = 8", 1), "glm_block_0"),
        (lambda text: text.replace("group_size = 32", "group_size = 64", 1), "glm_block_0"),
        (lambda text: text + "# a comment\n", "recipe.toml is not what the checkpoint gives"),
        (lambda text: "bits = 4", "must hold [[rule]] tables"),
        (lambda text: '[[rule]]\npattern = "x"\nbits = 4', "No rule of the recipe matches"),
    ],
)
def test_another_recipe(check, form, edit, words):
    copy = form("int4")
    text = (copy / "recipe.toml").read_text()
    (copy / "recipe.toml").write_text(edit(text))
    record_again(copy, "recipe.toml")
    assert words in told(check(copy))


def test_no_recipe(check, form):
    copy = form("int4")
    (copy / "recipe.toml").unlink()
    edit_manifest(copy, lambda manifest: manifest["files"].pop("recipe.toml"))
    assert "has no recipe.toml" in told(check(copy))


# Graphs


def edit_graph(bundle: Path, name: str, edit: Callable[[onnx.ModelProto], None]) -> None:
    model = load(bundle / f"{name}.onnx")
    edit(model)
    (bundle / f"{name}.onnx").unlink()
    (bundle / f"{name}.onnx").write_bytes(model.SerializeToString())
    record_again(bundle, f"{name}.onnx")


def set_attribute(name: str, value: int) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
        next(attribute for attribute in node.attribute if attribute.name == name).i = value

    return edit


def other_product(model: onnx.ModelProto) -> None:
    """Two products of one shape exchange their scales."""
    first, second = [node for node in model.graph.node if node.op_type == "MatMulNBits"][:2]
    first.input[2], second.input[2] = second.input[2], first.input[2]


@pytest.mark.parametrize("value", [0, 1])
def test_another_accuracy_level(check, form, value):
    """The numbers are closer than they need be, and take a hundred times as long: only the trace shows it."""
    copy = form("int4")
    edit_graph(copy, "glm_block_1", set_attribute("accuracy_level", value))
    report = check(copy)
    assert failed(report) == {("glm_block_1", "structure")}
    assert "is not what a fresh trace gives: the node" in told(report)


def test_other_operators(check, form):
    copy = form("int8")
    edit_graph(copy, "glm_block_0", other_product)
    assert not check(copy).passed


# Slimmed vocabularies and raw rows


def test_one_row_off_by_one_unit(check, form):
    copy = form("bf16")
    path = copy / "word_embeddings_bf16.bin"
    data = bytearray(path.read_bytes())
    data[2 * 40 * 1777] ^= 1
    path.write_bytes(data)
    record_again(copy, path.name)
    report = check(copy)
    assert failed(report) == {("embedding", "weights")}
    assert told(report).endswith("word_embeddings_bf16.bin")


@pytest.mark.parametrize("name", ["bf16 cut off", "float32", "all"])
def test_two_rows_exchanged(check, form, name):
    copy = form(name)
    (path,) = copy.glob("*.bin")
    rows = 1857 if name == "all" else 1897
    table = np.frombuffer(path.read_bytes(), np.uint8).reshape(rows, -1).copy()
    table[[100, 1200]] = table[[1200, 100]]
    path.write_bytes(table.tobytes())
    record_again(copy, path.name)
    assert ("embedding", "weights") in failed(check(copy))


def test_the_other_rounding(check, form):
    copy = form("bf16")
    edit_manifest(copy, lambda manifest: manifest["embedding"].update(rounding=TRUNCATE))
    assert failed(check(copy)) == {("embedding", "weights")}


def test_rows_are_held_to_the_tolerance_of_rows(check, form):
    """Off by some 3 %: within what the int4 blocks may be off, and far from what bfloat16 rows may."""
    copy = form("all")
    path = copy / "slim_word_embeddings_bf16.bin"
    upper = np.frombuffer(path.read_bytes(), "<u2").copy()
    path.write_bytes((upper + 4).tobytes())  # four units of the eighth bit
    record_again(copy, path.name)
    report = check(copy)
    assert {("embedding", case) for case in CASES} <= failed(report)
    worst = max(row.relative_error for row in report.failures if row.graph == "embedding" and row.relative_error)
    assert TOLERANCES["bfloat16"].norm < worst < TOLERANCES["int4"].norm


def test_a_head_is_held_to_its_own_tolerance(check, form):
    """An int8 head under int4 blocks: 5 % off is too much for it."""
    copy = form("int4")

    def shrink(data: bytes) -> bytes:
        return (np.frombuffer(data, "<f4") * np.float32(1.05)).tobytes()

    change(copy, "lm", "lm_head.weight.scales", shrink)
    report = check(copy)
    assert {("lm", case) for case in CASES} <= failed(report)
    assert not {("chain", case) for case in CASES} & failed(report), "the chain may be off as much"


def shifted_map(manifest: dict) -> None:
    manifest["vocabulary"]["kept"] = [[IMAGES - 1, 1896]]


def shifted_map_and_ids(manifest: dict) -> None:
    """One row further to the front, and every id that names a row made to fit."""
    shifted_map(manifest)
    ids = manifest["model"]["special_ids"]
    manifest["model"]["special_ids"] = {name: value + 1 for name, value in ids.items()}
    manifest["model"]["num_image_tokens"] = 1


def test_a_map_shifted_by_one(check, form):
    copy = form("slim")
    edit_manifest(copy, shifted_map)
    with pytest.raises((BundleError, GlmExportError)):
        check(copy)
    edit_manifest(copy, shifted_map_and_ids)
    report = check(copy)
    assert {("embedding", "weights"), ("lm", "weights"), ("all", "tokenizer")} <= failed(report)
    assert "slim_vocab.txt is not what the checkpoint gives" in told(report)


def test_a_map_with_two_rows_exchanged(check, form, bundle, tmp_path):
    """Another set of kept rows of the same number."""
    keep = tmp_path / "ids"
    keep.write_text("\n".join(map(str, range(100, 1000))))
    derived(bundle, tmp_path / "kept", SlimPass(keep=keep))
    assert check(tmp_path / "kept").failures == []

    def edit(manifest: dict) -> None:
        assert manifest["vocabulary"]["kept"][2] == [100, 1000]
        manifest["vocabulary"]["kept"][2:3] = [[100, 500], [501, 1001]]

    edit_manifest(tmp_path / "kept", edit)
    report = check(tmp_path / "kept")
    assert {("embedding", "weights"), ("lm", "weights"), ("all", "tokenizer")} <= failed(report)


def test_another_number_of_image_tokens(check, form):
    copy = form("slim")
    edit_manifest(copy, lambda manifest: manifest["vocabulary"].update(num_image_tokens=IMAGES - 1))
    assert "vocabulary is" in told(check(copy))


@pytest.mark.parametrize("name", ["slim", "all"])
def test_a_line_of_the_vocabulary(check, form, name):
    copy = form(name)
    path = copy / "slim_vocab.txt"
    lines = path.read_bytes().split(b"\n")
    lines[700], lines[701] = lines[701], lines[700]
    path.write_bytes(b"\n".join(lines))
    record_again(copy, path.name)
    assert failed(check(copy)) == {("all", "tokenizer")}


def test_the_old_number_of_image_tokens(check, form, bundle):
    copy = form("slim")
    shutil.copyfile(bundle / "tokenizer_config.json", copy / "tokenizer_config.json")
    record_again(copy, "tokenizer_config.json")
    report = check(copy)
    assert failed(report) == {("all", "tokenizer")}
    assert told(report) == "tokenizer_config.json is not what the checkpoint gives."


def test_a_missing_vocabulary(check, form):
    """A bundle with a tokenizer has the file that slimming writes."""
    copy = form("slim")
    (copy / "slim_vocab.txt").unlink()
    edit_manifest(copy, lambda manifest: manifest["files"].pop("slim_vocab.txt"))
    assert not check(copy).passed


def test_the_wrong_checkpoint(check, shared, form, tmp_path):
    other = plain_checkpoint(shared)
    with pytest.raises(BundleError, match="was not made from"):
        check(form("slim"), other)


# Shared rows


def share(manifest: dict) -> None:
    manifest["embedding"] = {"kind": "shared"}
    manifest["graphs"] = [entry for entry in manifest["graphs"] if entry["name"] != "embedding"]
    for name in ("embedding.onnx", "embedding.onnx.data"):
        del manifest["files"][name]


def without_embedding(bundle: Path) -> None:
    for name in ("embedding.onnx", "embedding.onnx.data"):
        (bundle / name).unlink()
    edit_manifest(bundle, share)


def test_shared_rows_of_an_untied_model(check, shared, tmp_path):
    derived(plain_bundle(shared), tmp_path / "q", quantize_pass(4))
    assert check(tmp_path / "q", plain_checkpoint(shared)).failures == []
    without_embedding(tmp_path / "q")
    report = check(tmp_path / "q", plain_checkpoint(shared))
    assert not report.passed
    assert "the checkpoint is not tied" in told(report)
    edit_manifest(tmp_path / "q", lambda manifest: manifest.update(tied=True))
    assert "the checkpoint is not tied" in told(check(tmp_path / "q", plain_checkpoint(shared)))


def test_shared_rows_of_a_float_head(check, form):
    copy = form("int8 channel")
    without_embedding(copy)
    assert "while the head is float32" in told(check(copy))


def test_shared_rows_are_those_of_a_manifest_made_by_hand(check, form):
    """What the pass does is no more than that."""
    copy = form("int4")
    without_embedding(copy)
    assert check(copy).failures == []


def test_wrong_shared_rows_are_seen_as_embedding_too(check, form):
    copy = form("shared")
    change(copy, "lm", "lm_head.weight.scales", lambda data: (np.frombuffer(data, "<f4") * np.float32(1.5)).tobytes())
    report = check(copy)
    assert {("embedding", case) for case in CASES} <= failed(report)
    assert ("lm", "quantized") in failed(report)


# Files


def test_damaged_files_are_not_run(check, form):
    copy = form("all")
    data = bytearray((copy / "lm.onnx.data").read_bytes())
    data[-1] ^= 1
    (copy / "lm.onnx.data").write_bytes(data)
    report = check(copy)
    assert failed(report) == {("lm.onnx.data", "files")}
    assert {row.case for row in report.rows} == {"files"}


@pytest.mark.parametrize("name", ["all", "shared"])
def test_a_flipped_bit_in_any_file(check, form, name):
    copy = form(name)
    for file in contents(copy):
        if file == "manifest.json":
            continue
        data = bytearray((copy / file).read_bytes())
        data[len(data) // 2] ^= 4
        (copy / file).write_bytes(data)
        assert failed(check(copy)) == {(file, "files")}
        data[len(data) // 2] ^= 4
        (copy / file).write_bytes(data)


def test_codes_that_lie_elsewhere(check, form):
    """The codes of another matrix of that shape, pointed to instead of its own."""
    copy = form("int4 asymmetric")
    place: Place = place_of(copy, "glm_block_0", "attention.dense.weight.codes")

    def edit(model: onnx.ModelProto) -> None:
        (proto,) = (one for one in model.graph.initializer if one.name.endswith("attention.dense.weight.codes"))
        for entry in proto.external_data:
            if entry.key == "offset":
                entry.value = str(place.offset + 4096)

    edit_graph(copy, "glm_block_0", edit)
    assert not check(copy).passed


# Bounds that follow the model


@pytest.fixture(scope="session")
def strong(shared) -> tuple[Path, Path]:
    """A checkpoint whose softmax saturates (block matrices six times as large), and its int4 bundle."""

    def make(path: Path) -> None:
        write_checkpoint(path, tokenizer=False, hidden_size=128, heads=2, inner=300, fmt="safetensors", seed=5)
        tensors = load_file(path / "model.safetensors")
        for name, tensor in tensors.items():
            if tensor.ndim == 2 and ".layers." in name:
                tensors[name] = (tensor.float() * 6).half()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    checkpoint = shared("strong-checkpoint", make)
    floating = shared("strong-bundle", lambda path: split_directory(checkpoint, path, opset=17))
    return checkpoint, shared("strong-int4", lambda path: derived(floating, path, quantize_pass(4)))


def block_rows(report: Report) -> list[Row]:
    return [row for row in report.rows if row.graph.startswith("glm_block") and row.max_abs_error is not None]


def test_blocks_of_a_model_that_multiplies_errors_are_held_to_what_their_weights_do(check, strong):
    checkpoint, quantized = strong
    rows = block_rows(check(quantized, checkpoint))
    beyond = [row for row in rows if row.relative_error > TOLERANCES["int4"].norm]
    assert beyond, "else this model shows nothing"
    assert all(row.passed and "the stored weights alone give" in row.detail for row in beyond)


def test_and_no_further(check, strong, monkeypatch):
    checkpoint, quantized = strong
    monkeypatch.setattr("glmexport.verify.check.INHERENT_SLACK", 0.5)
    rows = block_rows(check(quantized, checkpoint))
    assert all(row.passed == (row.relative_error <= TOLERANCES["int4"].norm) for row in rows)


def test_a_kept_id_whose_text_needs_dropped_pieces(check, bundle, tmp_path):
    """`<unk>` decodes to a sign that the full tokenizer writes with byte pieces; without these nothing does."""
    keep = tmp_path / "keep.txt"
    keep.write_text("\n".join(map(str, range(40, 340))), "utf-8")  # 40 image rows; the first text row is <unk>
    derived(bundle, tmp_path / "slim", SlimPass(keep=keep))
    (row,) = [row for row in check(tmp_path / "slim").rows if row.case == "tokenizer"]
    assert row.passed, row.detail
