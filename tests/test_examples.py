"""What the README and examples/ show is run, and compared with what the original code computed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, split_directory

from glmexport.checkpoint import open_checkpoint


def run(*arguments: str | Path, cwd: Path | None = None) -> str:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


@pytest.mark.parametrize("case", ["short", "one", "long"])
def test_greedy_onnxruntime(golden_bundle, golden, case):
    prompt = [str(token) for token in golden[f"{case}.input_ids"][0]]
    answer = [int(token) for token in run(ROOT / "examples" / "greedy_onnxruntime.py", golden_bundle, *prompt).split()]
    expected = golden[f"{case}.greedy"].tolist()
    assert len(answer) == 8
    assert answer[: len(expected)] == expected[:8]


def test_the_readmes_program_and_the_example_agree(golden_bundle, tmp_path):
    (tmp_path / "bundle").symlink_to(golden_bundle)
    (program,) = re.findall(r"```python\n(import numpy.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "program.py").write_text(program, "utf-8")
    prompt = re.search(r"np\.array\(\[\[([\d, ]+)\]\]\)", program)[1].split(", ")
    expected = run(ROOT / "examples" / "greedy_onnxruntime.py", golden_bundle, *prompt).split()
    assert run("program.py", cwd=tmp_path).split() == expected


def test_the_readmes_reference(golden_checkpoint, golden, tmp_path):
    (tmp_path / "chatglm-6b").symlink_to(golden_checkpoint)
    (program,) = re.findall(
        r"```python\n(from glmexport\.models.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )
    before = f"import torch\ninput_ids = torch.tensor({golden['short.input_ids'].tolist()})\n"
    shown = program.replace("model.generate(", "print(*model.generate(").rstrip() + "[0].tolist())\n"
    (tmp_path / "program.py").write_text(before + shown, "utf-8")
    tokens = [int(token) for token in run("program.py", cwd=tmp_path).split()]
    assert tokens[5:13] == golden["short.greedy"].tolist()


@pytest.mark.parametrize(("weights", "head"), [("bin", "tied"), ("bin", "none"), ("safetensors", "own")])
def test_a_small_synthetic_checkpoint(tmp_path, weights, head):
    """The one of the full-size measurements, made small."""
    sizes = ["--blocks", "2", "--hidden", "16", "--heads", "2", "--vocab", "60", "--shards", "3"]
    directory = tmp_path / "checkpoint"
    program = ROOT / "benchmarks" / "synthesize.py"
    assert "in 3 shards" in run(program, directory, *sizes, "--format", weights, "--head", head)
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.config.num_blocks == 2
        assert checkpoint.has_own_head == (head != "none")
        assert len(checkpoint.weights.files) == 3
        tied = bool((checkpoint.read("lm_head.weight") == checkpoint.read(checkpoint.embedding_name)).all())
    assert tied == (head != "own")


TINY = ROOT / "examples" / "tiny-chatglm"
HELD_OUT = ROOT / "examples" / "tiny-chatglm-heldout.jsonl"


@pytest.fixture(scope="module")
def answering(shared) -> Path:
    """The example that answers, in float32; its int4 form is made by the example that splits."""
    return shared("answering", lambda path: split_directory(TINY, path, opset=17))


def test_the_example_that_splits_and_runs_streams_and_compares(answering, tmp_path):
    bundle = tmp_path / "int4"
    written, answer = run(ROOT / "examples" / "split_and_run.py", TINY, bundle, "12+34=").splitlines()
    assert written.startswith(f"{bundle}: 5 graphs, ")
    assert answer == "46"
    rounds = run(ROOT / "examples" / "stream_tokens.py", bundle, "我叫小明。", "我叫什么名字？").splitlines()
    assert rounds[0] == "你好，小明！"
    assert rounds[2] == "你叫小明。"
    assert re.fullmatch(r"\[\d+ tokens, end, KV cache [\d,]+ bytes\]", rounds[3])
    float_line, int4_line, *_ = run(ROOT / "examples" / "compare_int4.py", answering, bundle, HELD_OUT).splitlines()
    for line in (float_line, int4_line):
        exact = int(re.search(r"(\d+)/200 exact", line)[1])
        assert exact >= 190, "95 % of the held-out questions"


def test_the_answering_example_has_the_first_revisions_layout():
    config = json.loads((TINY / "config.json").read_text("utf-8"))
    assert not {"mask_token_id", "gmask_token_id", "pad_token_id"} & config.keys()
    assert json.loads((TINY / "tokenizer_config.json").read_text("utf-8"))["num_image_tokens"] == 256
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 6_000_000
    with open_checkpoint(TINY) as checkpoint:
        assert [path.name for path in checkpoint.weights.files] == [
            f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)
        ]
        assert {checkpoint.weights.info(name).dtype for name in checkpoint.weights.names()} == {"float16"}


@pytest.mark.slow
def test_the_readmes_api(tmp_path):
    (tmp_path / "chatglm-6b").symlink_to(TINY)
    (program,) = re.findall(r"```python\n(import glmexport.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "program.py").write_text(program, "utf-8")
    shown = run("program.py", cwd=tmp_path)
    assert "46 [" in shown
    assert "] end " in shown


@pytest.mark.slow
def test_training_begins_as_the_script_says(tmp_path):
    """A few steps; what they write is a checkpoint, the held-out list the one in the repository."""
    run(ROOT / "examples" / "train_tiny.py", tmp_path / "tiny", "--steps", "2")
    assert (tmp_path / "tiny-heldout.jsonl").read_bytes() == HELD_OUT.read_bytes()
    assert (tmp_path / "tiny" / "ice_text.model").read_bytes() == (TINY / "ice_text.model").read_bytes()
    with open_checkpoint(tmp_path / "tiny") as checkpoint:
        assert checkpoint.config.num_image_tokens == 256
