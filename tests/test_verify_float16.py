"""What `verify` says of float16 bundles: errors against float16's own, and how near they are to overflow."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from checkpoints import write_checkpoint
from conftest import record_again, split_directory
from derived_bundles import glmexport, place_of, rewrite
from onnx.reference import ReferenceEvaluator

from glmexport.bundle import open_bundle
from glmexport.checkpoint import open_checkpoint
from glmexport.models.chatglm_6b import build_reference, run_reference_block
from glmexport.onnx_files import load_graph
from glmexport.verify import verify
from glmexport.verify.overflow import LARGEST, OverflowProbe, Peak, float32_twin
from glmexport.verify.runs import feeds

FLOAT16 = "float16"
BLOCKS = 8
STRONG = 223.0
"""Query and key of this size everywhere: q·k / sqrt(16) is near 200000, which a guard of 8 brings to 25000."""


@pytest.fixture(scope="module")
def half(shared, golden_checkpoint):
    return shared("half", lambda path: split_directory(golden_checkpoint, path, opset=17, dtype=FLOAT16))


def report_of(bundle, checkpoint, steps=1):
    with open_checkpoint(checkpoint) as source:
        return verify(open_bundle(bundle), source, steps=steps)


def rows_of(report, case):
    return {row.graph: row for row in report.rows if row.case == case}


def failed(report):
    return {(row.graph, row.case) for row in report.failures}


def changed_checkpoint(directory, changes, **sizes):
    """A tiny checkpoint with tensors set to a number or scaled by a function: name of a tensor -> change."""
    write_checkpoint(directory, tokenizer=False, **sizes)
    tensors = torch.load(directory / "pytorch_model.bin")
    for name, change in changes.items():
        change(tensors[f"transformer.layers.{name}"])
    torch.save(tensors, directory / "pytorch_model.bin")
    return directory


def change_graph(bundle, graph, change):
    path = bundle / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    record_again(bundle, path.name)


# Numbers


def test_it_passes_and_says_what_it_is_held_to(half, golden_checkpoint):
    report = report_of(half, golden_checkpoint, steps=3)
    assert report.passed, report.failures
    assert report.form == "float16"
    for row in report.rows:
        if row.graph.startswith("glm_block") and row.max_abs_error is not None:
            assert row.detail.startswith("float16 alone gives ")
            alone = float(row.detail.split()[3])
            assert 0 < row.relative_error <= 2 * alone < 3e-3
    assert report.greedy[0] == report.greedy[1] == 4 * 7


def test_a_constant_that_is_a_little_off_is_found_by_the_numbers_too(half, golden_checkpoint, tmp_path):
    """0.4 % more of the residual: 30 times what rounding does to that constant."""
    copy = shutil.copytree(half, tmp_path / "copy")

    def scale(model):
        (alpha,) = [
            tensor
            for tensor in model.graph.initializer
            if not tensor.dims and onnx.numpy_helper.to_array(tensor).item() == np.float16(56**0.5)
        ]
        alpha.CopyFrom(onnx.numpy_helper.from_array(np.array(56**0.5 * 1.004, np.float16), alpha.name))

    change_graph(copy, "glm_block_1", scale)
    wrong = failed(report_of(copy, golden_checkpoint))
    assert {("glm_block_1", "structure"), ("glm_block_1", "long"), ("glm_block_1", "batch")} <= wrong
    assert not {graph for graph, _ in wrong} & {"glm_block_0", "glm_block_2", "lm", "embedding"}


def test_another_guard_is_found_by_the_structure(half, golden_checkpoint, tmp_path):
    """It cancels, so no number tells."""
    copy = shutil.copytree(half, tmp_path / "copy")
    change_graph(copy, "glm_block_2", set_guard(1.0))
    assert failed(report_of(copy, golden_checkpoint)) == {("glm_block_2", "structure")}


def test_one_wrong_bit_of_a_weight_is_found(half, golden_checkpoint, tmp_path):
    copy = shutil.copytree(half, tmp_path / "copy")
    place = place_of(copy, "glm_block_1", "mlp.dense_4h_to_h.weight")
    rewrite(place, bytes([place.read()[0] ^ 1]) + place.read()[1:])
    record_again(copy, "glm_block_1.onnx.data")
    report = report_of(copy, golden_checkpoint)
    assert failed(report) == {("glm_block_1", "weights")}
    assert "dense_4h_to_h.weight" in report.failures[0].detail


def test_a_block_of_a_float32_bundle_is_found(half, quick_bundle, golden_checkpoint, tmp_path):
    copy = shutil.copytree(half, tmp_path / "copy")
    for suffix in ("onnx", "onnx.data"):
        shutil.copyfile(quick_bundle / f"glm_block_0.{suffix}", copy / f"glm_block_0.{suffix}")
        record_again(copy, f"glm_block_0.{suffix}")
    report = report_of(copy, golden_checkpoint)
    assert failed(report) == {("glm_block_0", "lint")}
    assert "expected inputs_embeds float16" in report.failures[0].detail


# Overflow


def set_guard(value):
    def change(model):
        (guard,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith("layer_scale")]
        guard.CopyFrom(onnx.numpy_helper.from_array(np.full((1, 1, 1, 1), value, np.float32), guard.name))

    return change


@pytest.fixture(scope="module")
def strong_checkpoint(shared):
    """Queries and keys of the last block so large that only its guard keeps their products within float16."""

    def strengthen(bias):
        heads = bias.view(2, 3, 16)
        heads[:, :2] = STRONG

    changes = {f"{BLOCKS - 1}.attention.query_key_value.bias": strengthen}
    return shared("strong", lambda path: changed_checkpoint(path, changes, num_blocks=BLOCKS))


@pytest.fixture(scope="module")
def strong(shared, strong_checkpoint):
    return shared("strong-half", lambda path: split_directory(strong_checkpoint, path, opset=17, dtype=FLOAT16))


def test_the_guard_keeps_large_scores_within_float16(strong, strong_checkpoint):
    report = report_of(strong, strong_checkpoint)
    assert report.passed, report.failures
    row = rows_of(report, "overflow")[f"glm_block_{BLOCKS - 1}"]
    assert 2 < row.headroom < 3
    assert row.detail.startswith(f"headroom {row.headroom:.3g}, which is little (less than 4): at most 2")
    assert row.detail.endswith(", in attention scores")
    assert all(rows_of(report, "overflow")[f"glm_block_{i}"].headroom > 100 for i in range(BLOCKS - 1))
    assert rows_of(report, "overflow")["all"].detail.endswith("in glm_block_7: attention scores")


def block_inputs(config):
    hidden = torch.randn(5, 1, config.hidden_size, generator=torch.Generator().manual_seed(0))
    places = torch.arange(5).repeat(1, 2, 1)
    past = torch.zeros(2, 0, 1, config.num_heads, config.head_dim)
    return hidden, torch.zeros(1, 1, 5, 5, dtype=torch.bool), places, past


def test_without_the_guard_the_probe_finds_the_overflow_and_torch_the_nan(strong, strong_checkpoint, tmp_path):
    copy = shutil.copytree(strong, tmp_path / "copy")
    name = f"glm_block_{BLOCKS - 1}"
    change_graph(copy, name, set_guard(1.0))
    opened = open_bundle(copy)
    inputs = block_inputs(opened.config)
    peaks = []
    for bundle in (open_bundle(strong), opened):
        probe = OverflowProbe(bundle, name)
        probe.run(feeds(inputs, "float32"))
        peaks.append(probe.peak)
    guarded, bare = peaks
    assert guarded.fits
    assert not bare.fits
    assert guarded.place == bare.place == "attention scores"
    assert bare.largest == pytest.approx(BLOCKS * guarded.largest, rel=1e-4)
    assert str(bare).startswith("float16 overflows in attention scores: ")

    with np.errstate(over="ignore", invalid="ignore"):
        for bundle, finite in ((strong, True), (copy, False)):  # each operator in float16, as onnx's evaluator does it
            evaluator = ReferenceEvaluator(onnx.load(bundle / f"{name}.onnx"))
            assert np.isfinite(evaluator.run(None, feeds(inputs, FLOAT16))[0]).all() == finite

    model = build_reference(opened.config)
    model.load_state_dict(torch.load(strong_checkpoint / "pytorch_model.bin"), strict=False)
    block = model.transformer.layers[-1].half()
    halves = [tensor.half() if tensor.is_floating_point() else tensor for tensor in inputs]
    with torch.inference_mode():
        assert run_reference_block(block, BLOCKS - 1, *halves)[0].isfinite().all()
        block.attention.core_attention.layer_id = 0
        assert run_reference_block(block, BLOCKS - 1, *halves)[0].isnan().any()


def test_an_mlp_that_overflows_fails_in_one_sentence(tmp_path):
    checkpoint = changed_checkpoint(
        tmp_path / "checkpoint",
        {
            "1.mlp.dense_h_to_4h.bias": lambda bias: bias.fill_(9000),
            "1.mlp.dense_4h_to_h.weight": lambda weight: weight.fill_(1),  # 64 times the inner 9000
        },
    )
    split_directory(checkpoint, tmp_path / "bundle", opset=17, dtype=FLOAT16)
    report = report_of(tmp_path / "bundle", checkpoint)
    rows = rows_of(report, "overflow")
    assert not report.passed
    assert not rows["glm_block_1"].passed
    assert rows["glm_block_1"].detail == (
        "float16 overflows in mlp.dense_4h_to_h: 5.76e+05 is reached, 65504 is the largest"
    )
    assert rows["glm_block_0"].passed
    assert not rows["all"].passed
    assert "glm_block_1: mlp.dense_4h_to_h" in rows["all"].detail

    arguments = ("--steps", 1, "--json", tmp_path / "report.json", "-q")
    result = glmexport("verify", tmp_path / "bundle", checkpoint, *arguments)
    assert result.status == 1
    document = json.loads((tmp_path / "report.json").read_text("utf-8"))
    (row,) = [row for row in document["rows"] if (row["graph"], row["case"]) == ("glm_block_1", "overflow")]
    assert not row["passed"]
    assert row["headroom"] == pytest.approx(65504 / 576000, rel=0.01)
    assert "overflows in mlp.dense_4h_to_h" in " ".join(result.stdout.split())


def test_what_a_tanh_absorbs_may_overflow(tmp_path):
    """The square of 400 times itself is beyond float16, and the GELU of 400 is 400."""
    checkpoint = changed_checkpoint(
        tmp_path / "checkpoint", {"1.mlp.dense_h_to_4h.bias": lambda bias: bias[:20].fill_(400)}
    )
    split_directory(checkpoint, tmp_path / "bundle", opset=17, dtype=FLOAT16)
    report = report_of(tmp_path / "bundle", checkpoint)
    assert report.passed, report.failures
    assert 50 < rows_of(report, "overflow")["glm_block_1"].headroom < 165


def test_the_table_and_the_json_show_it(half, golden_checkpoint, tmp_path):
    result = glmexport("verify", half, golden_checkpoint, "-q", "--steps", 1, "--json", tmp_path / "report.json")
    assert result.status == 0
    assert "headroom" in result.stdout
    rows = json.loads((tmp_path / "report.json").read_text("utf-8"))["rows"]
    by_graph = {row["graph"]: row["headroom"] for row in rows if row["case"] == "overflow"}
    assert [*by_graph] == ["glm_block_0", "glm_block_1", "glm_block_2", "lm", "all"]
    assert by_graph["all"] == min(by_graph.values()) > 500
    assert all(row["headroom"] is None for row in rows if row["case"] != "overflow")


@pytest.mark.parametrize(
    "opset", [14, 17, pytest.param(18, marks=pytest.mark.slow), pytest.param(24, marks=pytest.mark.slow)]
)
def test_every_computed_value_is_watched(golden_checkpoint, half, tmp_path, opset):
    """Whatever exporter and opset: products, sums and norms, by their module's name, and nothing a Tanh absorbs."""
    bundle = half
    if opset != 17:
        bundle = tmp_path / "bundle"
        split_directory(golden_checkpoint, bundle, opset=opset, dtype=FLOAT16)
    model = load_graph(bundle / "glm_block_1.onnx")
    products = sum(node.op_type == "MatMul" for node in model.graph.node)
    places = [*float32_twin(model).values()]
    assert {tensor.data_type for tensor in model.graph.initializer if not tensor.dims} <= {1, 7}
    modules = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert [places.count(module) for module in modules] == [2, 2, 2, 2], "the product, and with its bias"
    assert [places.count(place) for place in ("attention scores", "attention context")] == [1, 1]
    assert products == 6
    assert sum(place == "Mul after mlp.dense_h_to_4h" for place in places) == 2, "x / 2, and that times 1 + tanh"


def test_the_twin_gives_the_largest_value_there_is(half, golden_checkpoint):
    """Against the unpatched reference, whose submodules are watched."""
    bundle = open_bundle(half)
    with open_checkpoint(golden_checkpoint) as source:
        model = build_reference(source.config)
        names = [name for name, _ in model.named_parameters()]
        model.load_state_dict({name: source.read(name).float() for name in names}, strict=False)
    block, seen = model.transformer.layers[1], []
    for module in block.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.register_forward_hook(lambda *arguments: seen.append(float(arguments[-1].abs().max())))
    inputs = block_inputs(bundle.config)
    with torch.inference_mode():
        seen.append(float(run_reference_block(block, 1, *inputs)[0].abs().max()))
    probe = OverflowProbe(bundle, "glm_block_1")
    probe.run(feeds(inputs, "float32"))
    assert probe.peak.largest >= max(seen) * 0.999
    assert probe.peak.largest <= 8 * max(seen)


def test_peaks():
    low, high, none = Peak(10.0, "a"), Peak(LARGEST * 2, "b"), Peak(float("nan"), "c")
    assert low.then(high) is high.then(low) is high
    assert low.then(none) is none.then(low) is none
    assert high.then(none) is high, "the first that overflows is the cause"
    assert low.fits
    assert not high.fits
    assert not none.fits
    assert Peak().headroom == float("inf")
    assert str(low) == "headroom 6550: at most 10, in a"
