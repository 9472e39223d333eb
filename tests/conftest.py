"""Fixtures shared by the tests: the golden checkpoint, what the original code computed on it, and split bundles."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
GOLDEN_CHECKPOINT = ROOT / "examples" / "chatglm-6b-tiny"
GOLDEN_DATA = ROOT / "tests" / "data" / "chatglm-6b-tiny"

torch.set_num_threads(1)  # the models are tiny, and workers share the cores


@pytest.fixture(scope="session")
def golden_checkpoint() -> Path:
    return GOLDEN_CHECKPOINT


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What the original v1.1.0 code computes on the golden checkpoint, in float32."""
    with np.load(GOLDEN_DATA / "expected.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for the whole run; workers of pytest-xdist share it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="session")
def shared(shared_directory: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """`shared(name, make)`: the directory of that name, made once in the whole run by `make(path)`; never change it."""

    def once(name: str, make: Callable[[Path], object]) -> Path:
        path = shared_directory / name
        with (shared_directory / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                draft = shared_directory / f"{name}.draft"
                make(draft)
                draft.rename(path)
        return path

    return once


@pytest.fixture(scope="session")
def golden_bundle(shared, golden_checkpoint) -> Path:
    """The golden checkpoint, split as the command line does by default; copy it before changing anything."""
    return shared("golden-bundle", lambda path: split_directory(golden_checkpoint, path))


@pytest.fixture(scope="session")
def quick_bundle(shared, golden_checkpoint) -> Path:
    """The golden checkpoint at opset 17, which is traced twenty times faster: for tests that run a bundle."""
    return shared("quick-bundle", lambda path: split_directory(golden_checkpoint, path, opset=17))


@pytest.fixture(scope="session")
def small_checkpoint(shared) -> Path:
    """Two blocks, 128 rows, no tokenizer: quick to verify."""
    return shared("small-checkpoint", lambda path: write_checkpoint(path, tokenizer=False, seed=7))


@pytest.fixture(scope="session")
def small_bundle(shared, small_checkpoint) -> Path:
    """The small checkpoint, split; copy it before changing anything."""
    return shared("small-bundle", lambda path: split_directory(small_checkpoint, path))


@pytest.fixture(scope="session")
def checkpoint(shared) -> Path:
    """What the tests of passes start from, unless they have their own: image tokens in front and odd widths."""
    from derived_bundles import odd_checkpoint  # here: it imports this file

    return odd_checkpoint(shared)


@pytest.fixture(scope="session")
def bundle(shared) -> Path:
    """That checkpoint, split; never change it."""
    from derived_bundles import odd_bundle  # here: it imports this file

    return odd_bundle(shared)


@pytest.fixture
def small_copy(small_bundle, tmp_path) -> Path:
    """A copy of the small bundle, to be damaged."""
    return shutil.copytree(small_bundle, tmp_path / "bundle")


@pytest.fixture(scope="session")
def whole(small_checkpoint, tmp_path_factory) -> dict[str, bytes]:
    """The files of the small checkpoint's bundle at opset 14, by name, from a run of the command without faults."""
    from derived_bundles import contents  # here: it imports this file
    from faults import split

    output = tmp_path_factory.mktemp("whole") / "bundle"
    assert split(small_checkpoint, output).status == 0
    return contents(output)


@pytest.fixture
def without_equivalence(monkeypatch) -> None:
    """Patched is not compared with unpatched, which takes a third of a small split and has tests of its own."""
    monkeypatch.setattr("glmexport.splitter.check_patch", lambda *_: None)


@pytest.fixture
def output(tmp_path) -> Path:
    """Where a bundle is to be made, in a directory of its own."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "bundle"


def split_directory(checkpoint: Path, output: Path, **options) -> list[str]:
    """Split a checkpoint directory; returns the notices."""
    from glmexport.checkpoint import open_checkpoint
    from glmexport.splitter import SplitOptions, split

    notices: list[str] = []
    with open_checkpoint(checkpoint) as source:
        split(source, output, SplitOptions(**options), notice=notices.append)
    return notices


def record_again(bundle: Path, *names: str) -> None:
    """Give files of a bundle the size and SHA-256 in the manifest that they have now."""
    from glmexport.bundle import sha256_of

    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    for name in names:
        path = bundle / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_manifest(bundle, manifest)


def write_manifest(bundle: Path, manifest: dict) -> None:
    """Put another manifest into a bundle, with a digest that fits."""
    from glmexport.bundle import manifest_text

    (bundle / "manifest.json").write_text(manifest_text(manifest), "utf-8")


def listing(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every entry below a directory, with its size, modification time and content."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_size,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(directory.rglob("*"))
    }


class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, file, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data) -> None:
        if len(data) > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room -= len(data)
        self._file.write(data)

    def __getattr__(self, name: str):
        return getattr(self._file, name)
