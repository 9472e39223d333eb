"""Bundles whose graphs compute in float16: the signature, the guard, the numbers, and everything that runs them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import write_checkpoint
from conftest import split_directory, write_manifest
from derived_bundles import assert_one_sentence, glmexport, place_of
from onnx.reference import ReferenceEvaluator

import glmexport as api
from glmexport.bundle import open_bundle
from glmexport.checkpoint import open_checkpoint
from glmexport.doctor import bundle_needs
from glmexport.errors import BundleError, ExportError
from glmexport.form import RAW, EmbeddingForm
from glmexport.interface import graph_spec
from glmexport.models.chatglm_6b import MLP, ChatGLMForConditionalGeneration
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.passes.slim_vocab import SlimPass
from glmexport.splitter import SplitOptions
from glmexport.verify import verify

FLOAT16 = "float16"
MINE = 2.0
"""A graph may be so many times as far from the float32 reference as the reference in float16."""


@pytest.fixture(scope="module")
def half(shared, golden_checkpoint):
    return shared("half", lambda path: split_directory(golden_checkpoint, path, opset=17, dtype=FLOAT16))


@pytest.fixture(scope="module")
def references(golden_checkpoint):
    """The unpatched model in float32 and in float16."""
    return tuple(
        ChatGLMForConditionalGeneration.from_pretrained(golden_checkpoint, dtype=dtype).eval()
        for dtype in ("float32", "float16")
    )


@pytest.fixture(scope="module")
def image_checkpoint(shared):
    return shared("images-for-float16", lambda path: write_checkpoint(path, image_tokens=20, tokenizer=True))


def report_of(bundle, checkpoint, steps=1):
    with open_checkpoint(checkpoint) as source:
        return verify(open_bundle(bundle), source, steps=steps)


def failed(report):
    return {(row.graph, row.case) for row in report.failures}


def load(bundle, graph):
    return onnxruntime.InferenceSession(str(bundle / f"{graph}.onnx"), providers=["CPUExecutionProvider"])


def graph_of(bundle, graph):
    return onnx.load(bundle / f"{graph}.onnx", load_external_data=False)


def chain(bundle, ids, mask, positions, pasts):
    """Embedding, blocks and head of a bundle in plain onnxruntime: (last hidden states, logits, pasts)."""
    hidden = load(bundle, "embedding").run(None, {"input_ids": ids})[0]
    presents = []
    for block_id, past in enumerate(pasts):
        hidden, present = load(bundle, f"glm_block_{block_id}").run(
            ["hidden_states", "presents"],
            {"inputs_embeds": hidden, "attention_mask": mask, "position_ids": positions, "past_key_values": past},
        )
        presents.append(present)
    return hidden, load(bundle, "lm").run(["logits"], {"hidden_states": hidden})[0], presents


def off(found, expected):
    found, expected = (np.asarray(values, np.float32) for values in (found, expected))
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# The graphs


def test_every_float_of_the_signature_is_float16(half):
    bundle = open_bundle(half)
    assert bundle.form.dtype == FLOAT16
    assert json.loads((half / "manifest.json").read_text("utf-8"))["dtype"] == FLOAT16
    for entry in bundle.graphs:
        spec = graph_spec(entry["name"], bundle.config, bundle.argmax, FLOAT16)
        session = load(half, entry["name"])
        types = {"float16": "tensor(float16)", "int64": "tensor(int64)", "bool": "tensor(bool)"}
        for found, expected in zip(
            [*session.get_inputs(), *session.get_outputs()], [*spec.inputs, *spec.outputs], strict=True
        ):
            assert (found.name, found.type) == (expected.name, types[expected.dtype])
            assert "float32" not in {expected.dtype}
        assert entry["weights"] == FLOAT16


def test_weights_take_half_and_only_frequencies_and_guards_are_float32(half, quick_bundle):
    ours, theirs = open_bundle(half), open_bundle(quick_bundle)
    assert ours.files["lm.onnx.data"].bytes < 0.52 * theirs.files["lm.onnx.data"].bytes
    for entry in ours.graphs:
        for tensor in graph_of(half, entry["name"]).graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                assert tensor.name.endswith(("inv_freq", "layer_scale")) or not tensor.dims


def test_the_guard_of_each_block_is_its_number(half):
    for block_id in range(3):
        graph = graph_of(half, f"glm_block_{block_id}").graph
        (guard,) = [tensor for tensor in graph.initializer if tensor.name.endswith("layer_scale")]
        assert onnx.numpy_helper.to_array(guard).item() == block_id + 1
        readers = [node.op_type for node in graph.node if guard.name in node.input]
        assert readers == ["Mul", "Mul"], "what divides the query, and what multiplies the scores"


def test_the_softmax_is_float32(half):
    graph = onnx.shape_inference.infer_shapes(graph_of(half, "glm_block_1")).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    (softmax,) = [node for node in graph.node if node.op_type == "Softmax"]
    assert {types[name] for name in (*softmax.input, *softmax.output)} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize(
    "opset", [14, 17, pytest.param(18, marks=pytest.mark.slow), pytest.param(24, marks=pytest.mark.slow)]
)
def test_every_opset_gives_the_references_numbers(opset, golden_checkpoint, half, references, tmp_path):
    """Lengths other than the traced ones, a batch of two, and decoding with real past, in plain onnxruntime."""
    bundle = half
    if opset != 17:
        bundle = tmp_path / "bundle"
        split_directory(golden_checkpoint, bundle, opset=opset, dtype=FLOAT16)
    full, halved = references
    ids = torch.tensor([[371, 1064, 949, 5, 9, 1501, 1504], [3, 3, 20, 31, 77, 1501, 1504]])
    padding = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
    mask, positions = full.get_masks(ids, padding), full.get_position_ids(ids, padding)
    pasts = [np.zeros((2, 0, 2, 4, 16), np.float16)] * 3
    theirs = ours = None
    for step in range(3):
        with torch.inference_mode():
            expected, theirs, _ = full.transformer(ids, positions, mask, theirs)
            rounded, ours, _ = halved.transformer(ids, positions, mask, ours)
            logits, half_logits = full.lm_head(expected)[-1], halved.lm_head(rounded)[-1]
        _, found, pasts = chain(bundle, ids.numpy(), mask.numpy(), positions.numpy(), pasts)
        assert found.dtype == np.float16
        assert off(found, logits) <= MINE * off(half_logits, logits)
        assert off(found, half_logits) < 3e-3, "and near the reference in float16"
        assert pasts[0].shape == (2, 7 + step, 2, 4, 16)
        for past, (key, value), (half_key, half_value) in zip(pasts, theirs, ours, strict=True):
            exact = torch.stack((key, value))
            assert off(past, exact) <= MINE * off(torch.stack((half_key, half_value)), exact) + 2.0**-11
        ids = logits.argmax(-1)[:, None]
        hidden_padding = torch.tensor([[0] * (8 + step), [1, 1] + [0] * (6 + step)], dtype=torch.bool)
        mask = hidden_padding[:, None, None]
        positions = torch.tensor([[[5], [2 + step]], [[3], [2 + step]]])


@pytest.mark.parametrize("opset", [14, 17])
def test_a_runtime_that_rounds_every_result_is_as_near(opset, golden_checkpoint, half, references, tmp_path):
    """onnx's own evaluator computes each operator in float16, where onnxruntime's CPU provider takes float32."""
    bundle = half
    if opset != 17:
        bundle = tmp_path / "bundle"
        split_directory(golden_checkpoint, bundle, opset=opset, dtype=FLOAT16)
    full, halved = (model.transformer.layers[2] for model in references)
    hidden = 3 * torch.randn(6, 1, 64, generator=torch.Generator().manual_seed(0))
    mask, places = torch.zeros(1, 1, 6, 6, dtype=torch.bool).index_fill(3, torch.tensor(5), True), torch.arange(6)
    positions = torch.stack((places, places // 2)).unsqueeze(0)
    evaluator = ReferenceEvaluator(onnx.load(bundle / "glm_block_2.onnx"))
    feeds = {
        "inputs_embeds": hidden.half().numpy(),
        "attention_mask": mask.numpy(),
        "position_ids": positions.numpy(),
        "past_key_values": np.zeros((2, 0, 1, 4, 16), np.float16),
    }
    found = evaluator.run(None, feeds)[0]
    with torch.inference_mode():
        expected = full(hidden, positions, mask)[0]
        rounded = halved(hidden.half(), positions, mask)[0]
    assert found.dtype == np.float16
    assert off(found, expected) <= 1.5 * off(rounded, expected)


@pytest.mark.parametrize("case", ["short", "one", "long"])
def test_the_tokens_are_the_originals(half, golden, case):
    with api.Session(half, threads=1) as session:
        answer = api.generate(session, golden[f"{case}.input_ids"][0].tolist(), greedy=True, max_tokens=8)
        assert answer.text is not None
        expected = golden[f"{case}.greedy"].reshape(-1).tolist()
        assert answer.ids[: len(expected)] == expected[:8]


def test_large_numbers_give_no_nan(half):
    """What the GELU squares overflows from 256 on: tanh of infinity is 1."""
    model = onnx.shape_inference.infer_shapes(graph_of(half, "glm_block_0"))

    def node_reading(weight):
        return next(node for node in model.graph.node if any(name.endswith(weight) for name in node.input))

    source = node_reading("dense_h_to_4h.bias").output[0]
    target = node_reading("dense_4h_to_h.weight").input[0]
    activation = onnx.utils.Extractor(model).extract_model([source], [target])
    values = [-60000, -300, -256, -1, -0.0, 0, 1e-7, 1, 256, 300, 60000] + [0] * 245
    x = np.array(values, np.float16).reshape(1, 1, -1)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(activation.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {source: x})[0]
    exact = x.astype(np.float64)
    expected = 0.5 * exact * (1 + np.tanh(0.7978845608 * exact * (1 + 0.044715 * exact * exact)))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)
    assert np.isfinite(MLP.activation(None, torch.from_numpy(x)).numpy()).all(), "nor in torch's float16"


# What is refused, and what is said


def test_weights_beyond_float16_are_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer=False, dtype=torch.bfloat16)
    change_tensor(checkpoint, "transformer.layers.1.mlp.dense_4h_to_h.weight", lambda tensor: tensor[3].fill_(70000))
    result = glmexport("split", checkpoint, "-o", tmp_path / "out", "--dtype", "float16", "--opset", 17)
    assert_one_sentence(result, "transformer.layers.1.mlp.dense_4h_to_h.weight holds 70144.0", "65504")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(("dtype", "rounds"), [(torch.float16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_rounding_is_to_the_nearest_and_said(tmp_path, dtype, rounds):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer=False, dtype=dtype)
    notices = split_directory(checkpoint, tmp_path / "out", opset=17, dtype=FLOAT16)
    assert any("rounded to the nearest float16" in notice for notice in notices) is rounds
    report = report_of(tmp_path / "out", checkpoint)
    assert report.passed, report.failures
    name = "transformer.layers.1.attention.dense.weight"
    stored = place_of(tmp_path / "out", "glm_block_1", name).read()
    expected = torch.load(checkpoint / "pytorch_model.bin")[name].half().t().numpy()
    assert stored == expected.tobytes()


def test_nan_is_exported_as_it_is(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer=False, dtype=torch.float32)
    change_tensor(checkpoint, "transformer.layers.0.mlp.dense_h_to_4h.bias", lambda bias: bias[:1].fill_(float("nan")))
    notices = split_directory(checkpoint, tmp_path / "out", opset=17, dtype=FLOAT16)
    assert any("NaN or infinite" in notice for notice in notices)
    assert not report_of(tmp_path / "out", checkpoint).passed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--quantize", "int4"), "quantized products are made for float32 activations"),
        (("--weights", "float16"), "leave --weights float16 out"),
    ],
)
def test_what_does_not_go_together(golden_checkpoint, tmp_path, options, words):
    result = glmexport("split", golden_checkpoint, "-o", tmp_path / "out", "--dtype", "float16", *options)
    assert_one_sentence(result, words)
    assert not [*tmp_path.iterdir()]


def test_quantize_and_a_dtype_that_is_none_are_refused(half, golden_checkpoint, tmp_path):
    words = "quantized products are made for float32 activations"
    assert_one_sentence(glmexport("quantize", half, "-o", tmp_path / "out", "--bits", 4), words)
    auto = glmexport("quantize", half, "-o", tmp_path / "out", "--auto", "--target-size", "1MB")
    assert_one_sentence(auto, words)
    with pytest.raises(ExportError, match="dtype must be one of float32, float16"):
        api.split(golden_checkpoint, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(ExportError, match="dtype must be one of"):
        SplitOptions(dtype="double")


def test_inspect_and_a_dry_run_say_it(half, golden_checkpoint, tmp_path):
    assert json.loads(glmexport("inspect", half, "--json").stdout)["form"] == "float16"
    assert "float16" in glmexport("inspect", half).stdout
    plan = glmexport("split", golden_checkpoint, "-o", tmp_path / "out", "--dtype", "float16", "--dry-run")
    assert f"{open_bundle(half).files['lm.onnx.data'].bytes:,}" in plan.stdout


def test_a_manifest_of_another_dtype_is_refused_or_found(half, golden_checkpoint, quick_bundle, tmp_path):
    copy = shutil.copytree(half, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    write_manifest(copy, {**manifest, "dtype": "int8"})
    with pytest.raises(BundleError, match="dtype is 'int8', expected one of float32, float16"):
        open_bundle(copy)
    del manifest["dtype"]
    write_manifest(copy, manifest)
    assert open_bundle(copy).form.dtype == "float32"
    assert ("lm", "lint") in failed(report_of(copy, golden_checkpoint))


# Other forms, and what runs them


@pytest.mark.parametrize("word", ["bfloat16", "float16", "float32"])
def test_slim_with_raw_rows(image_checkpoint, tmp_path, word):
    passes = (SlimPass(), EmbedPass(EmbeddingForm(RAW, word)))
    split_directory(image_checkpoint, tmp_path / "bundle", opset=17, dtype=FLOAT16, passes=passes)
    report = report_of(tmp_path / "bundle", image_checkpoint)
    assert report.passed, report.failures
    with api.Session(tmp_path / "bundle") as session:
        assert session.embed(np.array([[5, 9]])).dtype == np.float16
        answer = api.generate(session, "你好", greedy=True, max_tokens=3)
        assert answer.text is not None
        assert len(answer.ids) == 3


def test_the_passes_afterwards_give_the_same_bytes(image_checkpoint, tmp_path):
    passes = (SlimPass(), EmbedPass(EmbeddingForm(RAW, "bfloat16")))
    split_directory(image_checkpoint, tmp_path / "at once", opset=17, dtype=FLOAT16, passes=passes)
    split_directory(image_checkpoint, tmp_path / "half", opset=17, dtype=FLOAT16)
    assert glmexport("slim", tmp_path / "half", "-o", tmp_path / "slim").status == 0
    assert glmexport("embed", tmp_path / "slim", "-o", tmp_path / "embedded", "--dtype", "bf16").status == 0
    names = sorted(path.name for path in (tmp_path / "at once").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "embedded").iterdir())
    for name in names:
        if name != "manifest.json":
            assert (tmp_path / "at once" / name).read_bytes() == (tmp_path / "embedded" / name).read_bytes(), name


def test_sizes_count_two_bytes_a_number_of_the_cache(half, quick_bundle):
    with api.Session(half) as ours, api.Session(quick_bundle) as theirs:
        assert 2 * ours.kv_bytes(3, 10) == theirs.kv_bytes(3, 10)
        assert ours.empty_past(2).dtype == np.float16
        assert ours.graph_sizes["lm"] == 2 * open_bundle(half).graph_sizes["lm"], "a CPU holds it in float32"
        assert ours.graph_sizes["embedding"] == open_bundle(half).graph_sizes["embedding"]
    needs, theirs = bundle_needs(open_bundle(half)), bundle_needs(open_bundle(quick_bundle))
    assert needs.disk < 0.55 * theirs.disk
    assert 0.9 * theirs.memory < needs.memory + ours.kv_bytes(1, 2048) < 1.2 * theirs.memory


def test_streamed_it_gives_the_same_tokens(half):
    ids = [371, 1064, 949, 1501, 1504]
    with api.Session(half, threads=1) as free, api.Session(half, threads=1, memory_limit=1) as tight:
        assert not tight.placement.resident
        expected = api.generate(free, ids, greedy=True, max_tokens=4)
        found = api.generate(tight, ids, greedy=True, max_tokens=4)
        assert (found.text, found.ids) == (expected.text, expected.ids)


def test_chat_eval_and_generate_run_it(half, tmp_path):
    assert glmexport("generate", half, "你好", "--max-tokens", 2, "--seed", 1).status == 0
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "你好", "answer": "好"}\n', "utf-8")
    result = glmexport("eval", half, questions, "--json", "-")
    assert result.status == 0, result


def test_the_example_for_onnxruntime_runs_it(half, golden):
    from test_examples import ROOT, run

    prompt = [str(token) for token in golden["short.input_ids"][0]]
    answer = run(ROOT / "examples" / "greedy_onnxruntime.py", half, *prompt).split()
    assert answer[:4] == [str(token) for token in golden["short.greedy"].reshape(-1)[:4]]


def test_argmax_alone(golden_checkpoint, tmp_path):
    split_directory(golden_checkpoint, tmp_path / "bundle", opset=17, dtype=FLOAT16, argmax="only")
    report = report_of(tmp_path / "bundle", golden_checkpoint)
    assert report.passed, report.failures
    assert report.greedy[0] == report.greedy[1]


def change_tensor(checkpoint, name, change):
    """Change one tensor of a checkpoint in a single .bin, in place."""
    path = checkpoint / "pytorch_model.bin"
    tensors = torch.load(path)
    change(tensors[name])
    torch.save(tensors, path)
