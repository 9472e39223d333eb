"""Verification of graphs that write into their KV cache: every form passes, and whatever is changed in `ort/` fails."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import record_again, split_directory
from derived_bundles import OPSET, derived, glmexport, odd_checkpoint, quantize_pass
from flavor_bundles import flavor_bundle, manifest_with
from torch import nn

from glmexport import names
from glmexport.bundle import open_bundle
from glmexport.checkpoint import open_checkpoint
from glmexport.config import ModelConfig, SpecialIds
from glmexport.equivalence import check_patch
from glmexport.errors import ExportError
from glmexport.export_ops import attend, dynamo_translations, write_cache
from glmexport.form import RAW, SHARED, EmbeddingForm
from glmexport.models import chatglm_6b as reference
from glmexport.passes.half_weights import HalfWeightsPass
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.passes.slim_vocab import SlimPass
from glmexport.patch import Transform
from glmexport.patches import _in_place
from glmexport.patches._modules import replace_modules
from glmexport.patches.chatglm_6b import CHATGLM_6B
from glmexport.verify import Report, progress_total, verify
from glmexport.verify.twins import Twins

CASES = ("shortest", "short", "long", "infill", "batch", "last positions")
IN_ORT = {f"{case}, ort" for case in CASES}
BF16, SHARE = EmbedPass(EmbeddingForm(RAW, "bfloat16")), EmbedPass(EmbeddingForm(SHARED))
FORMS = {
    "int8": (quantize_pass(8),),
    "int4": (quantize_pass(4),),
    "int4 128 asymmetric": (quantize_pass(4, 128, symmetric=False, head=4),),
    "float16 weights": (HalfWeightsPass(),),
    "slim raw": (SlimPass(), BF16),
    "all": (SlimPass(), quantize_pass(4, 64), SHARE),
}
LONG = {"int4", "int8", "slim raw"}
"""Forms that others contain."""


@pytest.fixture(scope="module")
def of(shared):
    """`of(flavor)`: the odd checkpoint, split with that `--flavor`; never change it."""
    return lambda flavor: flavor_bundle(shared, flavor)


@pytest.fixture
def copy(of, tmp_path) -> Path:
    """A copy of the bundle with both, to be damaged; each file is one of its own."""
    return shutil.copytree(of("both"), tmp_path / "copy")


@pytest.fixture
def check(shared) -> Callable[..., Report]:
    def run(bundle: Path, steps: int = 1) -> Report:
        with open_checkpoint(odd_checkpoint(shared)) as source:
            return verify(open_bundle(bundle), source, steps=steps)

    return run


def failed(report: Report, graph: str) -> set[str]:
    return {row.case for row in report.failures if row.graph == graph}


def told(report: Report) -> str:
    return " ".join(row.detail for row in report.failures)


# What is right


def assert_passes(report: Report, flavors: tuple[str, ...]) -> None:
    assert report.failures == []
    seen = {(row.graph, row.case) for row in report.rows}
    cases = {f"{case}{', ort' * (flavor == 'ort')}" for case in CASES for flavor in flavors}
    assert seen >= {(graph, case) for graph in ("glm_block_0", "glm_block_1", "lm", "chain") for case in cases}
    assert ("ort" in flavors) == bool({case for _, case in seen} & IN_ORT)
    assert report.greedy[0] <= report.greedy[1] == len(flavors) * 7 * 2


@pytest.mark.parametrize("flavor", ["both", "ort"])
def test_a_good_bundle_passes(check, of, flavor):
    report = check(of(flavor))
    assert_passes(report, ("portable", "ort") if flavor == "both" else ("ort",))
    assert report.greedy[0] == report.greedy[1]
    assert report.worst < 1e-4
    (lint,) = (row for row in report.rows if row.case == "lint")
    assert lint.detail == f"{8 if flavor == 'both' else 4} graphs keep every rule"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in FORMS])
def test_every_form_passes_in_both_flavors(check, of, tmp_path, name):
    derived(of("both"), tmp_path / "made", *FORMS[name])
    assert_passes(check(tmp_path / "made"), ("portable", "ort"))


def test_a_form_passes_where_there_is_no_portable_graph(check, of, tmp_path):
    derived(of("ort"), tmp_path / "made", *FORMS["all"])
    assert_passes(check(tmp_path / "made"), ("ort",))


@pytest.mark.slow
def test_the_standard_s_operators_pass_in_both_flavors(check, of, tmp_path):
    derived(of("both"), tmp_path / "made", quantize_pass(4, 64, "qdq"))
    assert_passes(check(tmp_path / "made"), ("portable", "ort"))


@pytest.mark.parametrize("argmax", [pytest.param("also", marks=pytest.mark.slow), "only"])
def test_heads_that_give_the_greedy_token_pass(check, shared, tmp_path, argmax):
    split_directory(odd_checkpoint(shared), tmp_path / "made", opset=OPSET, argmax=argmax, flavor="ort")
    report = check(tmp_path / "made")
    assert_passes(report, ("ort",))
    assert report.greedy[0] == report.greedy[1]


def test_progress_is_told_as_often_as_promised(of, shared):
    for flavor in ("both", "ort"):
        opened, times = open_bundle(of(flavor)), list[str]()
        with open_checkpoint(odd_checkpoint(shared)) as source:
            verify(opened, source, steps=1, advance=times.append)
        assert len(times) == progress_total(opened, 1)


def test_the_command_verifies_both(of, shared):
    done = glmexport("verify", of("both"), odd_checkpoint(shared), "--steps", "1", "-q")
    assert (done.status, done.stderr) == (0, "")
    assert "batch, ort" in done.stdout


# What is wrong in ort/: sizes and hashes in the manifest are made to fit


def edit(bundle: Path, graph: str, change: Callable[[onnx.ModelProto], None]) -> None:
    path = bundle / "ort" / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    record_again(bundle, f"ort/{graph}.onnx")


def node_of(model: onnx.ModelProto, kind: str, number: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == kind][number]


def replace_everywhere(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def sine_for_cosine(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.op_type = {"Sin": "Cos", "Cos": "Sin"}.get(node.op_type, node.op_type)


def mask_as_it_is(model: onnx.ModelProto) -> None:
    node = node_of(model, "Not")
    replace_everywhere(model, node.output[0], node.input[0])
    model.graph.node.remove(node)


def set_attribute(node: onnx.NodeProto, name: str, value: object) -> None:
    others = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*others, onnx.helper.make_attribute(name, value)])


def another_scale(model: onnx.ModelProto) -> None:
    set_attribute(node_of(model, "Attention"), "scale", 0.2)


def causal(model: onnx.ModelProto) -> None:
    set_attribute(node_of(model, "Attention"), "is_causal", 1)


def values_as_keys(model: onnx.ModelProto) -> None:
    node = node_of(model, "Attention")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def caches_exchanged(model: onnx.ModelProto) -> None:
    """In and out: the block alone stays consistent."""
    first, second = (node_of(model, "TensorScatter", number) for number in range(2))
    first.input[0], second.input[0] = second.input[0], first.input[0]
    outputs = first.output[0], second.output[0]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name in outputs:
                node.input[i] = outputs[1 - outputs.index(name)]
    first.input[1], second.input[1] = second.input[1], first.input[1]


def exact_gelu(model: onnx.ModelProto) -> None:
    del node_of(model, "Gelu").attribute[:]


def other_epsilon(model: onnx.ModelProto) -> None:
    set_attribute(node_of(model, "LayerNormalization"), "epsilon", 1e-3)


def circular(model: onnx.ModelProto) -> None:
    set_attribute(node_of(model, "TensorScatter"), "mode", "circular")


CHANGES = {
    "sine for cosine": sine_for_cosine,
    "mask as it is": mask_as_it_is,
    "another scale": another_scale,
    "causal": causal,
    "values as keys": values_as_keys,
    "caches exchanged": caches_exchanged,
}
ALIKE = {"exact gelu": exact_gelu, "other epsilon": other_epsilon, "circular": circular}
"""Nothing that numbers of this model show."""


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_graph_fails_in_its_numbers(check, copy, name):
    edit(copy, "glm_block_1", CHANGES[name])
    report = check(copy)
    assert failed(report, "glm_block_1") & IN_ORT
    assert failed(report, "glm_block_1") <= IN_ORT | {"structure"}, "the portable graph is as it was"
    assert "structure" in failed(report, "glm_block_1")
    assert failed(report, "glm_block_0") == set()


@pytest.mark.parametrize("name", ALIKE)
def test_a_changed_graph_that_gives_the_same_numbers_fails_in_its_structure(check, copy, name):
    edit(copy, "glm_block_1", ALIKE[name])
    assert {(row.graph, row.case) for row in check(copy).failures} == {("glm_block_1", "structure")}


@pytest.mark.parametrize("change", [sine_for_cosine, causal, values_as_keys])
def test_a_changed_graph_of_coarse_weights_fails_beside_its_twin(check, of, tmp_path, change):
    """What 20 % of a budget for 4 bits would hide."""
    derived(of("both"), tmp_path / "made", quantize_pass(4, "channel"))
    good = [row for row in check(tmp_path / "made").rows if row.case == "flavors"]
    assert [(row.graph, row.passed) for row in good] == [("glm_block_0", True), ("glm_block_1", True)]
    assert all(0 < row.relative_error < 1e-3 for row in good)
    edit(tmp_path / "made", "glm_block_1", change)
    report = check(tmp_path / "made")
    assert "flavors" in failed(report, "glm_block_1")
    assert "flavors" not in failed(report, "glm_block_0")


def test_flavors_that_were_never_given_the_same_inputs_do_not_pass():
    assert not Twins("glm_block_0", "float32").row().passed


def test_the_first_place_instead_of_the_last_fails(check, copy):
    def first_place(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            value = None if tensor.external_data else onnx.numpy_helper.to_array(tensor)
            if value is not None and value.dtype == np.int64 and value.size == 1 and value.item() == -1:
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(value), tensor.name))
                return
        raise AssertionError

    edit(copy, "lm", first_place)
    report = check(copy)
    assert failed(report, "lm") <= IN_ORT | {"structure"}
    assert failed(report, "lm") >= {"structure"}


def test_weights_of_another_block_fail(check, copy):
    """Graph and data of block 0 under the names of block 1."""
    for suffix in (".onnx.data", ".onnx"):
        content = (copy / f"ort/glm_block_0{suffix}").read_bytes()
        if suffix == ".onnx":
            content = content.replace(b"glm_block_0", b"glm_block_1").replace(b"layers.0", b"layers.1")
        (copy / f"ort/glm_block_1{suffix}").write_bytes(content)
        record_again(copy, f"ort/glm_block_1{suffix}")
    report = check(copy)
    assert not report.passed
    assert failed(report, "glm_block_0") == set()


def test_two_weights_at_each_other_s_place_fail(check, copy):
    """Of one shape, so that nothing but the offsets tells."""

    def exchange(model: onnx.ModelProto) -> None:
        ends = ("input_layernorm.weight", "post_attention_layernorm.weight")
        first, second = (next(t for t in model.graph.initializer if t.name.endswith(end)) for end in ends)
        places = [list(tensor.external_data) for tensor in (first, second)]
        copies = [[onnx.StringStringEntryProto(key=e.key, value=e.value) for e in place] for place in places]
        for tensor, place in zip((first, second), reversed(copies), strict=True):
            del tensor.external_data[:]
            tensor.external_data.extend(place)

    edit(copy, "glm_block_1", exchange)
    report = check(copy)
    assert failed(report, "glm_block_1") & IN_ORT
    assert "structure" in failed(report, "glm_block_1")
    assert "from another place than glm_block_1.onnx does" in told(report)
    assert failed(report, "glm_block_0") == set()


@pytest.mark.parametrize(
    ("name", "bit"), [("glm_block_0", 0), ("glm_block_1", 31), ("embedding", 0), ("embedding", 31), ("lm", 0)]
)
def test_data_that_differs_from_the_portable_s_fails(check, copy, name, bit):
    """By one bit, the lowest of a number or its sign; both manifests' hashes fit."""
    path = copy / "ort" / f"{name}.onnx.data"
    values = np.fromfile(path, np.uint32)
    values[len(values) // 3] ^= np.uint32(1 << bit)
    path.write_bytes(values.tobytes())
    record_again(copy, f"ort/{name}.onnx.data")
    report = check(copy)
    assert not report.passed
    assert f"ort/{name}.onnx.data" in told(report)


def test_data_that_differs_fails_where_only_passes_made_it(check, of, tmp_path):
    derived(of("both"), tmp_path / "made", quantize_pass(4))
    path = tmp_path / "made" / "ort" / "glm_block_1.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    record_again(tmp_path / "made", "ort/glm_block_1.onnx.data")
    report = check(tmp_path / "made")
    assert not report.passed
    assert "ort/glm_block_1.onnx.data" in told(report)


@pytest.mark.parametrize("name", ["ort/glm_block_0.onnx", "ort/lm.onnx.data"])
def test_a_missing_file_fails(check, copy, name):
    (copy / name).unlink()
    report = check(copy)
    assert [(row.graph, row.case) for row in report.failures] == [(name, "files")]


def test_a_file_too_many_fails_listed_or_not(check, copy):
    (copy / "ort" / "more.bin").write_bytes(b"more")
    report = check(copy)
    assert [(row.graph, row.case) for row in report.failures] == [("ort/more.bin", "files")]

    record_again(copy, "ort/more.bin")
    report = check(copy)
    assert failed(report, "all") == {"manifest"}
    assert "ort/more.bin belongs to no graph" in told(report)


@pytest.mark.parametrize("key", ["inputs", "outputs", "operators"])
def test_what_the_manifest_says_of_it_must_be_so(check, copy, key):
    manifest_with(copy, lambda manifest: manifest["graphs"][1]["ort"].update({key: manifest["graphs"][1][key]}))
    report = check(copy)
    assert failed(report, "glm_block_0") == {"structure"}


def test_another_opset_in_it_fails(check, copy):
    def lower(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 23

    edit(copy, "lm", lower)
    assert "lint" in failed(check(copy), "lm")


# Transforms

CONFIG = ModelConfig("chatglm-6b", 64, 48, 2, 3, 80, 2048, 1e-5, 0, SpecialIds(50, 51, 54, 55, 3, 5))


class OtherWay(_in_place.BatchFirstRotary2D):
    def _turn(self, states, cos, sin):
        return super()._turn(states, cos, -sin)


class SwappedPositions(_in_place.BatchFirstRotary2D):
    def forward(self, query, key, position_ids):
        return super().forward(query, key, position_ids.flip(1))


class KeysOnly(_in_place.BatchFirstRotary2D):
    def forward(self, query, key, position_ids):
        return query, super().forward(query, key, position_ids)[1]


class ShowingMask(_in_place.InPlaceAttention):
    def forward(self, hidden_states, position_ids, attention_mask, cache):
        return super().forward(hidden_states, position_ids, ~attention_mask, cache)


class ExchangedCaches(_in_place.InPlaceAttention):
    def forward(self, hidden_states, position_ids, attention_mask, cache):
        indices, keys, values = cache
        out, (keys, values) = super().forward(hidden_states, position_ids, attention_mask, (indices, values, keys))
        return out, (values, keys)


class OnePlaceOn(_in_place.InPlaceAttention):
    def forward(self, hidden_states, position_ids, attention_mask, cache):
        return super().forward(hidden_states, position_ids, attention_mask, (cache[0] + 1, *cache[1:]))


class ExactGelu(_in_place.GeluMLP):
    def forward(self, hidden_states):
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_states)))


def rotary(kind):
    def make(module):
        return kind(reference.inverse_frequencies(module.head_dim // 2, "cpu"))

    return lambda model: replace_modules(model, reference.RotaryEmbedding2D, make)


BROKEN = {
    "turned the other way": ("batch-first-rotary", rotary(OtherWay)),
    "swapped positions": ("batch-first-rotary", rotary(SwappedPositions)),
    "query not turned": ("batch-first-rotary", rotary(KeysOnly)),
    **{
        name: ("in-place-cache", lambda model, kind=kind: replace_modules(model, reference.SelfAttention, kind))
        for name, kind in {
            "mask that shows": ShowingMask,
            "caches exchanged": ExchangedCaches,
            "one place on": OnePlaceOn,
        }.items()
    },
    "exact gelu": ("gelu", lambda model: replace_modules(model, reference.MLP, ExactGelu)),
}


def test_the_transforms_are_proven_equal():
    assert check_patch(CHATGLM_6B, CONFIG, flavors=names.FLAVORS) <= 1e-5


@pytest.mark.parametrize("slip", BROKEN)
def test_a_broken_transform_is_noticed(slip):
    name, broken = BROKEN[slip]
    transforms = tuple(
        Transform(t.name, t.summary, broken) if t.name == name else t for t in CHATGLM_6B.in_place_transforms
    )
    patch = dataclasses.replace(CHATGLM_6B, in_place_transforms=transforms)
    assert check_patch(patch, CONFIG) <= 1e-5, "the portable flavor is as it was"
    with pytest.raises(
        ExportError, match=rf"The patched chatglm-6b differs from the unpatched one .*{name}.* is wrong"
    ):
        check_patch(patch, CONFIG, flavors=names.FLAVORS)


@pytest.mark.parametrize("operation", ["attend", "write_cache"])
def test_a_broken_operation_is_noticed(operation, monkeypatch):
    def shifted(cache, new, write_indices):
        return write_cache(cache, new.roll(1, dims=2), write_indices)

    def scaled(query, key, value, visible):
        return attend(query * 1.01, key, value, visible)

    monkeypatch.setattr(_in_place, operation, {"attend": scaled, "write_cache": shifted}[operation])
    with pytest.raises(ExportError, match="nothing was exported"):
        check_patch(CHATGLM_6B, CONFIG, flavors=("ort",))


def test_an_architecture_without_such_graphs_says_so():
    patch = dataclasses.replace(CHATGLM_6B, in_place_transforms=())
    with pytest.raises(ExportError, match="chatglm-6b has no graphs of the flavor ort; split it as portable"):
        check_patch(patch, CONFIG, flavors=names.FLAVORS)


def test_custom_operations_equal_their_plain_forms():
    generator = torch.Generator().manual_seed(0)
    cache, new = torch.randn(2, 3, 9, 4, generator=generator), torch.randn(2, 3, 2, 4, generator=generator)
    before = cache.clone()
    written = write_cache(cache, new, torch.tensor([7, 1]))
    assert torch.equal(cache, before)
    assert torch.equal(written[0, :, 7:], new[0])
    assert torch.equal(written[1, :, 1:3], new[1])
    assert torch.equal(written[0, :, :7], before[0, :, :7])
    assert torch.equal(written[1, :, 3:], before[1, :, 3:])
    query = torch.randn(2, 3, 2, 4, generator=generator)
    visible = torch.rand(2, 1, 2, 9, generator=generator) > 0.4
    expected = nn.functional.scaled_dot_product_attention(query, cache, written, visible, scale=1.0)
    torch.testing.assert_close(attend(query, cache, written, visible), expected, atol=1e-6, rtol=1e-5)
    visible[0, 0, 1] = False
    assert not attend(query, cache, written, visible)[0, :, 1].any(), "over nothing it gives 0"
    with torch.device("meta"):
        assert write_cache(torch.empty(2, 3, 9, 4), torch.empty(2, 3, 2, 4), torch.empty(2)).shape == (2, 3, 9, 4)
        assert attend(*(torch.empty(2, 3, size, 4) for size in (2, 9, 9)), torch.empty(2, 1, 2, 9)).shape == (
            2,
            3,
            2,
            4,
        )
    assert len(dynamo_translations()) == 5
