"""Bundles for MNN: every form goes over, is run by MNN alone, and whatever goes wrong leaves nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_tensors, write_checkpoint, write_weights
from conftest import record_again, split_directory, write_manifest
from derived_bundles import assert_intact, assert_one_sentence, contents, derived, glmexport, manifest_of, quantize_pass

from glmexport import journal, names
from glmexport.bundle import open_bundle
from glmexport.convert import mnn as convert_module
from glmexport.convert import mnn_check, mnn_graph
from glmexport.convert.mnn import convert_mnn
from glmexport.convert.mnn_plan import MnnOptions
from glmexport.embedding_rows import head_rows
from glmexport.errors import BundleError, ExportError, GlmExportError
from glmexport.form import RAW, SHARED, EmbeddingForm
from glmexport.generation import generate
from glmexport.mnn.converter import run_converter
from glmexport.mnn.matrix import FLOAT16, FLOAT32, CodePacker, MnnMatrix, StoredMatrix
from glmexport.mnn.vectors import model_vectors
from glmexport.passes.half_weights import HalfWeightsPass
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.prompt import prepare_prompt
from glmexport.sampling import Sampling
from glmexport.session import Session

pytest.importorskip("MNN")
GREEDY = Sampling(greedy=True)
WIDE = {"vocab_size": 131, "hidden_size": 64, "inner": 192, "seed": 3}


@pytest.fixture(scope="module")
def source(shared) -> Path:
    """One block, 131 rows, hidden 64, inner 192, no tokenizer: blocks of up to 64 inputs fit."""
    checkpoint = shared("mnn-one-block", lambda path: write_checkpoint(path, tokenizer=False, num_blocks=1, **WIDE))
    return shared("mnn-source", lambda path: split_directory(checkpoint, path, opset=17))


@pytest.fixture(scope="module")
def checkpoint_of_two(shared) -> Path:
    """The same with two blocks."""
    return shared("mnn-checkpoint", lambda path: write_checkpoint(path, tokenizer=False, **WIDE))


@pytest.fixture(scope="module")
def int4(shared, checkpoint_of_two) -> Path:
    """Two blocks in int4 (group 32, head int8), as they are for onnxruntime."""
    plain = shared("mnn-two-blocks", lambda path: split_directory(checkpoint_of_two, path, opset=17))
    return shared("mnn-int4", lambda path: derived(plain, path, quantize_pass(4)))


@pytest.fixture(scope="module")
def mnn_int4(shared, int4) -> Path:
    return shared("mnn-int4-converted", lambda path: convert(int4, path))


def convert(bundle: Path, output: Path, **options) -> list[str]:
    notices: list[str] = []
    keys = ("force", "resume", "checkpoint")
    extra = {key: options.pop(key) for key in keys if key in options}
    convert_mnn(open_bundle(bundle), output, MnnOptions(**options), notice=notices.append, **extra)
    return notices


def answer(bundle: Path, count: int = 6, **options) -> list[int]:
    ids = open_bundle(bundle).config.special_ids
    with Session(bundle, **options) as session:
        generation = generate(session, [9, 17, 33, ids.gmask, ids.bos], sampling=GREEDY, max_tokens=count)
        _ = generation.text
        return generation.ids


def stored(bundle: Path, graph: str, matrix: str) -> StoredMatrix:
    """A matrix of a bundle for MNN; its name ends so."""
    opened = open_bundle(bundle)
    entry = opened.graph(graph)
    (record,) = (record for name, record in entry["matrices"].items() if name.endswith(matrix))
    plain = {"query_key_value.weight": (3, 1), "dense.weight": (1, 1), "dense_h_to_4h.weight": (0, 1)}
    hidden, inner = opened.config.hidden_size, opened.config.inner_size
    shape = {
        "lm_head.weight": (opened.config.vocab_size, hidden),
        "dense_h_to_4h.weight": (inner, hidden),
        "dense_4h_to_h.weight": (hidden, inner),
    }.get(matrix) or (plain[matrix][0] * hidden, hidden)
    data = np.fromfile(bundle / entry["data"], np.uint8)
    return StoredMatrix(
        data[record["offset"] :], MnnMatrix(*shape, record["bits"], record["block"], record["symmetric"])
    )


def test_a_plain_runtime_chains_the_graphs(mnn_int4, int4):
    """MNN's own Python module and nothing of ours; in another process, as MNN prints to stdout."""
    config = open_bundle(int4).config
    prompt = prepare_prompt([[9, 17, 33, config.special_ids.gmask, config.special_ids.bos]], config.special_ids)
    with Session(int4) as session:
        hidden = session.embed(prompt.input_ids)
        pasts = session.empty_pasts(1)
        expected = session.head(session.forward(prompt.input_ids, prompt.attention_mask, prompt.position_ids, pasts))
    code = f"""
        import sys
        import numpy as np
        import MNN
        folder, feeds = sys.argv[1], dict(np.load(sys.argv[2]))
        runtime = MNN.nn.create_runtime_manager(({{"backend": 0, "numThread": 1, "precision": 1, "memory": 0}},))
        def load(name, inputs, outputs):
            return MNN.nn.load_module_from_file(f"{{folder}}/{{name}}.mnn", inputs, outputs, runtime_manager=runtime)
        def variable(value):
            kind = MNN.expr.int if value.dtype == np.int32 else MNN.expr.float
            made = MNN.expr.placeholder(list(value.shape), MNN.expr.NCHW, kind)
            if value.size:
                made.write(value)
            return made
        inputs = ["inputs_embeds", "attention_mask", "position_ids", "past_key_values"]
        hidden, past = feeds["hidden"], np.zeros((2, 0, 1, {config.num_heads}, {config.head_dim}), np.float32)
        for i in range({config.num_blocks}):
            block = load(f"glm_block_{{i}}", inputs, ["hidden_states", "presents"])
            values = [hidden, feeds["mask"].astype(np.int32), feeds["positions"].astype(np.int32), past]
            hidden = np.array(block.forward([variable(value) for value in values])[0].read(), copy=True)
        logits = load("lm", ["hidden_states"], ["logits"]).forward([variable(hidden)])[0].read()
        np.save(sys.argv[3], np.array(logits))
    """
    folder = mnn_int4.parent / "plain-runtime"
    folder.mkdir(exist_ok=True)
    np.savez(folder / "in.npz", hidden=hidden, mask=prompt.attention_mask, positions=prompt.position_ids)
    command = [sys.executable, "-c", textwrap.dedent(code), mnn_int4, folder / "in.npz", folder / "out.npy"]
    subprocess.run(command, check=True, capture_output=True)
    found = np.load(folder / "out.npy")
    assert found.shape == expected["logits"].shape
    # the same integers; onnxruntime rounds activations to 8 bits before int4 products
    assert np.linalg.norm(found - expected["logits"]) < 0.03 * np.linalg.norm(expected["logits"])
    assert sorted(path.name for path in mnn_int4.iterdir() if path.name.startswith("glm_block")) == [
        *("glm_block_0.mnn", "glm_block_0.mnn.weight", "glm_block_1.mnn", "glm_block_1.mnn.weight")
    ]


FORMS = {
    "float32": ((), {}, {(32, 0)}),
    "16 bits": ((), {"bits": FLOAT16}, {(16, 0)}),
    "int8, block 128 becomes 64": ((), {"bits": 8}, {(8, 64)}),
    "int4, block 32": ((), {"bits": 4, "block": 32}, {(4, 32)}),
    "int4, asymmetric": ((quantize_pass(4, 64, symmetric=False),), {}, {(4, 64)}),
    "int8, per channel": ((quantize_pass(8, "channel"),), {}, {(8, 64), (8, 192)}),
    "qdq": ((quantize_pass(4, 32, "qdq", symmetric=False, head=None),), {}, {(4, 32)}),
    "half": ((HalfWeightsPass(),), {}, {(16, 0)}),
}


SLOW = ("16 bits", "int8, block 128 becomes 64", "qdq")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FORMS])
def test_every_form_goes_over_and_computes_the_same(tmp_path, source, name):
    passes, options, forms = FORMS[name]
    bundle = source
    if passes:
        bundle = tmp_path / "bundle"
        derived(source, bundle, *passes)
    convert(bundle, tmp_path / "mnn", **options)
    assert_intact(tmp_path / "mnn")
    opened = open_bundle(tmp_path / "mnn")
    assert opened.runtime == names.MNN
    blocks = [entry for entry in opened.graphs if entry["kind"] == names.KIND_BLOCK]
    assert {(record["bits"], record["block"]) for entry in blocks for record in entry["matrices"].values()} == forms
    assert all(entry["checked"]["normal"] < 1e-6 for entry in opened.graphs)
    rounded = {record["rounded"] for entry in opened.graphs for record in entry["matrices"].values()}
    assert rounded == {"bits" in options and options["bits"] < 16}
    with Session(bundle) as theirs, Session(tmp_path / "mnn", mnn_memory="normal") as ours:
        ids = opened.config.special_ids
        prompt = prepare_prompt([[9, 17, ids.gmask, ids.bos], [3, 4, 5, 6, 7, ids.gmask, ids.bos]], ids)
        inputs = (prompt.input_ids, prompt.attention_mask, prompt.position_ids)
        expected = theirs.forward(*inputs, theirs.empty_pasts(2))
        found = ours.forward(*inputs, ours.empty_pasts(2))
    bound = {4: 0.15, 8: 0.02, 16: 1e-3, 32: 1e-6}[min(bits for bits, _ in forms)]
    assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("sizes", "passes", "options"),
    [
        ({"hidden_size": 48, "heads": 3, "inner": 100, "dtype": torch.bfloat16, "fmt": "safetensors"}, (), {"bits": 4}),
        (
            {"hidden_size": 48, "heads": 3, "inner": 112, "num_blocks": 3, "vocab_size": 129, "fmt": "bin-sharded"},
            (quantize_pass(4, 32, symmetric=False, num_blocks=3),),
            {},
        ),
        pytest.param(
            {"hidden_size": 272, "heads": 17, "inner": 75, "vocab_size": 301, "dtype": torch.float32},
            (),
            {"bits": 8, "argmax": "only"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one scale a row", "groups of 32 and 16", "seventeen heads"],
)
def test_odd_shapes_are_the_reference_s(tmp_path, sizes, passes, options):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer=False, **{"num_blocks": 1, **sizes})
    split_directory(checkpoint, tmp_path / "bundle", opset=17)
    if passes:
        derived(tmp_path / "bundle", tmp_path / "passed", *passes)
    convert(tmp_path / ("passed" if passes else "bundle"), tmp_path / "mnn", **options)
    result = glmexport("verify", tmp_path / "mnn", checkpoint, "-q", "--steps", "1")
    assert result.status == 0, result.stdout


def test_a_damaged_model_is_read_or_refused(mnn_int4):
    """Whatever a byte of the model is turned to, reading its vectors ends, with a sentence where they are not there."""
    model, beside = (mnn_int4 / "lm.mnn").read_bytes(), mnn_int4 / "lm.mnn.weight"
    random, refused = np.random.default_rng(1), 0
    for place in random.integers(0, len(model), 400):
        damaged = bytearray(model)
        damaged[place] ^= int(random.integers(1, 256))
        try:
            assert sum(map(len, model_vectors(bytes(damaged), beside))) < 1 << 20
        except ExportError:
            refused += 1
    assert 0 < refused < 400


def test_the_same_integers_and_scales(mnn_int4, int4):
    ids = np.arange(open_bundle(int4).config.vocab_size)
    head = stored(mnn_int4, names.HEAD, "lm_head.weight")
    np.testing.assert_array_equal(head.rows(0, len(ids)), head_rows(open_bundle(int4)).rows(ids))


def test_rounding_is_the_converter_s_own(tmp_path, source):
    """Codes, scales and lowest values are those that MNN's converter writes with --weightQuantBits."""
    convert(source, tmp_path / "mnn", bits=4, block=32, lm_bits=4)
    options = [*mnn_graph.CONVERT, "--weightQuantBits", "4", "--weightQuantBlock", "32"]
    options += ["--modelFile", str(source / "lm.onnx"), "--MNNModel", "{m}"]
    run_converter(options, {"m": tmp_path / "m", "m.weight": tmp_path / "w"}, tmp_path / "log")
    ours = stored(tmp_path / "mnn", names.HEAD, "lm_head.weight")
    theirs = np.fromfile(tmp_path / "w", np.uint8)
    matrix = ours.matrix
    assert len(theirs) == 2 * 4 * matrix.inputs + matrix.total_bytes  # beside the norm
    found = StoredMatrix(theirs[-matrix.total_bytes :], matrix).rows(0, matrix.outputs)
    rows = ours.rows(0, matrix.outputs)
    same = np.isclose(found, rows, rtol=0, atol=1e-6)
    assert same.mean() > 0.999  # halves may be rounded to the other side
    np.testing.assert_allclose(found, rows, atol=0.4)


def test_the_bytes_are_reproducible(tmp_path, int4, mnn_int4):
    convert(int4, tmp_path / "again", jobs=2)
    assert contents(tmp_path / "again") == contents(mnn_int4)


@pytest.mark.parametrize("argmax", [pytest.param("also", marks=pytest.mark.slow), "only"])
def test_the_head_gives_the_token_where_it_is_asked_for(tmp_path, source, argmax):
    convert(source, tmp_path / "mnn", argmax=argmax, bits=8)
    outputs = [tensor["name"] for tensor in open_bundle(tmp_path / "mnn").graph(names.HEAD)["outputs"]]
    assert outputs == (["logits", "token_id"] if argmax == "also" else ["token_id"])
    assert answer(tmp_path / "mnn", mnn_memory="normal") == answer(source)


@pytest.mark.parametrize("form", [EmbeddingForm(RAW, "bfloat16"), EmbeddingForm(SHARED)], ids=["raw", "shared"])
def test_embeddings_become_raw_files(tmp_path, shared, form):
    sizes = {**WIDE, "tied": True, "num_blocks": 1}
    checkpoint = shared("mnn-tied-checkpoint", lambda path: write_checkpoint(path, tokenizer=False, **sizes))
    plain = shared("mnn-tied", lambda path: split_directory(checkpoint, path, opset=17))
    derived(plain, tmp_path / "bundle", quantize_pass(8), EmbedPass(form))
    notices = convert(tmp_path / "bundle", tmp_path / "mnn")
    made = open_bundle(tmp_path / "mnn")
    assert made.form.embedding_file in made.files
    assert any("becomes word_embeddings_float32.bin" in notice for notice in notices) == (form.kind == SHARED)
    ids = np.arange(made.config.vocab_size)[None]
    with Session(tmp_path / "bundle") as theirs, Session(tmp_path / "mnn") as ours:
        np.testing.assert_array_equal(ours.embed(ids), theirs.embed(ids))
    result = glmexport("verify", tmp_path / "mnn", checkpoint, "-q", "--steps", "1")
    assert result.status == 0, result.stdout


def test_blocks_that_divide_nothing_are_per_channel_and_said(tmp_path, shared):
    from derived_bundles import plain_bundle  # hidden 40, inner 300

    notices = convert(plain_bundle(shared), tmp_path / "mnn", bits=4)
    assert any("per channel" in notice and "40 and 300" in notice for notice in notices)
    assert {record["block"] for record in open_bundle(tmp_path / "mnn").graph("glm_block_0")["matrices"].values()} == {
        *(40, 300)
    }


def test_groups_that_mnn_cannot_hold_are_said_or_rounded_from_the_checkpoint(tmp_path, shared):
    from derived_bundles import plain_bundle, plain_checkpoint

    from glmexport.checkpoint import open_checkpoint

    derived(plain_bundle(shared), tmp_path / "int4", quantize_pass(4))  # 40 inputs in groups of 32 and 8
    result = glmexport("convert", "mnn", tmp_path / "int4", "-o", tmp_path / "mnn", "-q")
    assert_one_sentence(result, "groups of 32 of its 40 inputs", "--checkpoint")
    assert not (tmp_path / "mnn").exists()
    with open_checkpoint(plain_checkpoint(shared)) as checkpoint:
        notices = convert(tmp_path / "int4", tmp_path / "mnn", checkpoint=checkpoint)
    assert any("rounded anew from the checkpoint" in notice for notice in notices)
    assert glmexport("verify", tmp_path / "mnn", plain_checkpoint(shared), "-q", "--steps", "1").status == 0


# Going wrong

BAD = {
    "nothing is written": ("print('Converted Success!')", "wrote no model"),
    "the model is cut off": ("real(a); cut(model, 9000); print('Converted Success!')", "cut off"),
    "the weights are cut off": ("real(a); cut(weights, 900); print('Converted Success!')", "was cut off"),
    "the model is noise": ("real(a); model.write_bytes(bytes(range(256)) * 40)", "convert again"),
    "other bits": ("real([*a, '--weightQuantBits', '4', '--weightQuantBlock', '32'])", "in another way"),
    "half floats": ("real([*a, '--fp16'])", "in another way"),
    "another graph": ("a[a.index('--modelFile') + 1] = OTHER; real(a)", "were expected"),
    "a bias that is lost": (
        "real(a); d = bytearray(weights.read_bytes()); d[:] = bytes(len(d)); weights.write_bytes(d)",
        "did not put the bias",
    ),
    "a constant is changed": (
        "import struct; real(a); d = model.read_bytes(); old = struct.pack('<f', 0.044715)\n"
        "assert old in d; model.write_bytes(d.replace(old, struct.pack('<f', 0.44715)))",
        "does not compute what its graph does",
    ),
    "one bit of a norm is changed": (
        "real(a); d = bytearray(weights.read_bytes()); d[4 * 70] ^= 1; weights.write_bytes(d)",
        "transformer.layers.0.input_layernorm.bias not there bit for bit",
    ),
    "killed": ("real(a); import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
    "an error in the log": ("real(a); print('[ERROR] something')", "[ERROR] something"),
}


@pytest.fixture
def bad_converter(tmp_path, monkeypatch, source):
    """`bad_converter(code)`: a module `_tools` that runs this code; `real(arguments)` is MNN's own converter."""
    import _tools

    def install(code: str) -> None:
        lines = f"""
import importlib.machinery, importlib.util, os, sys
from pathlib import Path
OTHER = {str(source / "embedding.onnx")!r}
def real(arguments):
    loader = importlib.machinery.ExtensionFileLoader("_tools", {_tools.__file__!r})
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_tools", loader))
    loader.exec_module(module)
    return module.mnnconvert(arguments)
def cut(path, size):
    os.truncate(path, size)
def mnnconvert(a):
    model = Path(a[a.index("--MNNModel") + 1])
    weights = model.with_name(model.name + ".weight")
{textwrap.indent(code, "    ")}
    return True
"""
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "_tools.py").write_text(lines, "utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bad"))

    return install


@pytest.mark.parametrize("name", BAD)
def test_a_bad_converter_leaves_nothing(tmp_path, source, bad_converter, name):
    code, words = BAD[name]
    bad_converter(code)
    with pytest.raises(ExportError) as error:
        convert(source, tmp_path / "mnn")
    assert words in str(error.value)
    log = tmp_path / "mnn.glm_block_0.log"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", log.name]
    assert str(log) in str(error.value)


def test_a_bundle_that_computes_in_float16_is_refused(tmp_path, checkpoint_of_two):
    split_directory(checkpoint_of_two, tmp_path / "half", opset=17, dtype="float16")
    with pytest.raises(BundleError, match="compute in float16"):
        convert(tmp_path / "half", tmp_path / "mnn")
    assert not (tmp_path / "mnn").exists()


def test_weights_that_are_written_wrongly_are_found(tmp_path, source, monkeypatch):
    push = CodePacker.push
    monkeypatch.setattr(CodePacker, "push", lambda packer, codes: push(packer, codes ^ (codes == 3)))
    with pytest.raises(ExportError, match="was not written as the bundle has it"):
        convert(source, tmp_path / "mnn", bits=4)
    assert not (tmp_path / "mnn").exists()


def test_a_model_that_reads_other_bytes_is_found(tmp_path, source, monkeypatch):
    """The weights are as they must be, and the model looks for them a row further."""
    make = convert_module.model_bytes

    def shifted(converted, laid, digest):
        return make(converted, (dataclasses.replace(laid[0], offset=laid[0].offset + 4 * 64), *laid[1:]), digest)

    monkeypatch.setattr(convert_module, "model_bytes", shifted)
    with pytest.raises(ExportError, match="does not compute what its graph does"):
        convert(source, tmp_path / "mnn")
    assert not (tmp_path / "mnn").exists()


def test_no_space_is_one_sentence(tmp_path, source, monkeypatch):
    from conftest import FullDisk

    from glmexport import bundle_writer

    real = bundle_writer.DirectFile
    monkeypatch.setattr(bundle_writer, "DirectFile", lambda path: FullDisk(real(path), 20_000))
    with pytest.raises(BundleError, match="the disk is full"):
        convert(source, tmp_path / "mnn")
    assert list(tmp_path.iterdir()) == [], "not even a log, of which the sentence says nothing"


def test_no_space_for_what_lies_beside_is_one_sentence(tmp_path, source, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mnn_graph.onnx, "save", full)
    with pytest.raises(BundleError, match="mnn could not be written: the disk is full"):
        convert(source, tmp_path / "mnn")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (8, r"mlp\.dense_4h_to_h\.weight cannot be stored: a weight is no finite number"),
        (None, "the bundle's own graph gives NaN"),
    ],
)
def test_weights_that_are_no_numbers_are_named(tmp_path, bits, words):
    tensors = make_tensors(num_blocks=1, **WIDE)
    tensors["transformer.layers.0.mlp.dense_4h_to_h.weight"][3, 5] = float("nan")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer=False, num_blocks=1, **WIDE)
    write_weights(checkpoint, tensors, "bin")
    split_directory(checkpoint, tmp_path / "bundle", opset=17)
    with pytest.raises(ExportError, match=words) as error:
        convert(tmp_path / "bundle", tmp_path / "mnn", bits=bits)
    log = tmp_path / "mnn.glm_block_0.log"
    assert log.exists() == (str(log) in str(error.value))
    assert not (tmp_path / "mnn").exists()


def test_what_low_memory_mode_harms_can_be_made_for_the_normal_one(tmp_path, source, shared, monkeypatch):
    monkeypatch.setattr(mnn_check, "LOW_BOUND", 1e-9)
    with pytest.raises(ExportError, match=r"off in low memory mode, .*; give --memory normal"):
        convert(source, tmp_path / "mnn", bits=8)
    convert(source, tmp_path / "mnn", bits=8, memory="normal")
    assert [*open_bundle(tmp_path / "mnn").graph(names.HEAD)["checked"]] == ["normal"]
    result = glmexport("verify", tmp_path / "mnn", shared("mnn-one-block", lambda path: None), "-q", "--steps", "1")
    assert result.status == 0, result.stdout
    assert ", low" not in result.stdout


def test_a_killed_run_goes_on(tmp_path, int4, mnn_int4, monkeypatch):
    class Killed(BaseException):
        pass

    calls: list[str] = []
    work = convert_module.check_numbers

    def stop(model: Path, *rest):
        calls.append(model.name)
        if len(calls) == 3:
            noted, end = tmp_path / ".mnn.partial" / journal.JOURNAL, time.monotonic() + 60
            while len(noted.read_text("utf-8").splitlines()) < 3 and time.monotonic() < end:
                time.sleep(0.01)  # files are synced, and graphs noted, beside the work
            raise Killed
        return work(model, *rest)

    monkeypatch.setattr(convert_module, "check_numbers", stop)
    with pytest.raises(Killed):
        convert(int4, tmp_path / "mnn")
    assert not (tmp_path / "mnn").exists()
    convert(int4, tmp_path / "mnn", resume=True)
    assert calls[3:] == ["lm.mnn"]
    assert contents(tmp_path / "mnn") == contents(mnn_int4)


def test_a_resumed_run_must_be_the_same(tmp_path, int4):
    partial = tmp_path / ".mnn.partial"
    partial.mkdir()
    header = {"identity": {"bundle": "another"}}
    (partial / journal.JOURNAL).write_text(journal._line(header), "utf-8")
    with pytest.raises(BundleError, match="was begun with something else"):
        convert(int4, tmp_path / "mnn", resume=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 8}, "asks for 8 bits"),
        ({"lm_bits": 4}, "--lm-bits asks for 4"),
        ({"bits": FLOAT32}, "quantized to int4"),
    ],
)
def test_a_quantized_bundle_keeps_its_bits(tmp_path, int4, options, words):
    with pytest.raises(GlmExportError, match=words):
        convert(int4, tmp_path / "mnn", **options)


def test_a_damaged_bundle_is_refused(tmp_path, int4):
    bundle = shutil.copytree(int4, tmp_path / "bundle")
    data = bytearray((bundle / "lm.onnx.data").read_bytes())
    data[-5] ^= 1
    (bundle / "lm.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match=r"lm\.onnx\.data was changed"):
        convert(bundle, tmp_path / "mnn")


# Running


def test_tokens_are_the_same_however_it_is_held(mnn_int4, int4):
    expected = answer(int4)
    largest = max(open_bundle(mnn_int4).graph_sizes.values())
    found = answer(mnn_int4)
    assert found == answer(mnn_int4, memory_limit=largest, threads=1)
    assert len(expected) == len(found)


def test_stdout_is_left_alone(mnn_int4):
    """MNN prints when it is imported and when it opens a file, through buffers of its own."""
    ids = open_bundle(mnn_int4).config.special_ids
    fed = f"9,17,{ids.gmask},{ids.bos}"
    command = [sys.executable, "-m", "glmexport", "generate", mnn_int4, "--input-ids", fed, "--greedy", "--json", "-q"]
    done = subprocess.run([*command, "--max-tokens", "3"], capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["ids"]) == 3
    assert done.stderr == ""


def test_a_gpu_that_mnn_has_not_got_is_said(mnn_int4):
    ids = open_bundle(mnn_int4).config.special_ids
    fed = ["--input-ids", f"9,{ids.gmask},{ids.bos}", "-q"]
    assert_one_sentence(glmexport("generate", mnn_int4, *fed, "--providers", "METAL"), "no backend METAL")
    assert_one_sentence(glmexport("generate", mnn_int4, *fed, "--providers", "X"), "no backend 'X'", "OPENCL")
    plan = glmexport("generate", mnn_int4, *fed, "--gpu-memory", "8GB", "--dry-run")
    assert plan.status == 0
    assert "GPU" in plan.stdout


def test_missing_weights_are_one_sentence(tmp_path, mnn_int4):
    bundle = shutil.copytree(mnn_int4, tmp_path / "bundle")
    (bundle / "lm.mnn.weight").unlink()
    with pytest.raises(BundleError, match=r"lm\.mnn\.weight: found no such file"):
        answer(bundle)


@pytest.mark.parametrize("command", ["slim", "embed", "quantize", "convert"])
def test_what_needs_onnx_refuses(tmp_path, mnn_int4, command):
    words = {"convert": ["convert", "mnn"], "quantize": ["quantize", "--bits", "4"]}.get(command, [command])
    result = glmexport(*words, mnn_int4, "-o", tmp_path / "x", "-q")
    assert_one_sentence(result, "is for MNN and holds no ONNX graphs")


def test_the_command_says_what_it_made(tmp_path, source):
    report = tmp_path / "report.json"
    result = glmexport(
        *("convert", "mnn", source, "-o", tmp_path / "mnn", "--bits", "8", "--block", "47", "--json", report)
    )
    assert result.status == 0, result.stderr
    assert "32 inputs share a scale (47 asked for)" in result.stderr
    assert "for MNN" in result.stdout
    graphs = json.loads(report.read_text("utf-8"))["graphs"]
    assert [graph["name"] for graph in graphs] == ["glm_block_0", "lm"]
    assert glmexport("inspect", tmp_path / "mnn").stdout.count("mnn")
    assert_one_sentence(glmexport("convert", "mnn", source, "-o", tmp_path / "mnn", "-q"), "exists already")


def test_without_mnn_it_is_one_sentence(tmp_path, source, monkeypatch):
    monkeypatch.setattr("glmexport.mnn.converter.importlib.util.find_spec", lambda name: None)
    result = glmexport("convert", "mnn", source, "-o", tmp_path / "mnn", "-q")
    assert_one_sentence(result, "MNN is not installed", "pip install 'glmexport[mnn]'")


# Verifying


def test_a_right_one_passes_in_both_modes(mnn_int4, checkpoint_of_two):
    result = glmexport("verify", mnn_int4, checkpoint_of_two, "-q", "--steps", "2")
    assert result.status == 0, result.stdout
    assert "short, normal" in result.stdout
    assert "short, low" in result.stdout


def damage_code(bundle: Path) -> None:
    def turn(data: bytearray, at: int) -> None:
        place = next(i for i in range(at, at + 999) if data[i] >> 4 in (1, 2, 13, 14))
        data[place] ^= 0xF0  # to the other end of its scale

    change(bundle, "glm_block_1", turn)


def damage_scale(bundle: Path) -> None:
    matrix = stored(bundle, "glm_block_0", "dense_4h_to_h.weight").matrix

    def double(data: bytearray, at: int) -> None:
        start = at - 100 - len(matrix.header) + matrix.weight_bytes
        data[start : start + 4] = (np.frombuffer(bytes(data[start : start + 4]), np.float32) * 2).tobytes()

    change(bundle, "glm_block_0", double)


def damage_norm(bundle: Path) -> None:
    """The last bit of one number of a norm, which no output shows."""
    path = bundle / "glm_block_1.mnn.weight"
    data = bytearray(path.read_bytes())
    data[4 * 70] ^= 1  # the first norm has 64 weights and 64 biases there
    path.unlink()
    path.write_bytes(data)
    record_again(bundle, path.name)


def damage_bias(bundle: Path) -> None:
    matrix = stored(bundle, "glm_block_0", "dense_4h_to_h.weight").matrix

    def shift(data: bytearray, at: int) -> None:
        start = at - 100 - len(matrix.header) + matrix.weight_bytes + matrix.scale_bytes
        data[start] ^= 1

    change(bundle, "glm_block_0", shift)


def change(bundle: Path, graph: str, how) -> None:
    """Change the bytes of `dense_4h_to_h`, given where its codes begin, 100 further."""
    entry = open_bundle(bundle).graph(graph)
    (record,) = (record for name, record in entry["matrices"].items() if name.endswith("dense_4h_to_h.weight"))
    path = bundle / entry["data"]
    data = bytearray(path.read_bytes())
    header = len(stored(bundle, graph, "dense_4h_to_h.weight").matrix.header)
    how(data, record["offset"] + header + 100)
    path.unlink()
    path.write_bytes(data)
    record_again(bundle, path.name)


def swap_blocks(bundle: Path) -> None:
    for end in ("mnn", "mnn.weight"):
        first, second = (bundle / f"glm_block_{i}.{end}" for i in (0, 1))
        one, other = first.read_bytes(), second.read_bytes()
        first.unlink(), second.unlink()
        first.write_bytes(other), second.write_bytes(one)
        record_again(bundle, first.name, second.name)


def other_config(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    manifest["tied"] = True
    write_manifest(bundle, manifest)


@pytest.mark.parametrize("damage", [damage_code, damage_scale, damage_bias, damage_norm, swap_blocks, other_config])
def test_verify_finds_what_is_wrong(tmp_path, mnn_int4, checkpoint_of_two, damage):
    bundle = shutil.copytree(mnn_int4, tmp_path / "bundle")
    damage(bundle)
    result = glmexport("verify", bundle, checkpoint_of_two, "-q", "--steps", "1")
    assert result.status == 1, result.stdout
    assert "FAIL" in result.stdout


def test_a_wrong_constant_in_the_model_is_found(tmp_path, mnn_int4, checkpoint_of_two):
    bundle = shutil.copytree(mnn_int4, tmp_path / "bundle")
    path = bundle / "glm_block_1.mnn"
    data, old = path.read_bytes(), np.float32(0.044715).tobytes()
    assert old in data
    path.unlink()
    path.write_bytes(data.replace(old, np.float32(0.9).tobytes()))
    record_again(bundle, path.name)
    assert glmexport("verify", bundle, checkpoint_of_two, "-q", "--steps", "1").status == 1


def test_a_low_mode_that_differs_is_found(mnn_int4):
    """The bound of the low mode's check can fail: hand it the outputs of another graph."""
    found = {"hidden_states": np.ones((2, 1, 4), np.float32)}
    assert mnn_check._distance(found, {"hidden_states": np.full((2, 1, 4), 1.2, np.float32)}) > mnn_check.LOW_BOUND
    assert mnn_check._distance(found, {"hidden_states": np.ones((2, 1, 5), np.float32)}) == float("inf")
    assert np.isnan(mnn_check._distance({"x": np.array([np.nan])}, {"x": np.array([1.0])}))
