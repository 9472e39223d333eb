"""Bundles appear complete or not at all, replace only what may be replaced, and their manifests are not trusted."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import FullDisk, listing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmexport import bundle as bundle_module
from glmexport.bundle import check_files, looks_like_bundle, open_bundle, sha256_of
from glmexport.bundle_writer import BundleWriter, HashingFile, check_output
from glmexport.errors import BundleError
from glmexport.inventory import bundle_inventory


@pytest.fixture(scope="module")
def manifest(small_bundle) -> dict:
    return json.loads((small_bundle / "manifest.json").read_text("utf-8"))


def write_copy(source: Path, output: Path, *, force: bool = False) -> Path:
    """Write the files of a bundle anew, as a split does."""
    manifest = json.loads((source / "manifest.json").read_text("utf-8"))
    with BundleWriter(output, force=force) as writer:
        for name in manifest.pop("files"):
            writer.write_bytes(name, (source / name).read_bytes())
        return writer.commit(manifest)


def rewrite(bundle: Path, manifest: object) -> Path:
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return bundle


def everything(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Writing


def test_a_committed_bundle_is_complete(small_bundle, tmp_path):
    output = write_copy(small_bundle, tmp_path / "deep" / "bundle")
    assert [complaint for _, complaint in check_files(open_bundle(output)) if complaint] == []
    assert everything(tmp_path / "deep") == ["bundle"], "nothing beside it"
    for path in small_bundle.iterdir():
        if path.name != "manifest.json":
            assert (output / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_an_exception_leaves_nothing(tmp_path, error, written):
    def run() -> None:
        with BundleWriter(tmp_path / "bundle") as writer:
            for number in range(written):
                writer.write_bytes(f"file {number}", b"content")
            with writer.create("unfinished") as file:
                file.write(memoryview(b"half"))
                raise error

    with pytest.raises(error):
        run()
    assert everything(tmp_path) == []


def test_leaving_without_a_commit_leaves_nothing(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.write_bytes("file", b"content")
    assert everything(tmp_path) == []


def test_files_are_recorded_as_they_are_written(tmp_path):
    parts = [os.urandom(size) for size in (0, 1, 70_000, 5)]
    with BundleWriter(tmp_path / "bundle") as writer:
        with writer.create("data") as file:
            for part in parts:
                file.write(memoryview(part))
        assert writer.path("data").read_bytes() == b"".join(parts)
        assert writer.files["data"].bytes == 70_006
        assert writer.files["data"].sha256 == hashlib.sha256(b"".join(parts)).hexdigest()
        with pytest.raises(BundleError, match="File exists"), writer.create("data"):
            pass


def test_an_existing_output_is_refused(small_bundle, small_copy, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(small_copy)
    before = listing(tmp_path)
    for name in ("bundle", "empty"):
        with pytest.raises(BundleError, match=r"exists already; choose another output, or --force"):
            write_copy(small_bundle, tmp_path / name)
    for name in ("file", "link"):
        for force in (False, True):
            with pytest.raises(BundleError, match="exists and is not a directory"):
                write_copy(small_bundle, tmp_path / name, force=force)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["absent", "empty", "bundle", "damaged bundle"])
def test_force_replaces_what_is_empty_or_ours(small_bundle, small_copy, tmp_path, kind):
    output = tmp_path / "output"
    if kind == "empty":
        output.mkdir()
    elif kind != "absent":
        shutil.copytree(small_copy, output)
    if kind == "damaged bundle":
        (output / "lm.onnx.data").unlink()
    write_copy(small_bundle, output, force=True)
    assert [complaint for _, complaint in check_files(open_bundle(output)) if complaint] == []
    assert everything(tmp_path) == ["bundle", "output"]


def test_force_keeps_a_bundle_that_holds_a_users_files(small_bundle, small_copy):
    (small_copy / "notes.txt").write_text("precious")
    before = listing(small_copy)
    with pytest.raises(BundleError, match=r"it holds notes\.txt; --force does not replace it"):
        write_copy(small_bundle, small_copy, force=True)
    assert listing(small_copy) == before


@pytest.mark.parametrize("missing", [("a",), ("a", "b"), ()])
def test_a_failed_run_takes_the_parents_it_made_with_it(tmp_path, missing):
    output = tmp_path.joinpath(*missing) / "bundle"
    with contextlib.suppress(ZeroDivisionError), BundleWriter(output) as writer:
        writer.write_bytes("file", b"content")
        assert output.parent.is_dir()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "precious"},
        {"manifest.json": "{}"},
        {"manifest.json": '{"name": "my web app", "icons": []}', "index.html": "<html>"},
        {"manifest.json": "no JSON"},
        {"manifest.json": "[1, 2]"},
        {".hidden": ""},
    ],
    ids=["a file", "an empty manifest", "a foreign manifest", "no JSON", "a list", "a hidden file"],
)
def test_force_replaces_nothing_foreign(small_bundle, tmp_path, files):
    output = tmp_path / "output"
    output.mkdir()
    for name, content in files.items():
        (output / name).write_text(content)
    before = listing(tmp_path)
    with pytest.raises(BundleError, match=r"output (is neither empty nor a bundle|.*manifest)"):
        write_copy(small_bundle, output, force=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_is_not_replaced(small_bundle, tmp_path, force):
    """A split takes minutes; what somebody put at the output in that time stays."""
    output = tmp_path / "output"
    manifest = json.loads((small_bundle / "manifest.json").read_text("utf-8"))

    def run() -> None:
        with BundleWriter(output, force=force) as writer:
            writer.write_bytes("file", b"content")
            output.mkdir()
            (output / "precious").write_text("mine")
            writer.commit(manifest)

    with pytest.raises(BundleError):
        run()
    assert everything(tmp_path) == ["output"]
    assert (output / "precious").read_text() == "mine"


def test_a_second_writer_is_refused(small_bundle, tmp_path):
    output = tmp_path / "bundle"
    with BundleWriter(output) as first:
        first.write_bytes("file", b"content")
        with pytest.raises(BundleError, match=f"Another run is writing to {output}"), BundleWriter(output):
            pass
        assert first.path("file").read_bytes() == b"content", "the first writer's files stay"
    write_copy(small_bundle, output)


def test_a_writer_that_is_done_leaves_the_next_one_alone(small_bundle, tmp_path):
    output = tmp_path / "bundle"
    manifest = json.loads((small_bundle / "manifest.json").read_text("utf-8"))
    with BundleWriter(output) as first:
        first.write_bytes("file", b"content")
        first.commit(manifest)
        second = BundleWriter(output, force=True).__enter__()
        second.write_bytes("file", b"of the second")
    assert second.path("file").read_bytes() == b"of the second"
    second.__exit__(None, None, None)
    assert everything(tmp_path) == ["bundle"]


def test_what_a_killed_run_left_is_cleared(small_bundle, tmp_path):
    partial = tmp_path / ".bundle.partial"
    shutil.copytree(small_bundle, partial)
    (partial / "stale").write_text("of an earlier run")
    replaced = shutil.copytree(small_bundle, tmp_path / ".bundle.replaced")
    output = write_copy(small_bundle, tmp_path / "bundle")
    assert everything(output) == everything(small_bundle)
    assert not replaced.exists()
    assert everything(tmp_path) == ["bundle"]


def test_a_bundle_stays_where_the_new_one_cannot_take_its_place(small_bundle, small_copy, monkeypatch):
    before = listing(small_copy)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".bundle.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BundleError, match="could not be written: Input/output error"):
        write_copy(small_bundle, small_copy, force=True)
    assert listing(small_copy) == before
    assert everything(small_copy.parent) == ["bundle"]


@pytest.mark.parametrize("room", [0, 1, 4096, 3_000_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, room):
    start = HashingFile.__init__

    def on_full_disk(self: HashingFile, path: Path) -> None:
        start(self, path)
        self._file = FullDisk(self._file, room)

    monkeypatch.setattr(HashingFile, "__init__", on_full_disk)

    def run() -> None:
        with BundleWriter(tmp_path / "bundle") as writer, writer.create("data") as file:
            for _ in range(20):
                file.write(memoryview(bytes(1 << 20)))

    with pytest.raises(BundleError) as caught:
        run()
    sentence = "could not be written: the disk is full; free some of it or choose another output."
    assert str(caught.value) == f"{tmp_path / 'bundle'} {sentence}"
    assert everything(tmp_path) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("hash ", "write "))]


def test_a_full_disk_at_the_manifest(small_bundle, tmp_path, monkeypatch):
    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("glmexport.bundle_writer.manifest_text", full)
    with pytest.raises(BundleError, match="the disk is full"):
        write_copy(small_bundle, tmp_path / "bundle")
    assert everything(tmp_path) == []


def test_an_output_below_a_file(small_bundle, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError):
        write_copy(small_bundle, tmp_path / "file" / "bundle")
    assert everything(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["y" * 100] * 60)])
def test_an_output_with_a_name_too_long(small_bundle, tmp_path, name):
    with pytest.raises(BundleError):
        write_copy(small_bundle, tmp_path / name)


WRITER = """
import sys, time
from pathlib import Path
from glmexport.bundle_writer import BundleWriter
source, output = map(Path, sys.argv[1:])
import json
manifest = json.loads((source / "manifest.json").read_text("utf-8"))
print("ready", flush=True)
while True:
    with BundleWriter(output, force=True) as writer:
        for name in manifest["files"]:
            with writer.create(name) as file:
                data = (source / name).read_bytes()
                half = len(data) // 2
                file.write(memoryview(data[:half]))
                file.write(memoryview(data[half:]))
        writer.commit({key: value for key, value in manifest.items() if key != "files"})
"""


def assert_nothing_looks_complete_that_is_not(directory: Path) -> None:
    for path in directory.iterdir():
        if looks_like_bundle(path):
            try:
                bundle = open_bundle(path)
            except BundleError:
                assert path.name.startswith("."), f"{path.name} has a manifest that cannot be read"
                continue
            assert [complaint for _, complaint in check_files(bundle) if complaint] == [], path.name


def test_a_killed_writer_leaves_nothing_that_looks_complete(small_bundle, tmp_path):
    """A process that writes and replaces one bundle again and again, killed at 12 seeded moments."""
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    place = tmp_path / "place"
    place.mkdir()
    moments = random.Random(0)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, script, small_bundle, place / "bundle"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        assert_nothing_looks_complete_that_is_not(place)
    write_copy(small_bundle, place / "bundle", force=True)
    assert everything(place) == ["bundle"], "and the next run succeeds"


# Reading


def test_files_that_changed_are_named(small_copy):
    (small_copy / "lm.onnx").unlink()
    (small_copy / "embedding.onnx").unlink()
    (small_copy / "embedding.onnx").symlink_to("glm_block_0.onnx")
    with (small_copy / "glm_block_0.onnx.data").open("ab") as file:
        file.write(b"x")
    data = bytearray((small_copy / "glm_block_1.onnx.data").read_bytes())
    data[5000] ^= 1
    (small_copy / "glm_block_1.onnx.data").write_bytes(data)
    (small_copy / "surplus").mkdir()
    found = {name: complaint for name, complaint in check_files(open_bundle(small_copy)) if complaint}
    size = len(data)
    assert found == {
        "lm.onnx": "lm.onnx is missing.",
        "embedding.onnx": "embedding.onnx is a link.",
        "glm_block_0.onnx.data": f"glm_block_0.onnx.data has {size + 1} bytes, the manifest says {size}.",
        "glm_block_1.onnx.data": "glm_block_1.onnx.data was changed: its SHA-256 is not the manifest's.",
        "surplus": "surplus is not in the manifest.",
    }


def test_sha256_of(tmp_path):
    content = os.urandom((4 << 20) + 3)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    with pytest.raises(BundleError, match="could not be read"):
        sha256_of(tmp_path / "absent")


def test_a_directory_without_a_manifest(tmp_path, golden_checkpoint):
    for path in (tmp_path / "absent", tmp_path, golden_checkpoint, golden_checkpoint / "config.json"):
        with pytest.raises(BundleError, match=r"is not a bundle \(no manifest\.json\)"):
            open_bundle(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"5", b"[" * 100_000])
def test_a_manifest_that_is_none(small_copy, content):
    (small_copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is not a manifest that glmexport wrote"):
        open_bundle(small_copy)


def test_a_manifest_beyond_the_limit_is_not_read(small_copy, monkeypatch):
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(BundleError, match="expected at most 100"):
        open_bundle(small_copy)


def test_another_schema(small_copy, manifest):
    with pytest.raises(BundleError, match=r"has schema 1, expected 2; it was written by another version of glmexport"):
        open_bundle(rewrite(small_copy, manifest | {"schema": 1}))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/hostname", "sub/x", "..", ".", "manifest.json", "", "a\x00b", "a\nb", "x" * 300]
)
def test_a_file_outside_the_bundle(small_copy, manifest, name):
    changed = copy.deepcopy(manifest)
    changed["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    with pytest.raises(BundleError, match="expected plain names of files beside the manifest"):
        open_bundle(rewrite(small_copy, changed))


@pytest.mark.parametrize("key", ["file", "data"])
@pytest.mark.parametrize("name", ["../x", "absent.onnx", "glm_block_1.onnx"])
def test_a_graph_in_another_file(small_copy, manifest, key, name):
    changed = copy.deepcopy(manifest)
    changed["graphs"][1][key] = name
    with pytest.raises(BundleError, match=r"graphs in files that it does not list|each with files of its name"):
        open_bundle(rewrite(small_copy, changed))


def swap_blocks(manifest: dict) -> None:
    manifest["graphs"][1], manifest["graphs"][2] = manifest["graphs"][2], manifest["graphs"][1]


def drop_block(manifest: dict) -> None:
    del manifest["graphs"][1]


def too_many_blocks(manifest: dict) -> None:
    manifest["model"]["num_blocks"] = 10**15


def infinite_size(manifest: dict) -> None:
    manifest["files"]["lm.onnx"]["bytes"] = float("inf")


def text_for_a_size(manifest: dict) -> None:
    manifest["model"]["vocab_size"] = "128"


def no_heads(manifest: dict) -> None:
    manifest["model"]["num_heads"] = 0


def unknown_argmax(manifest: dict) -> None:
    manifest["argmax"] = "maybe"


@pytest.mark.parametrize(
    "damage", [swap_blocks, drop_block, too_many_blocks, infinite_size, text_for_a_size, no_heads, unknown_argmax]
)
def test_a_damaged_manifest(small_copy, manifest, damage):
    changed = copy.deepcopy(manifest)
    damage(changed)
    with pytest.raises(BundleError):
        open_bundle(rewrite(small_copy, changed))


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Paths of everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["../x", "manifest.json", "", "lm.onnx"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_manifest_opens_or_is_one_sentence(small_copy, manifest, data):
    changed = copy.deepcopy(manifest)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(changed)[1:]))
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[path[-1]] = data.draw(JSON)
        else:
            del holder[path[-1]]
        if not changed:
            break
    rewrite(small_copy, changed)
    try:
        bundle = open_bundle(small_copy)
        list(check_files(bundle))
        json.dumps(bundle_inventory(small_copy))
    except BundleError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert len(bundle.graphs) == bundle.config.num_blocks + 2


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_of_a_manifest(small_copy, small_bundle, data):
    content = bytearray((small_bundle / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (small_copy / "manifest.json").write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        list(check_files(open_bundle(small_copy)))
        bundle_inventory(small_copy)
    except BundleError as error:
        assert str(error)  # noqa: PT017


def test_check_output_says_nothing_about_a_free_place(tmp_path):
    assert check_output(tmp_path / "new" / "bundle", force=False) is None
    assert everything(tmp_path) == []
