"""`glmexport package mnn-llm`: the folder as MNN's own engine runs it, and what must be found wrong with a bad one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from conftest import ROOT, listing, split_directory
from derived_bundles import assert_one_sentence, derived, glmexport, quantize_pass
from mnn_layout import slowly_read

from glmexport.bundle import open_bundle
from glmexport.checkpoint import open_checkpoint
from glmexport.errors import BundleError, ExportError
from glmexport.form import RAW, EmbeddingForm
from glmexport.mnn import converter
from glmexport.mnn.matrix import MnnMatrix
from glmexport.mnn_llm import package, position_probe
from glmexport.mnn_llm.check import STEPS, check_package, random_prompts
from glmexport.mnn_llm.engine import ask
from glmexport.mnn_llm.engine_graph import engine_graph
from glmexport.mnn_llm.following import CheckpointReference, ModelReference, follow
from glmexport.mnn_llm.inputs import open_input
from glmexport.mnn_llm.package import NEVER, PackageOptions, write_package
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.passes.slim_vocab import SlimPass
from glmexport.patch import patch_named
from glmexport.quantized_rows import QuantizedRows
from glmexport.stored import stored_tensors_of
from glmexport.tokenizer import Tokenizer
from glmexport.vocabulary import VocabularyMap

GOLDEN = ROOT / "examples" / "chatglm-6b-tiny"
FILES = {"llm.mnn", "llm.mnn.weight", "embeddings_float16.bin", "tokenizer.mtok", "config.json", "llm_config.json"}


@pytest.fixture(scope="session")
def exact(shared) -> Path:
    """The golden checkpoint in float32; copy it before changing anything."""

    def make(path: Path) -> None:
        done = glmexport("package", "mnn-llm", GOLDEN, "-o", path, "--bits", "none")
        assert not done.status, done.stderr

    return shared("mnn-llm-exact", make)


def write(source: Path, output: Path, **options):
    with open_input(str(source), None, output, print) as found:
        return write_package(found.source, found.reference, output, PackageOptions(**options))


def read_place(data: bytes, place) -> np.ndarray:
    """The matrix [outputs, inputs] at a place of the weight file."""
    stored = place.stored
    return slowly_read(data[place.offset : place.end], stored.outputs, stored.inputs, stored.bits, stored.block)[0]


def checked(directory: Path, form: str = "float32"):
    """A package compared with the golden checkpoint anew."""
    with open_checkpoint(GOLDEN) as checkpoint:
        rows = VocabularyMap.identity(checkpoint.config.vocab_size)
        reference = CheckpointReference(checkpoint, checkpoint.config, rows)
        return check_package(directory, reference, Tokenizer.load(GOLDEN, num_image_tokens=0), form, "3.6.1")


def test_every_token_is_the_references(exact):
    """20 prompts of 1 to 200 tokens and chats with history, 12 steps each."""
    manifest = json.loads((exact / "manifest.json").read_text("utf-8"))
    assert {path.name for path in exact.iterdir()} == FILES | {"manifest.json"} == {*manifest["files"], "manifest.json"}
    assert manifest["check"]["prompts"] >= 20
    assert manifest["check"]["same"] == manifest["check"]["tokens"] >= 20 * STEPS
    assert manifest["check"]["logits_error"] < 1e-4
    assert manifest["mnn"]["version"] == converter.mnn_version()
    with open_checkpoint(GOLDEN) as checkpoint:
        lengths = sorted(len(prompt) - 2 for prompt in random_prompts(checkpoint.config))
    assert (len(lengths), lengths[0], lengths[-1]) == (20, 1, 200)


@pytest.mark.parametrize("case", ["short", "one", "long", pytest.param("far", marks=pytest.mark.slow)])
def test_the_engines_own_greedy_answers_are_the_golden_ones(exact, golden, case):
    """What the original code generated, not what this project's reference says; 2 to 1982 tokens."""
    ids, wanted = golden[f"{case}.input_ids"][0].tolist(), golden[f"{case}.greedy"].tolist()
    assert list(ask(exact, [ids], len(wanted)).tokens) == [wanted]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_packages_keep_their_budget(tmp_path, bits):
    result = write(GOLDEN, tmp_path / "package", bits=bits).result
    assert result.complaint is None
    assert result.form == f"int{bits}"
    assert result.norm < {8: 0.03, 4: 0.2}[bits]


def test_without_the_correction_the_check_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "needs_correction", lambda: False)
    with pytest.raises(ExportError, match=r"of 312 tokens of MNN's engine are the reference's"):
        write(GOLDEN, tmp_path / "package", bits=32)
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_the_installed_engine_needs_the_correction_and_a_mended_one_does_not(monkeypatch):
    assert position_probe.needs_correction()

    def mended(config, store, *, corrected):
        """An engine that counts as the model does is this one with a graph that makes up for it."""
        return engine_graph(config, store, corrected=not corrected)

    monkeypatch.setattr(position_probe, "engine_graph", mended)
    assert not position_probe.needs_correction.__wrapped__()


def test_an_engine_that_is_wrong_either_way_is_refused(monkeypatch):
    monkeypatch.setattr(position_probe, "_tokens_that_differ", lambda corrected: 3)
    with pytest.raises(ExportError, match=r"3 with 0 added, 3 with 1 added\. Use MNN 3\.6\.1\."):
        position_probe.needs_correction.__wrapped__()


@pytest.mark.parametrize("place", ["first norm", "head"])
def test_a_wrong_weight_is_found(exact, tmp_path, place):
    damaged = shutil.copytree(exact, tmp_path / "package")
    weights = np.fromfile(damaged / "llm.mnn.weight", np.float32)
    weights[0 if place == "first norm" else -1856 - 64 * 300] += 8.0
    weights.tofile(damaged / "llm.mnn.weight")
    assert "expected of exact weights" in checked(damaged).complaint


def test_a_wrong_template_is_found(exact, tmp_path):
    damaged = shutil.copytree(exact, tmp_path / "package")
    config = damaged / "llm_config.json"
    config.write_text(config.read_text("utf-8").replace("[Round ", "[round "), "utf-8")
    assert "chats otherwise" in checked(damaged).complaint


def test_a_package_that_does_not_load_is_told(exact, tmp_path):
    damaged = shutil.copytree(exact, tmp_path / "package")
    (damaged / "llm.mnn").unlink()
    with pytest.raises(ExportError, match="did not load the package"):
        ask(damaged)


def test_the_same_bytes_in_every_run(exact, tmp_path):
    """A checked manifest among them."""
    done = glmexport("package", "mnn-llm", GOLDEN, "-o", tmp_path / "again", "--bits", "none", "-q")
    assert not done.status, done.stderr
    ours, theirs = listing(tmp_path / "again"), listing(exact)
    assert {name: content for name, (_, _, content) in ours.items()} == {
        name: content for name, (_, _, content) in theirs.items()
    }


@pytest.mark.parametrize(
    "sizes",
    [
        {"inner": 75, "heads": 4, "hidden_size": 48, "num_blocks": 3},
        {"vocab_size": 1897, "image_tokens": 40, "hidden_size": 40, "inner": 300, "tied": True},
        {"first_revision": True, "image_tokens": 60, "with_head": False, "fmt": "safetensors-sharded"},
    ],
    ids=["odd inner size", "image tokens, tied", "first revision, no head"],
)
def test_other_shapes(tmp_path, sizes):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **sizes)
    result = write(checkpoint, tmp_path / "float", bits=16).result
    assert (result.complaint, result.same) == (None, result.count)
    assert write(checkpoint, tmp_path / "int4", bits=4, block=32).result.complaint is None


def test_a_quantized_bundle_keeps_its_integers(quick_bundle, tmp_path):
    int4, target = tmp_path / "int4", tmp_path / "package"
    derived(quick_bundle, int4, quantize_pass(4, 32))
    done = glmexport("package", "mnn-llm", int4, "-o", target, "--json", "-", "-q")
    assert not done.status, done.stderr
    report = json.loads(done.stdout)
    assert report["check"]["same"] > 0.5 * report["check"]["tokens"]
    bundle = open_bundle(int4)
    with open_input(str(int4), None, target, print) as found:
        options = PackageOptions()
        graph = engine_graph(bundle.config, lambda *matrix: options.stored(found.source, *matrix), corrected=True)
    data = (target / "llm.mnn.weight").read_bytes()
    for name, entry in (("lm_head", "lm"), ("transformer.layers.1.mlp.dense_4h_to_h", "glm_block_1")):
        place = next(place for place in graph.places if place.name == name)
        shape = (place.stored.outputs, place.stored.inputs)
        record = bundle.graph(entry)["matrices"][f"{name}.weight"]
        places = stored_tensors_of(bundle, entry)
        rows = QuantizedRows(bundle.directory, places, f"{name}.weight", record, shape, "matmulnbits")
        found = read_place(data, place)
        assert np.allclose(found, rows.rows(np.arange(shape[0])), atol=1e-6)
    assert_one_sentence(
        glmexport("package", "mnn-llm", int4, "-o", tmp_path / "x", "--bits", "8"), "keeps its integers"
    )


def test_names_are_the_architectures(quick_bundle, tmp_path, monkeypatch):
    """Embedding and head by the names that the patch has, whatever they are; an unknown architecture is said."""
    patch = dataclasses.replace(patch_named("chatglm-6b"), embedding="tok", head="out")
    monkeypatch.setattr("glmexport.mnn_llm.source.patch_named", lambda name: patch)
    with open_input(str(quick_bundle), None, tmp_path / "x", print) as found:
        assert (found.source.embedding_name, found.source.head_name) == ("tok.weight", "out.weight")
        with pytest.raises(BundleError, match=r"no tensor tok\.weight"):
            next(found.source.embedding_bands())
        bits = {name: PackageOptions(bits=4).stored(found.source, name, 64, 64).bits for name in ("out", "lm_head")}
    assert bits == {"out": 8, "lm_head": 4}
    with pytest.raises(BundleError, match="'glm-5' is not one this glmexport knows"):
        patch_named("glm-5")


def test_groups_that_are_whole_in_equal_blocks_keep_their_integers(tmp_path):
    """48 inputs in groups of 32 and 16 are three blocks of 16; one group of 128 is one of 48. Groups of 40 are none."""
    sizes = {"hidden_size": 48, "inner": 96, "num_blocks": 1}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **sizes)
    split_directory(checkpoint, tmp_path / "bundle", opset=17)
    for group, symmetric in ((32, True), (128, False)):
        derived(tmp_path / "bundle", tmp_path / f"int4-{group}", quantize_pass(4, group, symmetric=symmetric))
        result = write(tmp_path / f"int4-{group}", tmp_path / f"package-{group}").result
        assert result.complaint is None
    narrow = write_checkpoint(tmp_path / "narrow", hidden_size=40, num_blocks=1)
    split_directory(narrow, tmp_path / "narrow-bundle", opset=17)
    derived(tmp_path / "narrow-bundle", tmp_path / "narrow-int4", quantize_pass(4, 32))
    result = glmexport("package", "mnn-llm", tmp_path / "narrow-int4", "-o", tmp_path / "x")
    assert_one_sentence(result, "40 inputs in groups of 32", "give the checkpoint")


def test_a_float32_bundle_gives_the_checkpoints_weights(quick_bundle, exact, tmp_path):
    write(quick_bundle, tmp_path / "package", bits=32)
    for name in FILES:
        assert (tmp_path / "package" / name).read_bytes() == (exact / name).read_bytes()


def test_a_quantized_package_is_its_dequantized_weights(tmp_path):
    """With float activations the engine's logits are those of the reference with the weights that were stored."""
    write(GOLDEN, tmp_path / "package", bits=4, check=NEVER)
    data = (tmp_path / "package" / "llm.mnn.weight").read_bytes()
    with open_checkpoint(GOLDEN) as checkpoint:
        patch, config = checkpoint.patch, checkpoint.config
        state = {name: checkpoint.read(name).float() for name in checkpoint.weights.names() if "inv_freq" not in name}
    with open_input(str(GOLDEN), None, tmp_path / "x", print) as found:
        options = PackageOptions(bits=4)
        graph = engine_graph(config, lambda *matrix: options.stored(found.source, *matrix), corrected=True)
    for place in graph.places:
        if isinstance(place.stored, MnnMatrix):
            state[f"{place.name}.weight"] = torch.from_numpy(read_place(data, place))
    with torch.device("meta"):
        model = patch.build_reference(config)
    model.load_state_dict(state, assign=True, strict=False)
    prompts = random_prompts(config)[::5]
    settings = {"memory": "high", "precision": "high"}
    answers = ask(tmp_path / "package", prompts, STEPS, logits=True, settings=settings)
    expected = follow(ModelReference(patch, config, model.eval()), prompts, answers.tokens)
    for found_logits, right, tokens in zip(answers.logits, expected, answers.tokens, strict=True):
        assert np.linalg.norm(found_logits - right) < 1e-4 * np.linalg.norm(right)
        assert tokens == right.argmax(-1).tolist()


def test_a_slimmed_bundle_has_a_tokenizer_of_its_own_ids(checkpoint, tmp_path):
    """Image tokens dropped, the embedding in bfloat16: ids are the bundle's."""
    split_directory(checkpoint, tmp_path / "bundle", opset=17)
    derived(tmp_path / "bundle", tmp_path / "slim", SlimPass(), EmbedPass(EmbeddingForm(RAW, "bfloat16")))
    result = write(tmp_path / "slim", tmp_path / "package", bits=32).result
    assert (result.complaint, result.same, result.texts) == (None, result.count, ())
    assert (tmp_path / "package" / "embeddings_bf16.bin").stat().st_size == 1857 * 40 * 2


def test_a_package_is_replaced_by_force_and_nothing_else_is(exact, tmp_path):
    target = shutil.copytree(exact, tmp_path / "package")
    arguments = ("package", "mnn-llm", GOLDEN, "-o", target, "--bits", "8", "--no-check", "--force")
    assert not glmexport(*arguments).status
    assert json.loads((target / "manifest.json").read_text("utf-8"))["check"] is None
    (target / "mine.txt").touch()
    assert_one_sentence(glmexport(*arguments), "mine.txt")


@pytest.mark.parametrize("bits", [4, 16])
def test_the_apps_way_to_load_gives_the_same_tokens(tmp_path, bits):
    """Weights mapped from files that the engine makes the first time and finds the second."""
    write(GOLDEN, tmp_path / "package", bits=bits, check=NEVER)
    with open_checkpoint(GOLDEN, require_weights=False) as checkpoint:
        prompts = random_prompts(checkpoint.config)[::5]
    expected = ask(tmp_path / "package", prompts, STEPS).tokens
    for _ in range(2):
        settings = {"use_mmap": True, "tmp_path": str(tmp_path)}
        assert ask(tmp_path / "package", prompts, STEPS, settings=settings).tokens == expected


def test_bad_input_is_one_sentence(exact, tmp_path, small_checkpoint, monkeypatch):
    target = tmp_path / "package"
    assert_one_sentence(glmexport("package", "mnn-llm", tmp_path / "no", "-o", target), "does not exist")
    assert_one_sentence(glmexport("package", "mnn-llm", small_checkpoint, "-o", target), "ice_text.model")
    assert_one_sentence(glmexport("package", "mnn-llm", GOLDEN, "-o", exact), "exists already")
    assert_one_sentence(glmexport("inspect", exact), "mnn-llm")
    float32 = write_checkpoint(tmp_path / "float32", dtype=torch.float32)
    assert_one_sentence(glmexport("package", "mnn-llm", float32, "-o", target, "--bits", "16"), "--bits 32")
    monkeypatch.setattr(converter.importlib.util, "find_spec", lambda name: None)
    assert_one_sentence(glmexport("package", "mnn-llm", GOLDEN, "-o", target), "pip install 'glmexport[mnn]'")
    assert not target.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatglm-6b-tiny", "tiny-chatglm"])
@pytest.mark.parametrize("bits", ["16", "8", "4"])
def test_both_examples_from_checkpoint_and_bundle(tmp_path, name, bits):
    checkpoint = ROOT / "examples" / name
    split_directory(checkpoint, tmp_path / "bundle", opset=17)
    for number, source in enumerate((checkpoint, tmp_path / "bundle")):
        done = glmexport(
            "package", "mnn-llm", source, "-o", tmp_path / str(number), "--bits", bits, "--json", "-", "-q"
        )
        assert not done.status, done.stderr
        check = json.loads(done.stdout)["check"]
        assert check["prompts"] >= 20
        assert check["same"] >= check["tokens"] * {"16": 1.0, "8": 0.95, "4": 0.8}[bits]
