"""Bundle -> bundle: the source is believed only after it is checked, shared only by links, and never changed.

And the invariant of the passes: `split` with their options writes what split, slim, embed and quantize write by hand.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from checkpoints import write_checkpoint
from conftest import FullDisk, record_again, split_directory, write_manifest
from derived_bundles import (
    ODD,
    OPSET,
    assert_intact,
    assert_one_sentence,
    contents,
    derived,
    glmexport,
    inode,
    load,
    manifest_of,
    quantize_pass,
    steps_of,
    untouched,
)

from glmexport.bundle import looks_like_bundle, open_bundle
from glmexport.bundle_writer import HashingFile
from glmexport.derive import derive, derive_total
from glmexport.draft import draft_of_bundle
from glmexport.errors import BundleError
from glmexport.form import RAW, EmbeddingForm
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.passes.slim_vocab import SlimPass

BF16 = EmbedPass(EmbeddingForm(RAW, "bfloat16"))
COMMANDS = {
    "slim": ("slim",),
    "embed": ("embed",),
    "quantize": ("quantize", "--bits", 4),
    "auto": ("quantize", "--auto", "--target-size", "900KB"),
}


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return shutil.copytree(bundle, tmp_path / "source" / "bundle")


@pytest.fixture(params=COMMANDS)
def command(request):
    """Run one of the passes from a bundle to another."""
    name, *options = COMMANDS[request.param]
    return lambda source, target, *more: glmexport(name, source, "-o", target, *options, *more)


# The invariant


ALL_PASSES = [
    ([], []),
    (["--slim"], [["slim"]]),
    (["--embedding", "bf16"], [["embed"]]),
    (["--embedding", "float16"], [["embed", "--dtype", "float16"]]),
    (["--quantize", "int4"], [["quantize", "--bits", 4]]),
    (
        ["--slim", "--embedding", "bf16", "--quantize", "int4"],
        [["slim"], ["embed"], ["quantize", "--bits", 4]],
    ),
    (
        ["--slim", "--embedding", "bf16", "--rounding", "truncate", "--quantize", "int8", "--group-size", "channel",
         "--asymmetric", "--lm-bits", "none", "--method", "rtn"],
        [["slim"], ["embed", "--rounding", "truncate"],
         ["quantize", "--bits", 8, "--group-size", "channel", "--asymmetric", "--lm-bits", "none", "--method", "rtn"]],
    ),
    (
        ["--slim", "--embedding", "shared", "--quantize", "int4", "--group-size", 64, "--activations", "int16"],
        [["slim"], ["quantize", "--bits", 4, "--group-size", 64, "--activations", "int16"],
         ["embed", "--dtype", "shared"]],
    ),
    (
        ["--keep", "KEEP", "--corpus", "CORPUS", "--embedding", "float32", "--recipe", "RECIPE"],
        [["slim", "--keep", "KEEP", "--corpus", "CORPUS"], ["embed", "--dtype", "float32"],
         ["quantize", "--recipe", "RECIPE"]],
    ),
]  # fmt: skip
QDQ = [
    (
        ["--slim", "--embedding", "bf16", "--quantize", "int4", "--format", "qdq", "--lm-bits", 4],
        [["slim"], ["embed"], ["quantize", "--bits", 4, "--format", "qdq", "--lm-bits", 4]],
    ),
    (
        ["--slim", "--embedding", "shared", "--quantize", "int8", "--format", "qdq", "--asymmetric"],
        [["slim"], ["quantize", "--bits", 8, "--format", "qdq", "--asymmetric"], ["embed", "--dtype", "shared"]],
    ),
]


def assert_split_gives_what_the_passes_give(source: Path, place: Path, options, commands, *split_options) -> None:
    files = {
        "KEEP": "\n".join(map(str, range(100, 400, 3))),
        "CORPUS": "hello world, 你好",
        "RECIPE": '[[rule]]\npattern = "*.mlp.*"\nbits = 8\n[[rule]]\nbits = 4\ngroup_size = 128\n',
    }
    for name, text in files.items():
        (place / name).write_text(text, "utf-8")

    def words(line):
        return [place / word if word in files else word for word in line]

    at_once = glmexport("split", source, "-o", place / "at-once", "-q", *split_options, *words(options))
    assert (at_once.status, at_once.stderr) == (0, "")
    done = glmexport("split", source, "-o", place / "0", "-q", *split_options)
    assert done.status == 0, done
    for number, (name, *more) in enumerate(map(words, commands)):
        done = glmexport(name, place / str(number), "-o", place / str(number + 1), "-q", *more)
        assert done.status == 0, done
    ours, theirs = contents(place / "at-once"), contents(place / str(len(commands)))
    assert {name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)} == set()
    assert steps_of(place / "at-once") == ["split", *(name for name, *_ in commands)]
    assert_intact(place / "at-once")


@pytest.mark.parametrize(
    ("options", "commands"),
    [pytest.param(*row, marks=[pytest.mark.slow] * (1 <= number <= 4)) for number, row in enumerate(ALL_PASSES)],
)
def test_split_gives_what_the_passes_give_by_hand(checkpoint, tmp_path, options, commands):
    assert_split_gives_what_the_passes_give(checkpoint, tmp_path, options, commands, "--opset", OPSET)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "commands"), QDQ)
def test_so_it_is_with_qdq(checkpoint, tmp_path, options, commands):
    assert_split_gives_what_the_passes_give(checkpoint, tmp_path, options, commands, "--opset", OPSET)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        ("bin", torch.float32),
        ("safetensors-sharded", torch.float16),
        pytest.param("bin-sharded", torch.float16, marks=pytest.mark.slow),
        pytest.param("safetensors", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_so_it_is_from_every_kind_of_checkpoint(tmp_path, fmt, dtype):
    source = write_checkpoint(tmp_path / "checkpoint", fmt=fmt, dtype=dtype, **ODD)
    options, commands = ALL_PASSES[5]
    more = ["--opset", 14, "--argmax", "also"]
    assert_split_gives_what_the_passes_give(source, tmp_path, options, commands, *more)


@pytest.mark.parametrize("slice_bytes", [4_000, 100_000])
def test_so_it_is_where_matrices_are_read_in_bands(checkpoint, tmp_path, monkeypatch, slice_bytes):
    """As at full size, where the bands of a table differ before and after it is slimmed."""
    monkeypatch.setattr("glmexport.tensors.SLICE_BYTES", slice_bytes)
    assert_split_gives_what_the_passes_give(checkpoint, tmp_path, *ALL_PASSES[5], "--opset", OPSET)


@pytest.mark.parametrize("number", [0, 5, 6, 7])
def test_a_dry_run_tells_the_files_of_the_final_form(checkpoint, tmp_path, number):
    options, _ = ALL_PASSES[number]
    result = glmexport("split", checkpoint, "-o", tmp_path / "out", "--opset", OPSET, "--dry-run", *options)
    assert (result.status, list(tmp_path.iterdir())) == (0, [])
    rows = (line.split() for line in result.stdout.splitlines())
    told = {row[0]: int(row[1].replace(",", "")) for row in rows if len(row) == 4 and row[1].replace(",", "").isdigit()}
    assert glmexport("split", checkpoint, "-o", tmp_path / "out", "--opset", OPSET, "-q", *options).status == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert told.keys() == sizes.keys()
    for name, size in sizes.items():
        assert told[name] == size or name.endswith((".onnx", "manifest.json")), name


# Sources that are not what their manifest says


def changed_byte(bundle: Path) -> str:
    path = bundle / "glm_block_1.onnx.data"
    data = bytearray(path.read_bytes())
    data[4321] ^= 1
    path.write_bytes(data)
    return "glm_block_1.onnx.data was changed: its SHA-256 is not the manifest's"


def missing_data(bundle: Path) -> str:
    (bundle / "glm_block_0.onnx.data").unlink()
    return "glm_block_0.onnx.data"


def missing_graph(bundle: Path) -> str:
    (bundle / "lm.onnx").unlink()
    return "lm.onnx"


def truncated_data(bundle: Path) -> str:
    os.truncate(bundle / "lm.onnx.data", 5000)
    return "lm.onnx.data"


def truncated_graph(bundle: Path) -> str:
    os.truncate(bundle / "glm_block_0.onnx", 300)
    return "glm_block_0.onnx"


def changed_tokenizer(bundle: Path) -> str:
    path = bundle / "ice_text.model"
    path.write_bytes(path.read_bytes()[:-7])
    return "ice_text.model"


def linked_data(bundle: Path) -> str:
    path = bundle / "embedding.onnx.data"
    path.rename(bundle.parent / "elsewhere")
    path.symlink_to(bundle.parent / "elsewhere")
    return "embedding.onnx.data"


def no_manifest(bundle: Path) -> str:
    (bundle / "manifest.json").unlink()
    return "is not a bundle"


@pytest.mark.parametrize(
    "damage",
    [
        changed_byte,
        missing_data,
        missing_graph,
        truncated_data,
        truncated_graph,
        changed_tokenizer,
        linked_data,
        no_manifest,
    ],
)
def test_a_damaged_source_is_one_sentence_and_nothing_is_written(command, copy, tmp_path, damage):
    told = damage(copy)
    with untouched(tmp_path):
        assert_one_sentence(command(copy, tmp_path / "out"), told)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_many_damaged_files_are_counted(copy, tmp_path):
    for path in copy.glob("*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    assert_one_sentence(glmexport("embed", copy, "-o", tmp_path / "out"), "is damaged:", "and 1 more like it")


def test_a_users_file_beside_the_bundle_stays_there(copy, tmp_path):
    (copy / "notes.txt").write_text("mine")
    derived(copy, tmp_path / "out", BF16)
    assert not (tmp_path / "out" / "notes.txt").exists()


def point_elsewhere(bundle: Path, graph: str, **entries: object) -> None:
    """Change where the first weight of a graph lies, hashes and sizes made to fit."""
    model = load(bundle / f"{graph}.onnx")
    tensor = next(one for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL)
    for entry in tensor.external_data:
        if entry.key in entries:
            entry.value = str(entries[entry.key])
    (bundle / f"{graph}.onnx").write_bytes(model.SerializeToString())
    record_again(bundle, f"{graph}.onnx")


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "../secret"},
        {"location": "/etc/passwd"},
        {"location": "lm.onnx.data"},
        {"location": ""},
        {"offset": 1 << 40},
        {"offset": 159_764},
        {"length": 4},
        {"length": 1 << 40},
        {"offset": -1},
    ],
)
def test_a_graph_that_points_outside_its_data_file(copy, tmp_path, entries):
    (copy.parent / "secret").write_bytes(b"s" * 1_000_000)
    point_elsewhere(copy, "glm_block_0", **entries)
    with untouched(tmp_path):
        assert_one_sentence(glmexport("quantize", copy, "-o", tmp_path / "out", "--bits", 4), "glm_block_0.onnx")


# Outputs


def test_one_inside_the_other_is_refused(command, copy, tmp_path):
    with untouched(tmp_path):
        assert_one_sentence(command(copy, copy / "out"), "lie in one another")
        assert_one_sentence(command(copy, copy / "deep" / "out"), "lie in one another")
        assert_one_sentence(command(copy, copy, "--force"), "lie in one another")
        assert_one_sentence(command(copy, copy.parent, "--force"), "")
        (tmp_path / "link").symlink_to(copy)
        assert_one_sentence(command(copy, tmp_path / "link" / "out"), "lie in one another")
        (tmp_path / "link").unlink()
    assert_intact(copy)


def test_the_bundle_inside_a_bundle_to_replace(bundle, tmp_path):
    """The output may be replaced, were it not for the source that lies in it."""
    outer = shutil.copytree(bundle, tmp_path / "outer")
    inner = shutil.copytree(bundle, outer / "inner")
    manifest = manifest_of(outer)
    manifest["files"]["inner"] = {"bytes": 1, "sha256": "0"}
    write_manifest(outer, manifest)
    with untouched(tmp_path):
        assert_one_sentence(glmexport("embed", inner, "-o", outer, "--force"), "lie in one another")


def test_an_existing_output_is_replaced_only_by_force(command, copy, bundle, tmp_path):
    out = shutil.copytree(bundle, tmp_path / "out")
    with untouched(tmp_path):
        assert_one_sentence(command(copy, out), "exists already", "--force")
    assert command(copy, out, "--force", "-q").status == 0
    assert steps_of(out)[:-1] == ["split"]
    assert_intact(out)
    assert_intact(copy)


def test_the_source_is_never_changed(command, bundle, tmp_path):
    with untouched(bundle):
        assert command(bundle, tmp_path / "out", "-q").status == 0
    assert_intact(tmp_path / "out")


def test_links_are_shared_and_copies_are_not(bundle, tmp_path):
    derived(bundle, tmp_path / "linked", BF16)
    derived(bundle, tmp_path / "copied", BF16, copy=True)
    assert contents(tmp_path / "linked") == contents(tmp_path / "copied")
    same = [name for name in contents(tmp_path / "linked") if name in contents(bundle) and name != "manifest.json"]
    assert len(same) == 8
    for name in same:
        assert inode(tmp_path / "linked", name) == inode(bundle, name)
        assert (tmp_path / "copied" / name).stat().st_nlink == 1
    onnx.load(tmp_path / "copied" / "glm_block_0.onnx")
    with pytest.raises(Exception, match="hard link"):  # onnx's own class, of no public name
        onnx.load(tmp_path / "linked" / "glm_block_0.onnx")


def test_the_command_line_copies(command, bundle, tmp_path):
    assert command(bundle, tmp_path / "out", "--copy", "-q").status == 0
    assert {path.stat().st_nlink for path in (tmp_path / "out").iterdir()} == {1}


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_are_impossible_files_are_copied(bundle, tmp_path, monkeypatch, number):
    def impossible(*_args: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", impossible)
    derived(bundle, tmp_path / "out", BF16)
    monkeypatch.undo()
    assert {path.stat().st_nlink for path in (tmp_path / "out").iterdir()} == {1}
    derived(bundle, tmp_path / "linked", BF16)
    assert contents(tmp_path / "linked") == contents(tmp_path / "out")
    assert_intact(tmp_path / "out")


def test_another_error_of_a_link_is_told(bundle, tmp_path, monkeypatch):
    def broken(*_args: object, **_options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", broken)
    with pytest.raises(BundleError, match="could not be written: Input/output error"):
        derived(bundle, tmp_path / "out", BF16)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changes_while_it_is_copied(copy, tmp_path, monkeypatch):
    """After it was hashed and before it was read again."""
    monkeypatch.setattr("glmexport.derive.demand_intact", lambda *_: changed_byte(copy))
    with pytest.raises(BundleError, match=r"glm_block_1\.onnx\.data was changed while it was copied; start again"):
        derived(copy, tmp_path / "out", BF16, copy=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Runs that fail


@pytest.mark.parametrize("room", [0, 5000])
def test_a_full_disk(command, bundle, tmp_path, monkeypatch, room):
    start = HashingFile.__init__

    def on_full_disk(self: HashingFile, path: Path) -> None:
        start(self, path)
        self._file = FullDisk(self._file, room)

    monkeypatch.setattr(HashingFile, "__init__", on_full_disk)
    with untouched(bundle):
        assert_one_sentence(command(bundle, tmp_path / "deep" / "out"), "the disk is full")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_told_before_anything_is_written(bundle, tmp_path, monkeypatch):
    """What is linked needs no room, what is copied does."""
    table = (bundle / "embedding.onnx.data").stat().st_size // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 600_000))
    assert_one_sentence(glmexport("embed", bundle, "-o", tmp_path / "out", "--copy"), "MB free and the bundle needs")
    assert list(tmp_path.iterdir()) == []
    assert glmexport("embed", bundle, "-o", tmp_path / "out", "-q").status == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, table))
    assert_one_sentence(glmexport("embed", bundle, "-o", tmp_path / "2"), "MB free and the bundle needs")


INTERRUPTED = """
import os, signal, sys
from glmexport.bundle_writer import HashingFile
write, left = HashingFile.write, 4
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


def test_ctrl_c_ends_with_130_and_leaves_nothing(bundle, tmp_path):
    arguments = ["quantize", str(bundle), "-o", str(tmp_path / "deep" / "out"), "--bits", "4"]
    with untouched(bundle):
        command = [sys.executable, "-c", INTERRUPTED, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


KILLED = INTERRUPTED.replace("signal.SIGINT", "signal.SIGKILL")


def test_a_killed_run_leaves_nothing_that_looks_complete(bundle, tmp_path):
    arguments = ["quantize", str(bundle), "-o", str(tmp_path / "out"), "--bits", "4"]
    with untouched(bundle):
        subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
        assert [path for path in tmp_path.iterdir() if looks_like_bundle(path)] == []
        derived(bundle, tmp_path / "out", quantize_pass(4))
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "and the next run succeeds"


# The draft of a bundle


def test_a_bundle_written_again_is_the_same(checkpoint, bundle, tmp_path):
    """Nothing but links, and a manifest that says the same; every form, whether linked or copied."""

    class Nothing:
        def apply(self, draft, notice):
            return draft

    steps = [SlimPass(), BF16, quantize_pass(4, symmetric=False)]
    derived(bundle, tmp_path / "all", *steps)
    for number, source in enumerate((bundle, tmp_path / "all")):
        for copied in (False, True):
            target = tmp_path / f"{number}-{copied}"
            derived(source, target, Nothing(), copy=copied)
            assert contents(target) == contents(source)


def test_the_draft_knows_the_sizes(bundle):
    sizes = draft_of_bundle(open_bundle(bundle)).sizes()
    for path in bundle.iterdir():
        if path.suffix != ".onnx" and path.name != "manifest.json":
            assert sizes[path.name] == path.stat().st_size
        else:
            assert sizes[path.name] >= path.stat().st_size, "an estimate, to be on the safe side"


def test_progress_is_told_about_as_promised(bundle, tmp_path):
    opened = open_bundle(bundle)
    told: list[int] = []
    derive(opened, lambda _: BF16, tmp_path / "out", notice=print, advance=lambda _, count: told.append(count))
    assert 0.7 * derive_total(opened) < sum(told) <= derive_total(opened)


def test_a_bundle_of_an_unknown_architecture_is_not_lifted(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    manifest = manifest_of(copy)
    manifest["architecture"] = "x"
    write_manifest(copy, manifest)
    with pytest.raises(BundleError, match="architecture 'x' is not one this glmexport knows"):
        derived(copy, tmp_path / "out", quantize_pass(4, layout="qdq"))


def test_split_refuses_what_a_pass_refuses_before_it_writes(checkpoint, tmp_path):
    with pytest.raises(BundleError, match="no embedding graph any more"):
        split_directory(checkpoint, tmp_path / "out", opset=OPSET, passes=(BF16, EmbedPass(BF16.form)))
    assert list(tmp_path.iterdir()) == []
