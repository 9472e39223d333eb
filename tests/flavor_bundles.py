"""Bundles of every flavor, of one checkpoint: each test file that asks for them traces nothing again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from conftest import split_directory
from derived_bundles import OPSET, odd_checkpoint

from glmexport.checkpoint import open_checkpoint
from glmexport.config import ModelConfig

Shared = Callable[[str, Callable[[Path], object]], Path]
GRAPHS = ("embedding", "glm_block_0", "glm_block_1", "lm")
DATA = tuple(f"{graph}.onnx.data" for graph in GRAPHS)
FLAVORS = ("portable", "ort", "both")


def flavor_bundle(shared: Shared, flavor: str) -> Path:
    """The odd checkpoint, split with that `--flavor`; never change it."""
    checkpoint = odd_checkpoint(shared)

    def make(path: Path) -> None:
        for name in FLAVORS:  # in one process, so that each kind of graph is traced once
            split_directory(checkpoint, path / name, opset=OPSET, flavor=name)

    return shared("flavors", make) / flavor


def relative_files(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its path from there."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def reference_model(checkpoint: Path) -> tuple[ModelConfig, torch.nn.Module]:
    """The unpatched model with the checkpoint's weights in float32."""
    with open_checkpoint(checkpoint) as source:
        model = source.patch.build_reference(source.config)
        model.load_state_dict({name: source.read(name).float() for name in model.state_dict()})
        return source.config, model.eval()


def words(config: ModelConfig, count: int, seed: int = 5) -> list[int]:
    """A prompt of `count` ids, the last two those that begin an answer."""
    random, ids = np.random.default_rng(seed), config.special_ids
    low = config.num_image_tokens + 4
    return [*random.integers(low, low + 1000, count - 2).tolist(), ids.gmask, ids.bos]


def manifest_with(bundle: Path, change: Callable[[dict], None]) -> None:
    """Change a bundle's manifest and give it a digest that fits."""
    from conftest import write_manifest

    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    change(manifest)
    (bundle / "manifest.json").unlink()
    write_manifest(bundle, manifest)
