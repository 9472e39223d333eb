"""Split bundles, run with plain onnxruntime through the graphs' interface only, against the original and PyTorch."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import make_config, make_tensors, write_checkpoint, write_weights
from conftest import listing, split_directory
from tolerances import GOLDEN

from glmexport.bundle import check_files, looks_like_bundle, open_bundle, sha256_of
from glmexport.checkpoint import open_checkpoint
from glmexport.config import ModelConfig
from glmexport.errors import BundleError, CheckpointError, ExportError
from glmexport.models.chatglm_6b import ChatGLMForConditionalGeneration, build_reference
from glmexport.prompt import prepare_prompt
from glmexport.splitter import LIBRARY_BYTES, SplitOptions, plan_split, split
from glmexport.stored import stored_tensors_of
from glmexport.trace import TRACED_LENGTHS
from glmexport.weights import Weights

ROWS_HIDDEN = 3  # padding id of the golden checkpoint
CASES = ("short", "one", "long", "mask", "batch", "far")


class Graphs:
    """The ONNX files of a directory; knows their names, inputs and outputs and nothing else of the project."""

    def __init__(self, directory: Path) -> None:
        count = len([path for path in directory.glob("glm_block_*.onnx") if path.suffix == ".onnx"])
        self._embedding = self._open(directory / "embedding.onnx")
        self._blocks = [self._open(directory / f"glm_block_{i}.onnx") for i in range(count)]
        self._head = self._open(directory / "lm.onnx")
        _, _, _, self._heads, self._head_dim = self._blocks[0].get_inputs()[3].shape

    @staticmethod
    def _open(path: Path) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def empty_cache(self, batch: int) -> list[np.ndarray]:
        return [np.zeros((2, 0, batch, self._heads, self._head_dim), np.float32) for _ in self._blocks]

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: list[np.ndarray]):
        """(hidden states at every edge, logits of the last position, grown cache)."""
        (hidden,) = self._embedding.run(["inputs_embeds"], {"input_ids": ids})
        edges, grown = [hidden], []
        for block, past in zip(self._blocks, cache, strict=True):
            feeds = {
                "inputs_embeds": hidden,
                "attention_mask": mask,
                "position_ids": positions,
                "past_key_values": past,
            }
            hidden, presents = block.run(["hidden_states", "presents"], feeds)
            edges.append(hidden)
            grown.append(presents)
        (logits,) = self._head.run(["logits"], {"hidden_states": hidden})
        return edges, logits, grown


@pytest.fixture(scope="module")
def golden_graphs(golden_bundle) -> Graphs:
    return Graphs(golden_bundle)


def golden_mask(golden: dict[str, np.ndarray], case: str) -> np.ndarray:
    if case != "far":
        return golden[f"{case}.attention_mask"]
    seq = golden["far.input_ids"].shape[1]
    mask = np.zeros((1, 1, seq, seq), bool)
    mask[..., :-1, -1] = True  # all see the context, only the last row sees <sop>
    return mask


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= GOLDEN


@pytest.mark.parametrize("case", CASES)
def test_the_golden_checkpoint_computes_what_the_original_does(golden_graphs, golden, case):
    ids, positions, mask = golden[f"{case}.input_ids"], golden[f"{case}.position_ids"], golden_mask(golden, case)
    batch = ids.shape[0]
    edges, logits, cache = golden_graphs.step(ids, mask, positions, golden_graphs.empty_cache(batch))
    if case != "far":
        real = (ids != ROWS_HIDDEN).T  # [seq, batch]; padding computes something that nobody reads
        for found, expected in zip(edges[:-1], golden[f"{case}.hidden_states"][:-1], strict=True):
            close(found[real], expected[real])
        expected_presents = golden.get(f"{case}.presents0")
        if expected_presents is not None:
            close(cache[0][:, real], expected_presents[:, real])
    expected_logits = golden[f"{case}.prefill_logits"]
    close(logits, expected_logits[:, -1] if expected_logits.ndim == 3 else expected_logits)
    row = mask[:, :, -1:]
    steps = zip(golden[f"{case}.greedy"], golden[f"{case}.decode_position_ids"], strict=True)
    for number, (token, places) in enumerate(steps):
        token = np.atleast_1d(token)
        assert logits.argmax(-1).tolist() == token.tolist(), f"greedy token {number}"
        row = np.concatenate([row, np.zeros((batch, 1, 1, 1), bool)], axis=-1)
        _, logits, cache = golden_graphs.step(token[:, None], row, places.reshape(batch, 2, 1), cache)
        close(logits, golden[f"{case}.decode_logits"][number].reshape(batch, -1))
    if f"{case}.presents_last" in golden:
        close(cache[-1], golden[f"{case}.presents_last"])


@dataclass(frozen=True)
class Variant:
    """One kind of checkpoint that a user can have."""

    name: str
    options: dict[str, Any]
    tied: bool = False
    opset: int = 18


VARIANTS = [
    Variant("sharded-bin", {"fmt": "bin-sharded", "hidden_size": 24, "heads": 3, "inner": 40, "num_blocks": 3}),
    Variant(
        "first-revision",
        {"fmt": "bin", "first_revision": True, "image_tokens": 200, "hidden_size": 16, "heads": 1, "num_blocks": 1},
        opset=16,
    ),
    Variant(
        "safetensors-bfloat16",
        {"fmt": "safetensors", "dtype": torch.bfloat16, "tied": True, "hidden_size": 16, "heads": 4},
        tied=True,
        opset=17,
    ),
    Variant(
        "safetensors-sharded-float32-no-head",
        {
            "fmt": "safetensors-sharded",
            "dtype": torch.float32,
            "with_head": False,
            "inner": 200,
            "with_inv_freq": False,
        },
        tied=True,
        opset=15,
    ),
    Variant("no-tokenizer", {"fmt": "bin", "tokenizer": False, "hidden_size": 40, "heads": 5, "inner": 7}, opset=14),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def variant(request, shared) -> tuple[Variant, Path, Path]:
    kind: Variant = request.param
    checkpoint = shared(f"{kind.name}-checkpoint", lambda path: write_checkpoint(path, seed=3, **kind.options))
    bundle = shared(f"{kind.name}-bundle", lambda path: split_directory(checkpoint, path, opset=kind.opset))
    return kind, checkpoint, bundle


def reference_of(checkpoint: Path) -> tuple[ModelConfig, ChatGLMForConditionalGeneration]:
    """The unpatched model with the checkpoint's weights in float32."""
    with open_checkpoint(checkpoint) as source:
        model = build_reference(source.config)
        model.load_state_dict({name: source.read(name).float() for name in model.state_dict()})
        return source.config, model


def prompts(config: ModelConfig) -> dict[str, list[list[int]]]:
    ids, generator = config.special_ids, np.random.default_rng(5)

    def words(count: int) -> list[int]:
        low = config.num_image_tokens + 4
        return generator.integers(low, low + 100, count).tolist()

    return {
        "only the special tokens": [[ids.gmask, ids.bos]],
        "eleven": [[*words(9), ids.gmask, ids.bos]],
        "infilling": [[*words(4), ids.mask, *words(7), ids.bos]],
        "three rows": [
            [*words(1), ids.gmask, ids.bos],
            [*words(3), ids.mask, *words(2), ids.bos],
            [*words(12), ids.gmask, ids.bos],
        ],
    }


def test_other_checkpoints_compute_what_the_unpatched_model_does(variant):
    _, checkpoint, bundle = variant
    config, model = reference_of(checkpoint)
    graphs = Graphs(bundle)
    for rows in prompts(config).values():
        prompt = prepare_prompt(rows, config.special_ids)
        batch, seq = prompt.input_ids.shape
        assert (batch, seq) != (TRACED_LENGTHS["batch"], TRACED_LENGTHS["seq"])
        ids, mask, positions = prompt.input_ids, prompt.attention_mask, prompt.position_ids
        cache, past = graphs.empty_cache(batch), None
        real = np.arange(seq)[:, None] >= prompt.pad_lengths[None, :]  # [seq, batch]
        for step in range(4):
            if step:
                mask, positions = prompt.decode_step(step - 1)
            edges, logits, cache = graphs.step(ids, mask, positions, cache)
            with torch.inference_mode():
                tensors = [torch.from_numpy(array) for array in (ids, positions, mask)]
                final, past, hidden = model.transformer(*tensors, past)
                expected_logits = model.lm_head(final)[-1].numpy()
            keep = real if step == 0 else np.ones((1, batch), bool)
            for found, expected in zip(edges[:-1], hidden[:-1], strict=True):
                close(found[keep], expected.numpy()[keep])
            places = np.concatenate([real, np.ones((step, batch), bool)])
            for found, expected in zip(cache, past, strict=True):
                close(found[:, places], torch.stack(expected).numpy()[:, places])
            close(logits, expected_logits)
            assert logits.argmax(-1).tolist() == expected_logits.argmax(-1).tolist()
            ids = expected_logits.argmax(-1)[:, None]


def test_the_manifest_says_what_the_bundle_holds(variant):
    kind, checkpoint, directory = variant
    bundle = open_bundle(directory)
    manifest = bundle.manifest
    assert [complaint for _, complaint in check_files(bundle) if complaint] == []
    assert sorted(path.name for path in directory.iterdir()) == sorted([*bundle.files, "manifest.json"])
    for name, record in bundle.files.items():
        assert record.sha256 == sha256_of(directory / name)
        assert record.bytes == (directory / name).stat().st_size
    blocks = kind.options.get("num_blocks", 2)
    assert [graph["name"] for graph in bundle.graphs] == [
        "embedding",
        *(f"glm_block_{i}" for i in range(blocks)),
        "lm",
    ]
    assert [graph.get("block_id") for graph in bundle.graphs] == [None, *range(blocks), None]
    assert manifest["tied"] is kind.tied
    assert (bundle.opset, bundle.argmax) == (kind.opset, "none")
    raw = json.loads((checkpoint / "config.json").read_text())
    model = manifest["model"]
    assert (model["vocab_size"], model["hidden_size"]) == (raw["vocab_size"], raw["hidden_size"])
    assert model["special_ids"]["bos"] == raw["bos_token_id"]
    assert model["special_ids"]["gmask"] == raw["bos_token_id"] - 3
    assert manifest["tools"]["torch"].startswith(torch.__version__.split("+")[0])
    assert manifest["tools"]["python"] == platform.python_version()
    assert manifest["history"][0]["step"] == "split"
    for graph in bundle.graphs:
        loaded = onnx.load(directory / graph["file"], load_external_data=False)
        for signature, values in ((graph["inputs"], loaded.graph.input), (graph["outputs"], loaded.graph.output)):
            found = [
                [value.name, [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]]
                for value in values
            ]
            assert [[entry["name"], entry["shape"]] for entry in signature] == found
        operators = [node.op_type for node in loaded.graph.node]
        assert graph["operators"] == {name: operators.count(name) for name in sorted(set(operators))}
    stored = {"no-tokenizer": []}.get(kind.name, ["tokenizer_config.json", "ice_text.model"])
    assert manifest["tokenizer"] == stored
    for name in stored:
        assert (directory / name).read_bytes() == (checkpoint / name).read_bytes()


def test_no_path_of_this_machine_is_in_any_file(variant, golden_bundle):
    _, checkpoint, directory = variant
    places = {str(Path.home()), str(Path.cwd()), str(checkpoint), str(directory.parent), sys.prefix, "site-packages"}
    for path in (*directory.iterdir(), *golden_bundle.iterdir()):
        content = path.read_bytes()
        assert [place for place in places if len(place) > 1 and place.encode() in content] == [], path.name


def test_two_splits_give_the_same_bytes(variant, tmp_path):
    kind, checkpoint, directory = variant
    split_directory(checkpoint, tmp_path / "again", opset=kind.opset)
    for path in directory.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_graph_files_hold_no_weights(golden_bundle):
    for path in golden_bundle.glob("*.onnx"):
        assert path.stat().st_size < 10_000


# Notices


@pytest.fixture
def quick():
    """Trace in a fraction of the time; what is tested here does not depend on the exporter."""
    return {"opset": 14}


def test_notices_about_head_and_tokenizer(tmp_path, quick):
    checkpoint = write_checkpoint(tmp_path / "own", tokenizer=False)
    notices = split_directory(checkpoint, tmp_path / "a", **quick)
    assert len(notices) == 2
    assert re.search(r"has no tokenizer_config\.json and no ice_text\.model", notices[0])
    assert notices[1].startswith("lm_head.weight differs from transformer.word_embeddings.weight")
    for options in ({"tied": True}, {"with_head": False}):
        checkpoint = write_checkpoint(tmp_path / str(options), **options)
        bundle = tmp_path / f"{options} bundle"
        assert split_directory(checkpoint, bundle, **quick) == []
        assert open_bundle(bundle).manifest["tied"] is True


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transformer.layers.1.mlp.dense_4h_to_h.weight", float("nan")),
        ("transformer.layers.0.input_layernorm.bias", float("inf")),
        ("transformer.word_embeddings.weight", float("-inf")),
        ("lm_head.weight", float("nan")),
    ],
)
def test_weights_that_are_not_finite_are_named(tmp_path, name, value, quick):
    tensors = make_tensors(vocab_size=128)
    tensors[name].view(-1)[-1] = value
    (tmp_path / "config.json").write_text(json.dumps(make_config(vocab_size=128)))
    write_weights(tmp_path, tensors, "bin")
    output = tmp_path.with_name(f"{tmp_path.name}-bundle")
    notices = split_directory(tmp_path, output, **quick)
    assert [notice for notice in notices if "NaN or infinite" in notice] == [
        f"{name} holds NaN or infinite values; they are exported as they are."
    ]
    assert looks_like_bundle(output)


def test_a_sum_that_overflows_is_no_infinite_weight(tmp_path, quick):
    tensors = make_tensors(vocab_size=128, dtype=torch.float32)
    tensors["transformer.word_embeddings.weight"][:] = 3e38
    (tmp_path / "config.json").write_text(json.dumps(make_config(vocab_size=128)))
    write_weights(tmp_path, tensors, "safetensors")
    notices = split_directory(tmp_path, tmp_path.with_name(f"{tmp_path.name}-bundle"), **quick)
    assert not [notice for notice in notices if "infinite" in notice]


@pytest.mark.parametrize("fmt", ["bin", "safetensors"])
def test_slices_of_any_size_give_the_same_bytes(tmp_path, monkeypatch, quick, fmt):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", fmt=fmt, dtype=torch.float32)
    split_directory(checkpoint, tmp_path / "whole", **quick)
    monkeypatch.setattr("glmexport.splitter.SLICE_BYTES", 1000)
    split_directory(checkpoint, tmp_path / "sliced", **quick)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "sliced" / path.name).read_bytes() == path.read_bytes()


def test_progress_covers_every_weight(small_checkpoint, tmp_path, quick):
    counted: dict[str, int] = {}
    with open_checkpoint(small_checkpoint) as source:
        split(
            source,
            tmp_path / "bundle",
            SplitOptions(**quick),
            advance=lambda graph, count: counted.update({graph: counted.get(graph, 0) + count}),
        )
    bundle = open_bundle(tmp_path / "bundle")
    for graph in bundle.graphs:
        places = stored_tensors_of(bundle, graph["name"]).values()
        assert counted[graph["name"]] == sum(place.length for place in places)


# Refusals: before anything is written


def test_an_output_inside_the_checkpoint_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer=False)
    (tmp_path / "link").symlink_to(checkpoint)
    before = listing(checkpoint)
    for output in (checkpoint / "bundle", checkpoint / "a" / "b", tmp_path / "link" / "bundle"):
        with pytest.raises(BundleError, match="lies inside the checkpoint directory"):
            split_directory(checkpoint, output)
    with pytest.raises(BundleError, match="exists already"):
        split_directory(checkpoint, checkpoint)
    assert listing(checkpoint) == before


def test_a_checkpoint_inside_the_output_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "outer" / "checkpoint", tokenizer=False)
    before = listing(tmp_path)
    with open_checkpoint(checkpoint) as source, pytest.raises((BundleError, CheckpointError)):
        split(source, tmp_path / "outer", force=True)
    assert listing(tmp_path) == before


def test_the_checkpoint_stays_as_it_was(tmp_path, quick):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", fmt="bin-sharded")
    before, at = listing(checkpoint), checkpoint.stat().st_mtime_ns
    for path in checkpoint.iterdir():
        path.chmod(0o444)
    checkpoint.chmod(0o555)
    split_directory(checkpoint, tmp_path / "bundle", **quick)
    checkpoint.chmod(0o755)
    assert listing(checkpoint) == before
    assert checkpoint.stat().st_mtime_ns == at


def fail(*_args: object, **_options: object) -> None:
    raise AssertionError("nothing may be read or started")


@pytest.fixture
def nothing_is_read(monkeypatch):
    monkeypatch.setattr(Weights, "read", fail)
    monkeypatch.setattr(Weights, "read_rows", fail)


@pytest.mark.usefixtures("nothing_is_read")
def test_a_disk_too_small_is_found_before_starting(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("glmexport.splitter.check_patch", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - 1000, 1000))
    with pytest.raises(BundleError, match=r"has 0\.0 MB free and the bundle needs"):
        split_directory(small_checkpoint, tmp_path / "deep" / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_is_read")
def test_the_plan_gives_exact_sizes_of_the_data_and_reads_nothing(variant):
    kind, checkpoint, directory = variant
    with open_checkpoint(checkpoint) as source:
        plan = plan_split(source, SplitOptions(opset=kind.opset))
    actual = {path.name: path.stat().st_size for path in directory.iterdir()}
    assert set(plan.files) == set(actual)
    exact = [name for name in actual if not name.endswith((".onnx", "manifest.json"))]
    assert len(exact) >= kind.options.get("num_blocks", 2) + 2
    assert {name: plan.files[name] for name in exact} == {name: actual[name] for name in exact}
    assert sum(actual.values()) <= plan.disk < sum(actual.values()) + 200_000, "estimates are above, not far"
    assert plan.peak_memory > LIBRARY_BYTES


def test_the_plan_counts_pages(tmp_path):
    checkpoint = write_checkpoint(tmp_path, tokenizer=False)
    with open_checkpoint(checkpoint) as source:
        plan = plan_split(source, SplitOptions())
    matrix = 32 * 128 * 4
    assert plan.files["embedding.onnx.data"] == matrix
    assert plan.files["lm.onnx.data"] == matrix + 2 * 4096, "norm weights first, each on a page"


@pytest.mark.parametrize("options", [{"opset": 13}, {"opset": 25}, {"argmax": "maybe"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ExportError):
        SplitOptions(**options)


def test_an_unequal_patch_exports_nothing(small_checkpoint, tmp_path, monkeypatch):
    def unequal(*_args: object) -> None:
        raise ExportError("the patch is wrong")

    monkeypatch.setattr("glmexport.splitter.check_patch", unequal)
    with pytest.raises(ExportError, match="the patch is wrong"):
        split_directory(small_checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_breaks_a_rule_exports_nothing(small_checkpoint, tmp_path, monkeypatch, quick):
    monkeypatch.setattr("glmexport.draft_writer.lint_graph", lambda path, *_: [f"{path.name}: breaks a rule."])
    with pytest.raises(ExportError, match=r"A graph breaks the bundle's rules.* embedding\.onnx: breaks a rule\."):
        split_directory(small_checkpoint, tmp_path / "bundle", **quick)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_breaks_off_exports_nothing(tmp_path, quick):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", fmt="safetensors", tokenizer=False)
    with open_checkpoint(checkpoint) as source:
        os.truncate(checkpoint / "model.safetensors", (checkpoint / "model.safetensors").stat().st_size // 2)
        with pytest.raises(CheckpointError):
            split(source, tmp_path / "bundle", SplitOptions(**quick))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


SPLITTER = """
import sys
from pathlib import Path
from glmexport.bundle_writer import HashingFile
from glmexport.checkpoint import open_checkpoint
from glmexport.splitter import SplitOptions, split
import time
checkpoint, output, moment = sys.argv[1:]
write = HashingFile.write
left = int(moment)
def stopping(self, data):
    global left
    write(self, data)
    left -= 1
    if left == 0:
        print("here", flush=True)
        time.sleep(60)
HashingFile.write = stopping
with open_checkpoint(checkpoint) as source:
    split(source, Path(output), SplitOptions(opset=14))
print("done", flush=True)
"""


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_split_leaves_nothing_that_looks_complete(small_checkpoint, tmp_path, seed):
    script = tmp_path / "splitter.py"
    script.write_text(SPLITTER)
    place = tmp_path / "place"
    place.mkdir()
    moment = random.Random(seed).randint(1, 40)
    process = subprocess.Popen(
        [sys.executable, script, small_checkpoint, place / "bundle", str(moment)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n", "killed in the middle"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [path.name for path in place.iterdir()] == [".bundle.partial"]
    assert not looks_like_bundle(place / ".bundle.partial")
    split_directory(small_checkpoint, place / "bundle", opset=14)
    assert [path.name for path in place.iterdir()] == ["bundle"], "and the next run succeeds"
    assert [complaint for _, complaint in check_files(open_bundle(place / "bundle")) if complaint] == []
