"""`inspect --check` finds a flipped bit in whichever file it is, and every other way in which a file can be wrong."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import write_manifest
from derived_bundles import assert_one_sentence, derived, glmexport, quantize_pass

from glmexport.bundle import sha256_of
from glmexport.errors import BundleError
from glmexport.form import RAW, EmbeddingForm
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.passes.slim_vocab import SlimPass

MANIFEST = "manifest.json"


@pytest.fixture(scope="module")
def whole(shared, bundle) -> Path:
    """A bundle with every kind of file: graphs, data, raw embedding, tokenizer, vocabulary, recipe."""
    steps = (SlimPass(None, ()), EmbedPass(EmbeddingForm(RAW, "bfloat16")), quantize_pass(4, 32))
    return shared("inspect-check", lambda path: derived(bundle, path, *steps, copy=True))


@pytest.fixture
def damaged(whole, tmp_path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "bundle")


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def bad_lines(stdout: str) -> list[str]:
    return [line.removeprefix("BAD ") for line in stdout.splitlines() if line.startswith("BAD ")]


def test_a_whole_bundle_passes(whole):
    count = len(json.loads((whole / MANIFEST).read_text("utf-8"))["files"])
    result = glmexport("inspect", whole, "--check")
    assert (result.status, bad_lines(result.stdout)) == (0, [])
    assert result.stdout.splitlines()[-1] == f"All {count} files are whole: each is as the manifest says."
    assert "%] " in result.stderr
    assert glmexport("inspect", whole, "--check", "-q").stderr == ""


def test_nothing_is_hashed_unasked(damaged):
    flip(damaged / "lm.onnx.data", 5, 3)
    result = glmexport("inspect", damaged)
    assert result.status == 0
    assert "whole" not in result.stdout
    assert "check" not in json.loads(glmexport("inspect", damaged, "--json").stdout)


def test_one_flipped_bit_in_any_file_is_found(whole, damaged):
    """Every file in turn, at a random place."""
    chance = random.Random(0)
    names = sorted(path.name for path in damaged.iterdir() if path.name != MANIFEST)
    assert {"ice_text.model", "slim_vocab.txt", "recipe.toml", "slim_word_embeddings_bf16.bin", "lm.onnx"} <= set(names)
    for name in names:
        position, bit = chance.randrange((whole / name).stat().st_size), chance.randrange(8)
        flip(damaged / name, position, bit)
        result = glmexport("inspect", damaged, "--check", "-q")
        assert result.status == 1, (name, position, bit)
        assert bad_lines(result.stdout) == [f"{name} was changed: its SHA-256 is not the manifest's."]
        flip(damaged / name, position, bit)
    assert glmexport("inspect", damaged, "--check", "-q").status == 0


def test_every_other_wrong_is_named(damaged):
    (damaged / "slim_vocab.txt").unlink()
    with (damaged / "lm.onnx.data").open("ab") as file:
        file.write(b"x")
    (damaged / "lm.onnx").rename(damaged / "mine[1].onnx")
    (damaged / "lm.onnx").symlink_to(damaged / "mine[1].onnx")
    result = glmexport("inspect", damaged, "--check", "-q")
    assert result.status == 1
    lines = bad_lines(result.stdout)
    assert len(lines) == 4
    assert "lm.onnx is a link." in lines
    assert "slim_vocab.txt is missing." in lines
    assert "mine[1].onnx is not in the manifest." in lines
    (size,) = [line for line in lines if line.startswith("lm.onnx.data has ")]
    assert size.endswith("the manifest says " + str((damaged / "lm.onnx.data").stat().st_size - 1) + ".")
    assert result.stdout.splitlines()[-1] == "4 bad files: copy or make the bundle again."


def test_json(damaged):
    count = len(json.loads((damaged / MANIFEST).read_text("utf-8"))["files"])
    assert json.loads(glmexport("inspect", damaged, "--check", "--json").stdout)["check"] == {
        "checked": count,
        "bad": [],
    }
    (damaged / "recipe.toml").unlink()
    result = glmexport("inspect", damaged, "--check", "--json")
    assert result.status == 1
    found = json.loads(result.stdout)["check"]
    assert found == {"checked": count, "bad": [{"file": "recipe.toml", "complaint": "recipe.toml is missing."}]}


def test_a_checkpoint_has_no_hashes(checkpoint, tmp_path):
    assert_one_sentence(glmexport("inspect", checkpoint, "--check"), "has no manifest.json", "--check is for bundles")
    assert_one_sentence(glmexport("inspect", "some/model", "--check"), "--check is for bundles")


# The manifest


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(damaged):
    chance = random.Random(1)
    path = damaged / MANIFEST
    content = path.read_bytes()
    places = [*range(len(content) - 90, len(content)), *(chance.randrange(len(content)) for _ in range(150))]
    for place in places:
        flip(path, place, chance.randrange(8))
        result = glmexport("inspect", damaged, "--check", "-q")
        if result.status == 1:
            assert bad_lines(result.stdout)[0] == "manifest.json was changed: it does not have its own digest."
        else:
            assert_one_sentence(result)
        path.write_bytes(content)


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_checked(damaged, monkeypatch):
    def failing(path: Path, direct: bool) -> str:
        if path.name == "lm.onnx.data":
            raise BundleError(f"{path} could not be read: Input/output error.")
        return sha256_of(path, direct)

    monkeypatch.setattr("glmexport.bundle.sha256_of", failing)
    flip(damaged / "recipe.toml", 3, 3)
    result = glmexport("inspect", damaged, "--check", "-q")
    assert result.status == 1
    unread, changed = bad_lines(result.stdout)
    assert unread.startswith("lm.onnx.data could not be read")
    assert changed.startswith("recipe.toml was changed")


@pytest.mark.parametrize("key", ["bytes", "sha256"])
def test_each_record_of_a_file_is_held_against_the_file(damaged, key):
    manifest = json.loads((damaged / MANIFEST).read_text("utf-8"))
    record = manifest["files"]["recipe.toml"]
    record[key] = record[key] + 1 if key == "bytes" else record[key][::-1]
    write_manifest(damaged, manifest)
    result = glmexport("inspect", damaged, "--check", "-q")
    assert result.status == 1
    (line,) = bad_lines(result.stdout)
    assert line.startswith("recipe.toml ")
