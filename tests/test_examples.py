"""What the README and examples/ show is run, and compared with what the original code computed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

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
