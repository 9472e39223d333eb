"""Verification passes a good bundle and fails every bundle that was changed, however it was changed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checkpoints import write_checkpoint
from conftest import record_again, split_directory, write_manifest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from glmexport.bundle import open_bundle
from glmexport.checkpoint import open_checkpoint
from glmexport.config import ModelConfig, SpecialIds
from glmexport.errors import BundleError
from glmexport.graph_pool import GraphPool
from glmexport.onnx_files import ExternalTensor, external_tensors, load_graph
from glmexport.trace import TRACED_LENGTHS
from glmexport.verify import Report, Row, progress_total, verify
from glmexport.verify.cases import make_cases
from glmexport.verify.tolerances import TOLERANCES

STEPS = 2


@pytest.fixture
def check(small_checkpoint):
    """Verify a directory against the small checkpoint, or another."""

    def run(directory: Path, checkpoint: Path = small_checkpoint, steps: int = STEPS) -> Report:
        with open_checkpoint(checkpoint) as source:
            return verify(open_bundle(directory), source, steps=steps)

    return run


def failed(report: Report) -> set[tuple[str, str]]:
    return {(row.graph, row.case) for row in report.failures}


def cases_of(report: Report, graph: str) -> set[str]:
    return {case for found, case in failed(report) if found == graph}


NUMERIC = {"shortest", "short", "long", "infill", "batch", "last positions"}


# A good bundle


def test_a_good_bundle_passes(check, small_bundle):
    report = check(small_bundle)
    assert report.passed
    assert report.failures == []
    assert report.greedy[0] == report.greedy[1] == 7 * (STEPS + 1), "six cases, one of them with two rows"
    assert report.worst < 1e-4
    seen = {(row.graph, row.case) for row in report.rows}
    graphs = {"embedding", "glm_block_0", "glm_block_1", "lm"}
    assert seen >= {(graph, case) for graph in graphs for case in {*NUMERIC, "weights"}}
    assert seen >= {("chain", case) for case in NUMERIC} | {("all", "files"), ("all", "lint")}
    exact = {row.graph: row for row in report.rows if row.case == "weights"}
    assert exact["glm_block_0"].detail == "12 tensors equal bit for bit"


def test_the_golden_bundle_passes(golden_bundle, golden_checkpoint, check):
    report = check(golden_bundle, golden_checkpoint)
    assert report.passed
    assert report.worst < 1e-4


@pytest.mark.parametrize("argmax", ["also", "only"])
def test_argmax_modes_pass(check, small_checkpoint, shared, argmax):
    bundle = shared(f"argmax-{argmax}", lambda path: split_directory(small_checkpoint, path, argmax=argmax, opset=14))
    report = check(bundle)
    assert report.passed
    assert report.greedy == (7 * (STEPS + 1), 7 * (STEPS + 1))


@pytest.mark.parametrize("argmax", ["also", "only"])
def test_a_head_that_gives_the_least_token_fails(check, small_checkpoint, shared, tmp_path, argmax):
    bundle = shared(f"argmax-{argmax}", lambda path: split_directory(small_checkpoint, path, argmax=argmax, opset=14))
    copy = shutil.copytree(bundle, tmp_path / "copy")
    edit(copy, "lm.onnx", lambda model: rename_operator(model, "ArgMax", "ArgMin"))
    report = check(copy)
    assert cases_of(report, "lm") == NUMERIC | {"structure"}
    assert cases_of(report, "chain") == NUMERIC
    assert report.greedy[0] == 0


def test_progress_is_told_as_often_as_promised(small_bundle, small_checkpoint):
    told: list[str] = []
    bundle = open_bundle(small_bundle)
    with open_checkpoint(small_checkpoint) as source:
        verify(bundle, source, steps=STEPS, advance=told.append)
    assert len(told) == progress_total(bundle, STEPS)


def test_the_report_is_plain_json(check, small_bundle):
    report = check(small_bundle)
    document = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert document["passed"] is True
    assert len(document["rows"]) == len(report.rows)
    assert document["rows"][0] == {
        "graph": "all",
        "case": "files",
        "passed": True,
        "max_abs_error": None,
        "relative_error": None,
        "detail": report.rows[0].detail,
        "headroom": None,
    }


def test_a_model_that_does_not_stay_in_memory(check, small_bundle, monkeypatch):
    """With room for a single graph the same numbers come out."""
    monkeypatch.setattr("glmexport.verify.modes.MEMORY_LIMIT", 1)
    opened: list[str] = []
    load = GraphPool._load

    def counting(self: GraphPool, graph: str):
        opened.append(graph)
        assert set(self._open) <= {graph}, "one graph at a time"
        return load(self, graph)

    monkeypatch.setattr(GraphPool, "_load", counting)
    assert check(small_bundle).passed
    assert len(opened) > 4


# Damage that only the comparison can find: sizes and hashes in the manifest are made to fit


def edit(bundle: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(bundle / name, load_external_data=False)
    change(model)
    (bundle / name).write_bytes(model.SerializeToString())
    record_again(bundle, name)


def stored(bundle: Path, graph: str, ending: str) -> ExternalTensor:
    tensors = external_tensors(load_graph(bundle / f"{graph}.onnx"), graph)
    return next(tensor for tensor in tensors if tensor.name.endswith(ending))


def edit_weight(bundle: Path, graph: str, ending: str, change: Callable[[np.ndarray], None]) -> None:
    tensor = stored(bundle, graph, ending)
    path = bundle / tensor.location
    content = bytearray(path.read_bytes())
    values = np.frombuffer(content, np.float32, math.prod(tensor.shape), tensor.offset)
    change(values)
    path.write_bytes(content)
    record_again(bundle, tensor.location)


def flip_sign(values: np.ndarray) -> None:
    values[len(values) // 2] *= -1


def flip_low_bit(values: np.ndarray) -> None:
    values.view(np.uint32)[-1] ^= 1


def make_nan(values: np.ndarray) -> None:
    values[0] = np.nan


def rename_operator(model: onnx.ModelProto, old: str, new: str) -> None:
    node = next(node for node in model.graph.node if node.op_type == old)
    node.op_type = new


def reader(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (node,) = (node for node in model.graph.node if name in node.input)
    return node


def insert_before(model: onnx.ModelProto, name: str, op_type: str, *more: str, **attributes: object) -> None:
    """Put an operator between a value and the one node that reads it."""
    node = reader(model, name)
    node.input[list(node.input).index(name)] = "changed"
    position = list(model.graph.node).index(node)
    model.graph.node.insert(position, onnx.helper.make_node(op_type, [name, *more], ["changed"], **attributes))


def add_constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return name


def inverted_mask(model: onnx.ModelProto) -> None:
    insert_before(model, "attention_mask", "Not")


def positions_off_by_one(model: onnx.ModelProto) -> None:
    one = add_constant(model, "one_more", np.array(1, np.int64))
    insert_before(model, "position_ids", "Add", one)


def swapped_position_rows(model: onnx.ModelProto) -> None:
    order = add_constant(model, "other_order", np.array([1, 0]))
    insert_before(model, "position_ids", "Gather", order, axis=1)


def swapped_cache(model: onnx.ModelProto) -> None:
    """Values first in the cache, in and out: the block alone stays consistent."""
    order = add_constant(model, "values_first", np.array([1, 0]))
    insert_before(model, "past_key_values", "Gather", order, axis=0)
    producer = next(node for node in model.graph.node if "presents" in node.output)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == "presents":
                    names[i] = "keys_first"
    assert "keys_first" in producer.output
    model.graph.node.append(onnx.helper.make_node("Gather", ["keys_first", order], ["presents"], axis=0))


def first_position(model: onnx.ModelProto) -> None:
    """The head's Gather takes the hidden states of place 0 instead of the last one."""
    node = next(node for node in model.graph.node if node.op_type == "Gather")
    index = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    assert onnx.numpy_helper.to_array(index) == -1
    index.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(onnx.numpy_helper.to_array(index)), index.name))


def doubled_layer_scale(model: onnx.ModelProto) -> None:
    scale = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("layer_scale"))
    value = onnx.numpy_helper.to_array(scale) * 2
    scale.CopyFrom(onnx.numpy_helper.from_array(value, scale.name))


def other_epsilon(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 1e-3


def constant_close_to(value: float, instead: float) -> Callable[[onnx.ModelProto], None]:
    """Change one float constant of the graph."""

    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL and tensor.data_type == TensorProto.FLOAT:
                array = onnx.numpy_helper.to_array(tensor)
                if array.size == 1 and abs(float(array.ravel()[0]) - value) < 1e-6 * abs(value):
                    changed = np.full_like(array, instead)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
                    return
        raise AssertionError(f"no constant {value}")

    return change


@pytest.mark.parametrize(
    ("graph", "ending"),
    [
        ("embedding", "word_embeddings.weight"),
        ("glm_block_0", "attention.query_key_value.weight"),
        ("glm_block_1", "mlp.dense_4h_to_h.weight"),
        ("glm_block_1", "input_layernorm.weight"),
        ("lm", "lm_head.weight"),
        ("lm", "final_layernorm.bias"),
    ],
)
@pytest.mark.parametrize("change", [flip_sign, flip_low_bit, make_nan])
def test_one_changed_weight(check, small_copy, graph, ending, change):
    """A sign, the last bit of a mantissa and a NaN; the comparison bit by bit misses none."""
    edit_weight(small_copy, graph, ending, change)
    report = check(small_copy, steps=1)
    rows = [row for row in report.failures if row.case == "weights"]
    assert [row.graph for row in rows] == [graph]
    assert rows[0].detail.endswith(ending)
    if change is make_nan and ending != "word_embeddings.weight":
        assert cases_of(report, graph) >= NUMERIC
        assert math.isnan(report.worst)
        json.dumps(report.as_json(), allow_nan=False)


def test_a_changed_weight_is_seen_in_the_numbers_too(check, small_copy):
    edit_weight(small_copy, "glm_block_0", "attention.dense.bias", flip_sign)
    report = check(small_copy)
    assert cases_of(report, "glm_block_0") == {*NUMERIC, "weights"}
    assert cases_of(report, "glm_block_1") == set(), "the next block is given the reference's hidden states"
    assert cases_of(report, "chain")


@pytest.mark.parametrize("ending", ["rotary_emb.inv_freq"])
def test_changed_frequencies(check, small_copy, ending):
    """They are computed, not read, so that only the numbers can show it."""
    edit_weight(small_copy, "glm_block_1", ending, lambda values: values.__setitem__(-1, values[-1] * 1.001))
    report = check(small_copy)
    assert cases_of(report, "glm_block_1") & NUMERIC


def test_mask_polarity(check, small_copy):
    edit(small_copy, "glm_block_1.onnx", inverted_mask)
    report = check(small_copy)
    assert cases_of(report, "glm_block_1") >= NUMERIC - {"shortest"}
    assert cases_of(report, "glm_block_0") == set()


def test_positions_off_by_one(check, small_copy):
    """Rotation is relative, so hidden states hide it; the keys in the cache show it."""
    edit(small_copy, "glm_block_0.onnx", positions_off_by_one)
    report = check(small_copy)
    assert cases_of(report, "glm_block_0") == NUMERIC | {"structure"}
    assert cases_of(report, "chain") == set(), "this is why the cache is compared and not only the tokens"


def test_swapped_position_rows(check, small_copy):
    edit(small_copy, "glm_block_1.onnx", swapped_position_rows)
    report = check(small_copy)
    assert cases_of(report, "glm_block_1") == NUMERIC | {"structure"}


def test_swapped_blocks(check, small_copy):
    """Files exchanged, with the names in them made to fit."""
    first, second = "glm_block_0", "glm_block_1"
    models = {name: (small_copy / f"{name}.onnx").read_bytes() for name in (first, second)}
    data = {name: (small_copy / f"{name}.onnx.data").read_bytes() for name in (first, second)}
    for name, other, number, old in ((first, second, b"0", b"1"), (second, first, b"1", b"0")):
        content = models[other].replace(f"glm_block_{old.decode()}".encode(), f"glm_block_{number.decode()}".encode())
        (small_copy / f"{name}.onnx").write_bytes(content.replace(b"layers." + old, b"layers." + number))
        (small_copy / f"{name}.onnx.data").write_bytes(data[other])
        record_again(small_copy, f"{name}.onnx", f"{name}.onnx.data")
    report = check(small_copy)
    for name in (first, second):
        assert cases_of(report, name) == {*NUMERIC, "weights", "structure"}


def test_swapped_cache(check, small_copy):
    edit(small_copy, "glm_block_0.onnx", swapped_cache)
    report = check(small_copy)
    assert cases_of(report, "glm_block_0") == NUMERIC | {"structure"}
    assert cases_of(report, "chain") == set(), "the chain cannot see it, other programs that read the cache can"


def test_the_first_position_instead_of_the_last(check, small_copy):
    edit(small_copy, "lm.onnx", first_position)
    report = check(small_copy)
    assert cases_of(report, "lm") == NUMERIC | {"structure"}


def test_the_layer_scale_cancels_in_float32(check, small_copy):
    """It divides the query and multiplies the scores; all that it changes is the reach of float16."""
    edit(small_copy, "glm_block_1.onnx", doubled_layer_scale)
    report = check(small_copy)
    assert report.worst < 1e-4
    assert cases_of(report, "glm_block_1") == {"structure"}


@pytest.mark.parametrize(
    "change",
    [
        other_epsilon,
        constant_close_to(math.sqrt(56), math.sqrt(2 * 2)),
        constant_close_to(0.044715, 0.0),
        constant_close_to(math.sqrt(16), 5.0),
    ],
    ids=["epsilon", "alpha of the actual number of blocks", "GELU", "head width"],
)
def test_other_constants(check, small_copy, change):
    edit(small_copy, "glm_block_0.onnx", change)
    assert cases_of(check(small_copy), "glm_block_0") & NUMERIC


def test_an_embedding_that_is_not_turned(check, small_copy):
    """[batch, seq] instead of [seq, batch] is found by the rules of the graphs already."""

    def change(model: onnx.ModelProto) -> None:
        transpose = next(node for node in model.graph.node if node.op_type == "Transpose")
        transpose.op_type = "Identity"
        del transpose.attribute[:]

    edit(small_copy, "embedding.onnx", change)
    report = check(small_copy)
    assert failed(report) == {("embedding", "lint")}
    assert "output inputs_embeds has 'batch' on axis 0, expected 'seq'." in report.failures[0].detail


def test_a_graph_that_breaks_a_rule_is_not_run(check, small_copy, monkeypatch):
    edit(small_copy, "lm.onnx", lambda model: setattr(model, "ir_version", 3))
    monkeypatch.setattr(GraphPool, "_load", lambda *_: pytest.fail("was run"))
    report = check(small_copy)
    assert failed(report) == {("lm", "lint")}
    assert "IR version 3, expected 8" in report.failures[0].detail


def test_a_graph_that_cannot_run(check, small_copy, monkeypatch):
    def broken(self: GraphPool, graph: str):
        raise BundleError("lm.onnx could not be loaded: broken.")

    monkeypatch.setattr(GraphPool, "_load", broken)
    report = check(small_copy)
    assert failed(report) == {("all", "run")}


# Files


def all_files() -> list[str]:
    graphs = ("embedding", "glm_block_0", "glm_block_1", "lm")
    return [f"{graph}.onnx{ending}" for graph in graphs for ending in ("", ".data")]


def test_the_list_of_files_is_complete(small_bundle):
    assert sorted([*all_files(), "manifest.json"]) == sorted(path.name for path in small_bundle.iterdir())


@pytest.mark.parametrize("name", all_files())
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_bit_in_any_file(check, small_copy, name, place):
    content = bytearray((small_copy / name).read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": -1}[place]] ^= 0x10
    (small_copy / name).write_bytes(content)
    report = check(small_copy)
    assert [(row.graph, row.case) for row in report.failures] == [(name, "files")]
    assert report.failures[0].detail == f"{name} was changed: its SHA-256 is not the manifest's."


def test_missing_and_surplus_files(check, small_copy):
    (small_copy / "lm.onnx.data").unlink()
    (small_copy / "notes.txt").write_text("mine")
    os.truncate(small_copy / "embedding.onnx.data", 4096)
    report = check(small_copy)
    assert {row.graph: row.detail for row in report.failures} == {
        "lm.onnx.data": "lm.onnx.data is missing.",
        "notes.txt": "notes.txt is not in the manifest.",
        "embedding.onnx.data": "embedding.onnx.data has 4096 bytes, the manifest says 16384.",
    }


def test_another_checkpoint_of_the_same_shape(check, small_bundle, tmp_path):
    other = write_checkpoint(tmp_path / "other", tokenizer=False, seed=8)
    report = check(small_bundle, other)
    assert cases_of(report, "glm_block_0") == {*NUMERIC, "weights"}
    assert not report.passed


def test_a_checkpoint_of_another_shape(check, small_bundle, tmp_path, golden_checkpoint):
    with pytest.raises(
        BundleError, match=r"was not made from .*: vocab_size 128 against 1856, hidden_size 32 against 64"
    ):
        check(small_bundle, golden_checkpoint)


# Cases, report, tolerances


def test_the_cases_cover_what_was_promised(golden_bundle):
    config = open_bundle(golden_bundle).config
    cases = {case.name: case for case in make_cases(config, 4)}
    assert set(cases) == NUMERIC
    lengths = {name: case.prompt.input_ids.shape[1] for name, case in cases.items()}
    assert TRACED_LENGTHS["seq"] not in lengths.values()
    assert lengths["shortest"] == 2
    assert lengths["long"] > 60
    assert cases["batch"].batch == 2
    assert cases["batch"].prompt.pad_lengths.tolist() == [7, 0], "left padding"
    ids = config.special_ids
    assert ids.mask in cases["infill"].prompt.input_ids
    assert ids.gmask not in cases["infill"].prompt.input_ids
    _, positions = cases["last positions"].inputs(0)
    assert positions[:, 0].max() == config.max_positions - 1
    _, last = cases["last positions"].inputs(4)
    assert last[0, 1, 0] == config.max_positions - 1 or last[0, 1, 0] == config.max_positions
    assert positions[0, 1, 0] == 0, "the context keeps block position 0"


@pytest.mark.parametrize("max_positions", [1, 2, 8, 70])
def test_cases_of_models_with_few_positions(max_positions):
    config = ModelConfig("x", 20, 8, 1, 2, 8, max_positions, 1e-5, 0, SpecialIds(15, 16, 17, 18, 3, 5))
    for case in make_cases(config, 2):
        for step in range(3):
            mask, positions = case.inputs(step)
            assert positions.min() >= 0
            assert mask.shape[-1] == case.prompt.input_ids.shape[1] + step


ERRORS = st.one_of(st.none(), st.floats(min_value=0), st.just(float("nan")))


@given(
    st.lists(st.builds(Row, st.sampled_from("abc"), st.sampled_from("xy"), st.booleans(), ERRORS, ERRORS), max_size=8)
)
def test_reports(rows):
    report = Report("bundle", "float32", rows)
    assert report.passed == (bool(rows) and all(row.passed for row in rows))
    assert set(map(id, report.failures)) <= set(map(id, report.worst_rows())), "no failure is hidden"
    errors = [row.max_abs_error for row in rows if row.max_abs_error is not None]
    expected = math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)
    assert report.worst == expected or (math.isnan(report.worst) and math.isnan(expected))
    json.dumps(report.as_json(), allow_nan=False)


def test_nothing_found_is_no_pass():
    assert not Report("bundle", "float32").passed


def test_a_nan_is_never_within_bounds():
    for tolerance in TOLERANCES.values():
        assert tolerance.allows(tolerance.absolute, 1.0, 1.0)
        assert tolerance.allows(1.0, tolerance.relative, 1.0)
        assert tolerance.allows(1.0, 1.0, tolerance.norm)
        assert not tolerance.allows(1.0, 1.0, 1.0)
        assert not tolerance.allows(math.nan, math.nan, math.nan)
        assert tolerance.reason


# What no prompt shows: the structure against a fresh trace, the manifest and the tokenizer against the checkpoint


def decoy_embedding(model: onnx.ModelProto) -> None:
    """The right table stays under its name, and the node reads another one."""
    table = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("word_embeddings.weight"))
    other = model.graph.initializer.add()
    other.CopyFrom(table)
    other.name = "transformer.other.weight"
    node = reader(model, table.name)
    node.input[list(node.input).index(table.name)] = other.name


def other_fill(model: onnx.ModelProto) -> None:
    constant_close_to(-10000.0, -1000.0)(model)


@pytest.mark.parametrize(
    ("graph", "change", "told"),
    [
        ("glm_block_1", doubled_layer_scale, "layer_scale"),
        ("glm_block_0", other_fill, "the constant"),
        ("glm_block_1", other_epsilon, "the node LayerNormalization_0 differs"),
        ("lm", other_epsilon, "the node LayerNormalization"),
        ("glm_block_0", constant_close_to(0.044715, 0.0447), "the constant"),
    ],
)
def test_constants_that_prompts_do_not_show(check, small_copy, graph, change, told):
    edit(small_copy, f"{graph}.onnx", change)
    (row,) = [row for row in check(small_copy, steps=1).failures if row.case == "structure"]
    assert row.graph == graph
    assert "is not what a fresh trace gives" in row.detail
    assert told in row.detail


def test_a_decoy_weight(check, small_copy):
    edit(small_copy, "embedding.onnx", decoy_embedding)
    (row,) = check(small_copy, steps=1).failures
    assert (row.graph, row.case) == ("embedding", "lint")
    assert "transformer.word_embeddings.weight, which no node reads" in row.detail


def test_frequencies_are_compared_bit_for_bit(check, small_copy):
    edit_weight(small_copy, "glm_block_1", "inv_freq", flip_low_bit)
    (row,) = check(small_copy, steps=1).failures
    assert (row.graph, row.case) == ("glm_block_1", "structure")
    assert "inv_freq does not hold the patch's values" in row.detail


def edit_manifest(bundle: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    change(manifest)
    write_manifest(bundle, manifest)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.update(tied=True), "tied is True"),
        (lambda m: m["graphs"][1].update(parameters=5), "parameters of glm_block_0"),
        (lambda m: m["graphs"][1]["operators"].update(If=1), "operators of glm_block_0"),
        (lambda m: m["graphs"][1]["inputs"][0].update(dtype="float16"), "inputs of glm_block_0"),
        (lambda m: m["graphs"][2].update(transposed=[]), "transposed of glm_block_1"),
        (lambda m: m.update(tokenizer=["ice_text.model"]), "tokenizer is ['ice_text.model']"),
    ],
)
def test_a_manifest_that_says_what_is_not(check, small_copy, change, told):
    edit_manifest(small_copy, change)
    failures = check(small_copy, steps=1).failures
    assert told in " ".join(row.detail for row in failures)


def test_a_listed_file_that_belongs_to_nothing(check, small_copy):
    shutil.copy(small_copy / "glm_block_0.onnx", small_copy / "glm_block_2.onnx")
    record_again(small_copy, "glm_block_2.onnx")
    (row,) = check(small_copy, steps=1).failures
    assert row.case == "manifest"
    assert "glm_block_2.onnx belongs to no graph" in row.detail


def test_another_tokenizer(check, golden_bundle, golden_checkpoint, tmp_path):
    copy = shutil.copytree(golden_bundle, tmp_path / "bundle")
    with (copy / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    record_again(copy, "tokenizer_config.json")
    with open_checkpoint(golden_checkpoint) as source:
        failures = verify(open_bundle(copy), source, steps=1).failures
    assert [row.detail for row in failures] == ["tokenizer_config.json is not what the checkpoint gives."]


def test_a_bundle_of_other_tool_versions_is_not_held_to_a_fresh_trace(check, small_copy):
    """Another exporter may write another graph of the same model; the numbers are compared all the same."""
    edit_manifest(small_copy, lambda manifest: manifest["tools"].update(onnxsim="0.0"))
    edit(small_copy, "glm_block_1.onnx", doubled_layer_scale)
    report = check(small_copy, steps=1)
    assert report.passed
    (row,) = [row for row in report.rows if row.case == "structure"]
    assert "made with other versions of onnxsim" in row.detail


@pytest.mark.parametrize("offset", [128, -1000])
def test_a_token_that_is_no_token(check, small_checkpoint, tmp_path, offset):
    """onnxruntime's Gather takes negative ids, and numpy would count them as greedy."""
    bundle = tmp_path / "bundle"
    split_directory(small_checkpoint, bundle, argmax="only")

    def change(model: onnx.ModelProto) -> None:
        producer = next(node for node in model.graph.node if "token_id" in node.output)
        producer.output[list(producer.output).index("token_id")] = "true_id"
        more = add_constant(model, "more", np.array(offset, np.int64))
        model.graph.node.append(onnx.helper.make_node("Add", ["true_id", more], ["token_id"]))

    edit(bundle, "lm.onnx", change)
    failures = check(bundle, steps=1).failures
    assert any("expected 1 ids from 0 to 127" in row.detail for row in failures)


def test_a_checkpoint_with_nan_fails_and_says_why(check, small_checkpoint, tmp_path):
    source = shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    tensors = torch.load(source / "pytorch_model.bin")
    tensors["transformer.layers.1.attention.dense.bias"][3] = torch.nan
    torch.save(tensors, source / "pytorch_model.bin")
    (notice,) = (text for text in split_directory(source, tmp_path / "bundle") if "NaN" in text)
    assert "transformer.layers.1.attention.dense.bias" in notice
    with open_checkpoint(source) as opened:
        report = verify(open_bundle(tmp_path / "bundle"), opened, steps=1)
    assert not report.passed
    assert {row.graph for row in report.failures} == {"glm_block_1", "lm", "chain"}
    assert all("the reference's own numbers are not finite" in row.detail for row in report.failures)


def test_a_head_that_differs_in_the_sign_of_a_zero_is_tied_for_both(tmp_path):
    """Split and verify ask the same question the same way; digests of the bytes would say no, numbers say yes."""
    source = write_checkpoint(tmp_path / "checkpoint", tokenizer=False, tied=True, seed=3)
    tensors = torch.load(source / "pytorch_model.bin")
    tensors["transformer.word_embeddings.weight"][5, 7] = 0.0
    tensors["lm_head.weight"][5, 7] = -0.0
    torch.save(tensors, source / "pytorch_model.bin")
    split_directory(source, tmp_path / "bundle")
    with open_checkpoint(source) as opened:
        bundle = open_bundle(tmp_path / "bundle")
        assert bundle.manifest["tied"] is True
        assert verify(bundle, opened, steps=1).passed
