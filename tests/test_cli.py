"""The command line: one sentence and a status for everything that a person can get wrong, and results for programs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import torch
from checkpoints import write_checkpoint
from click.testing import CliRunner
from conftest import listing, record_again

from glmexport import __version__
from glmexport.bundle import looks_like_bundle, open_bundle
from glmexport.cli.main import COMMANDS, cli, run
from glmexport.interface import DEFAULT_OPSET

GLM_CONFIGS = {
    "ChatGLM2 or ChatGLM3": {"model_type": "chatglm", "padded_vocab_size": 65024, "multi_query_attention": True},
    "GLM-4-9B": {"model_type": "chatglm", "padded_vocab_size": 151552, "multi_query_attention": True},
    "glm4": {"model_type": "glm4"},
    "llama": {"model_type": "llama"},
}


class Result(NamedTuple):
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def glmexport(monkeypatch, capsys) -> Callable[..., Result]:
    """Run the command line in this process, exit status and all."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["glmexport", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            run()
        except SystemExit as done:
            status = done.code
        return Result(status, *capsys.readouterr())

    return call


def assert_one_sentence(result: Result, *words: str, extra_lines: bool = False) -> None:
    assert result.status == 2, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    text = result.stderr.removeprefix("Error: ")
    assert result.stderr.startswith("Error: ")
    if not extra_lines:
        assert text.count("\n") == 1, "one line"
        assert text.rstrip().endswith(".")
    for word in words:
        assert word in text


# Start-up


def best_seconds(*command: str) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_import_and_help_are_quick_and_load_no_torch():
    code = (
        "import sys, glmexport\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from glmexport.cli.main import run\n"
        "sys.argv = ['glmexport', '--help']\n"
        "try:\n    run()\nexcept SystemExit as done:\n    assert not done.code\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert best_seconds("-c", "import glmexport") < 0.5
    assert best_seconds("-m", "glmexport", "--help") < 0.5


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS), ["convert", "mnn"]], ids=lambda command: " ".join(command) or "main"
)
def test_every_help_shows_an_example(command):
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    assert re.search(r"^  Examples?:\n( +glmexport .*\n)+", result.output, re.MULTILINE), "lines are kept as they are"
    assert "\\b" not in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_quiet(name):
    command = cli.get_command(None, name)
    words = [[name, one] for one in command.commands] if isinstance(command, click.Group) else [[name]]
    for command_line in words:
        output = CliRunner().invoke(cli, [*command_line, "--help"]).output
        assert "-q, --quiet" in output
        assert re.search(r"^  Examples?:$", output, re.MULTILINE)


def test_the_main_help_lists_every_command():
    output = CliRunner().invoke(cli, ["--help"]).output
    for name, (_, text) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", output, re.MULTILINE)


def test_version(glmexport):
    assert glmexport("--version").stdout == f"glmexport, version {__version__}\n"


def test_the_default_opset_is_the_exporters():
    split = cli.get_command(None, "split")
    (option,) = (parameter for parameter in split.params if parameter.name == "opset")
    assert option.default == DEFAULT_OPSET


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["split"],
        ["split", "x"],
        ["split", "x", "-o", "y", "--opset", "13"],
        ["split", "x", "-o", "y", "--argmax=maybe"],
        ["verify", "x"],
        ["verify", "x", "y", "--steps", "0"],
        ["inspect", "--frobnicate", "x"],
    ],
)
def test_usage_errors(glmexport, arguments):
    result = glmexport(*arguments)
    assert result.status == 2
    assert re.search(r"^Usage: .*glmexport( \w+)? \[OPTIONS\]", result.stderr)
    assert "Traceback" not in result.stderr


# Bad input: the list of the requirements


def damaged_checkpoint(kind: str, tmp_path: Path) -> Path:
    fmt = {"index": "safetensors-sharded", "truncated safetensors": "safetensors"}.get(kind, "bin")
    directory = write_checkpoint(tmp_path / "checkpoint", fmt=fmt, tokenizer=False)
    weights = directory / "pytorch_model.bin"
    config = directory / "config.json"
    raw = json.loads(config.read_text())
    match kind:
        case "no config":
            config.unlink()
        case "config no JSON":
            config.write_text("{'model_type': 'chatglm'")
        case "keys missing":
            config.write_text(json.dumps({key: raw[key] for key in raw if key not in ("num_layers", "hidden_size")}))
        case "truncated":
            os.truncate(weights, weights.stat().st_size // 2)
        case "truncated safetensors":
            os.truncate(directory / "model.safetensors", 5000)
        case "corrupt":
            weights.write_bytes(b"\x00" * 5000)
        case "git-lfs pointer":
            weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
        case "index":
            next(directory.glob("model-00002*")).unlink()
        case "pickle with code":
            weights.write_bytes(pickle.dumps({"a": os.getcwd}))
        case "pickle with objects":
            torch.save({"transformer.word_embeddings.weight": [1, 2]}, weights)
        case "no weights":
            weights.unlink()
    return directory


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no config", ["is not a checkpoint directory", "config.json"]),
        ("config no JSON", ["config.json"]),
        ("keys missing", ["`num_layers` must be", "`hidden_size` must be", "no such key"]),
        ("truncated", ["pytorch_model.bin"]),
        ("truncated safetensors", ["model.safetensors"]),
        ("corrupt", ["pytorch_model.bin"]),
        ("git-lfs pointer", ["pytorch_model.bin", "git"]),
        ("index", ["model-00002-of-00003.safetensors"]),
        ("pickle with code", ["pytorch_model.bin"]),
        ("pickle with objects", ["pytorch_model.bin"]),
        ("no weights", ["checkpoint"]),
    ],
)
def test_a_damaged_checkpoint(glmexport, tmp_path, kind, words):
    checkpoint = damaged_checkpoint(kind, tmp_path)
    before = listing(tmp_path)
    assert_one_sentence(glmexport("split", checkpoint, "-o", tmp_path / "bundle"), *words)
    assert listing(tmp_path) == before
    assert_one_sentence(glmexport("inspect", checkpoint), *words)


@pytest.mark.parametrize("name", GLM_CONFIGS)
def test_another_model_is_named(glmexport, tmp_path, name):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(GLM_CONFIGS[name]))
    result = glmexport("split", tmp_path / "checkpoint", "-o", tmp_path / "bundle")
    assert_one_sentence(result, name.split(" or ")[0], "supported: ChatGLM-6B")


def test_missing_and_misshapen_tensors_are_listed(glmexport, tmp_path):
    directory = write_checkpoint(tmp_path / "checkpoint", tokenizer=False)
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    del tensors["transformer.layers.0.mlp.dense_h_to_4h.bias"]
    tensors["transformer.final_layernorm.weight"] = torch.zeros(7)
    torch.save(tensors, directory / "pytorch_model.bin")
    result = glmexport("split", directory, "-o", tmp_path / "bundle")
    words = ["transformer.layers.0.mlp.dense_h_to_4h.bias [64]", "found [7], expected [32]"]
    assert_one_sentence(result, *words, extra_lines=True)


def test_no_such_checkpoint(glmexport, tmp_path):
    for path in (tmp_path / "absent", Path(__file__)):
        assert_one_sentence(glmexport("split", path, "-o", tmp_path / "bundle"), str(path))


def test_a_disk_too_small(glmexport, small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - 5000, 5000))
    assert_one_sentence(glmexport("split", small_checkpoint, "-o", tmp_path / "bundle"), "MB free and the bundle needs")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_refused(glmexport, small_checkpoint, small_copy, tmp_path):
    checkpoint = shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_text("mine")
    before = listing(tmp_path)
    assert_one_sentence(glmexport("split", checkpoint, "-o", checkpoint / "bundle"), "inside the checkpoint directory")
    assert_one_sentence(glmexport("split", checkpoint, "-o", small_copy), "exists already", "--force")
    assert_one_sentence(
        glmexport("split", checkpoint, "-o", tmp_path / "foreign", "--force"), "neither empty nor a bundle"
    )
    assert_one_sentence(glmexport("split", checkpoint, "-o", checkpoint, "--force"), "neither empty nor a bundle")
    assert_one_sentence(glmexport("split", checkpoint, "-o", tmp_path / ("x" * 300)), "File name too long")
    assert listing(tmp_path) == before


def test_bundles_that_are_none(glmexport, small_checkpoint, small_copy, golden_checkpoint, tmp_path):
    assert_one_sentence(glmexport("verify", tmp_path, small_checkpoint), "is not a bundle")
    assert_one_sentence(glmexport("verify", small_copy, golden_checkpoint, "-q"), "was not made from")
    (small_copy / "manifest.json").write_text('{"schema": 99}')
    assert_one_sentence(glmexport("inspect", small_copy), "has schema 99, expected 2")


# Results


@pytest.fixture(scope="module")
def split_once(small_checkpoint, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One real process: `python -m glmexport split … --verify`."""
    bundle = tmp_path_factory.mktemp("cli") / "bundle"
    command = ["-m", "glmexport", "split", small_checkpoint, "-o", bundle, "--opset", "14", "--argmax", "--verify"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    return bundle, done


def test_split_and_verify_in_a_process_of_their_own(split_once):
    bundle, done = split_once
    assert done.returncode == 0
    assert re.search(r"bundle: 4 graphs, 8 files, ", done.stdout)
    assert re.search(r"^PASS \d+ checks, greedy tokens 35/35, worst absolute error", done.stdout, re.MULTILINE)
    assert open_bundle(bundle).argmax == "also"
    assert open_bundle(bundle).opset == 14
    assert "\x1b" not in done.stdout + done.stderr, "plain when not a terminal"
    assert [line for line in done.stderr.splitlines() if line.startswith("Note: ")], "notices are on stderr"
    assert re.search(r"^\[ *\d+%\] glm_block_1$", done.stderr, re.MULTILINE), "progress is on stderr"
    assert not re.search("Warning|Traceback", done.stderr), "nothing of the exporters' chatter"


def test_quiet_split_says_nothing_on_stderr(glmexport, small_checkpoint, tmp_path):
    result = glmexport("split", "-q", small_checkpoint, "-o", tmp_path / "bundle", "--opset", 14)
    assert (result.status, result.stderr) == (0, "")
    assert "4 graphs" in result.stdout


def test_a_bare_argmax_takes_no_argument(glmexport, small_checkpoint, tmp_path):
    for number, words in enumerate((["--argmax", small_checkpoint], [small_checkpoint, "--argmax", "only"])):
        result = glmexport("split", *words, "-o", tmp_path / str(number), "--opset", 14, "-q")
        assert result.status == 0, result.stderr
    assert [open_bundle(tmp_path / name).argmax for name in "01"] == ["also", "only"]


def test_nan_weights_are_a_note_and_status_0(glmexport, tmp_path):
    directory = write_checkpoint(tmp_path / "checkpoint", tokenizer=False)
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    tensors["transformer.layers.0.attention.dense.weight"][0, 0] = float("nan")
    torch.save(tensors, directory / "pytorch_model.bin")
    result = glmexport("split", directory, "-o", tmp_path / "bundle", "--opset", 14)
    assert result.status == 0
    assert "Note: transformer.layers.0.attention.dense.weight holds NaN or infinite values" in result.stderr


def test_dry_run_writes_nothing(glmexport, small_checkpoint, small_bundle, tmp_path):
    result = glmexport("split", small_checkpoint, "-o", tmp_path / "deep" / "bundle", "--dry-run")
    assert (result.status, result.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    for path in small_bundle.glob("*.data"):
        assert re.search(rf"^{re.escape(path.name)} +{path.stat().st_size:,} ", result.stdout, re.MULTILINE)
    assert "disk needed" in result.stdout
    assert "peak memory  about" in result.stdout


def test_verify_passes(glmexport, small_bundle, small_checkpoint, tmp_path):
    report = tmp_path / "report.json"
    result = glmexport("verify", small_bundle, small_checkpoint, "--json", report, "--steps", 1, "-q")
    assert (result.status, result.stderr) == (0, "")
    header, *lines = result.stdout.splitlines()
    assert header.split("  ")[0] == "graph"
    for column in ("case", "max abs error", "relative error", "verdict"):
        assert column in header
    document = json.loads(report.read_text("utf-8"))
    assert document["passed"] is True
    assert len(lines) == len(document["rows"]) + 1, "a line each and the verdict"
    assert lines[-1].startswith("PASS")


def test_a_failed_verification_has_status_1(glmexport, small_copy, small_checkpoint):
    path = small_copy / "glm_block_0.onnx.data"
    content = bytearray(path.read_bytes())
    content[3] ^= 0x80
    path.write_bytes(content)
    result = glmexport("verify", small_copy, small_checkpoint, "-q")
    assert (result.status, result.stderr) == (1, "")
    assert re.search(
        r"^glm_block_0\.onnx\.data +files .*FAIL +glm_block_0\.onnx\.data was changed", result.stdout, re.M
    )
    record_again(small_copy, path.name)
    result = glmexport("verify", small_copy, small_checkpoint, "-q", "--json", "-", "--steps", 1)
    assert result.status == 1
    document = json.loads(result.stdout)
    assert document["passed"] is False
    assert {row["graph"] for row in document["rows"] if not row["passed"]} >= {"glm_block_0"}


def test_a_surplus_file_of_any_name_is_named(glmexport, small_copy, small_checkpoint):
    """Also one that looks like markup to the table."""
    for name in ("[bold]surplus", "[", "[nothing"):
        (small_copy / name).write_text("x")
    result = glmexport("verify", small_copy, small_checkpoint, "-q")
    assert result.status == 1
    for name in ("[bold]surplus", "[", "[nothing"):
        assert f"{name} is not in the manifest." in result.stdout


def test_a_report_that_cannot_be_written(glmexport, small_bundle, small_checkpoint, tmp_path):
    result = glmexport("verify", small_bundle, small_checkpoint, "-q", "--steps", 1, "--json", tmp_path / "no" / "file")
    assert result.status == 2
    assert "could not be written (No such file or directory)" in result.stderr
    assert "Traceback" not in result.stderr


def test_inspect_a_checkpoint(glmexport, golden_checkpoint):
    document = json.loads(glmexport("inspect", golden_checkpoint, "--json", "-q").stdout)
    assert document["kind"] == "checkpoint"
    assert document["model"]["vocab_size"] == 1856
    assert document["special_ids"] == {"mask": 1500, "gmask": 1501, "bos": 1504, "eos": 1505, "pad": 3, "forced": 5}
    parts = {part["name"]: part for part in document["parts"]}
    assert list(parts) == ["embedding", "glm_block_0", "glm_block_1", "glm_block_2", "lm"]
    assert parts["embedding"] == {
        "name": "embedding",
        "parameters": 1856 * 64,
        "bytes": 2 * 1856 * 64,
        "dtypes": "float16",
    }
    table = glmexport("inspect", golden_checkpoint).stdout
    assert re.search(r"^embedding +118,784 +237,568 +237\.6 kB +float16", table, re.MULTILINE)
    total = sum(part["parameters"] for part in parts.values())
    assert re.search(rf"^total +{total:,} ", table, re.MULTILINE)


def test_inspect_a_bundle(glmexport, golden_bundle):
    document = json.loads(glmexport("inspect", golden_bundle, "--json").stdout)
    assert document["kind"] == "bundle"
    assert document["opset"] == DEFAULT_OPSET
    for part in document["parts"]:
        size = sum((golden_bundle / f"{part['name']}.onnx{ending}").stat().st_size for ending in ("", ".data"))
        assert part["bytes"] == size
        assert part["dtypes"] == "float32"
    assert document["parts"][0]["parameters"] == 1856 * 64
    assert re.search(r"^total +", glmexport("inspect", golden_bundle).stdout, re.MULTILINE)


def test_inspect_reads_no_tensor(glmexport, golden_checkpoint, monkeypatch):
    monkeypatch.setattr("glmexport.weights.Weights.read", lambda *_: pytest.fail("was read"))
    monkeypatch.setattr("glmexport.weights.Weights.read_rows", lambda *_: pytest.fail("was read"))
    assert glmexport("inspect", golden_checkpoint).status == 0


INTERRUPTED = """
import os, signal, sys
from glmexport.bundle_writer import HashingFile
write, left = HashingFile.write, 2
def interrupting(self, data):
    global left
    write(self, data)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGINT)
HashingFile.write = interrupting
from glmexport.cli.main import run
run()
"""


def test_ctrl_c_before_a_graph_is_finished_ends_with_130_and_leaves_nothing(small_checkpoint, tmp_path):
    arguments = ["split", str(small_checkpoint), "-o", str(tmp_path / "bundle"), "--opset", "14"]
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.rstrip().endswith("Stopped.")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "moment",
    ["glmexport.splitter.check_patch", "glmexport.checkpoint_draft.skeleton_for", "glmexport.draft_writer.lint_graph"],
)
def test_ctrl_c_at_any_stage(glmexport, small_checkpoint, tmp_path, monkeypatch, moment):
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, interrupted)
    result = glmexport("split", small_checkpoint, "-o", tmp_path / "bundle", "--opset", 14)
    assert result.status == 130
    assert not [path for path in tmp_path.iterdir() if looks_like_bundle(path)]
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_that_a_callback_swallows_still_ends_the_run(glmexport, small_checkpoint, tmp_path, monkeypatch):
    """Python prints and drops a KeyboardInterrupt inside a finalizer, as in torch's weak references."""
    from glmexport.splitter import check_patch

    def swallowing(*arguments: object) -> float:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return check_patch(*arguments)

    monkeypatch.setattr("glmexport.splitter.check_patch", swallowing)
    before = signal.getsignal(signal.SIGINT)
    for quiet in ((), ("-q",)):
        result = glmexport("split", small_checkpoint, "-o", tmp_path / "bundle", "--opset", 14, *quiet)
        assert result.status == 130
        assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before, "ignored, where the tests run in the background of a script"


def test_an_empty_output_is_refused(glmexport, small_checkpoint):
    result = glmexport("split", small_checkpoint, "-o", "")
    assert result.status == 2
    assert "the name of a directory to make is needed" in result.stderr


def test_a_dry_run_refuses_an_output_inside_the_checkpoint(glmexport, small_checkpoint):
    result = glmexport("split", small_checkpoint, "-o", small_checkpoint / "bundle", "--dry-run")
    assert_one_sentence(result, "inside the checkpoint directory")


def test_a_bug_keeps_its_traceback(glmexport, small_checkpoint, tmp_path, monkeypatch):
    """Only what people and files can cause becomes a sentence."""

    def bug(*_args: object, **_options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("glmexport.splitter.check_patch", bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        glmexport("split", small_checkpoint, "-o", tmp_path / "bundle")
