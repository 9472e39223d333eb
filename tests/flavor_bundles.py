"""Bundles of every flavor, of one checkpoint: each test file that asks for them traces nothing again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from conftest import split_directory
from derived_bundles import OPSET, odd_checkpoint

from glmexport.checkpoint import open_checkpoint
from glmexport.config import ModelConfig
from glmexport.patches.chatglm_6b import CHATGLM_6B

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


@dataclass
class Call:
    """What a block is called with: rows at places of their own, in a cache with more room than that.

    starts: places that each row has before this call. pads: of these, hidden ones in front. seq: new places.
    """

    starts: tuple[int, ...]
    seq: int
    capacity: int
    pads: tuple[int, ...] = ()
    first_position: int = 0

    def inputs(self, config: ModelConfig, seed: int = 1) -> dict[str, np.ndarray]:
        """Seeded inputs of a graph in `ort/`, with noise where nothing may be read."""
        random, batch = np.random.default_rng(seed), len(self.starts)
        places = np.arange(self.capacity)
        pads = np.array(self.pads or (0,) * batch)
        mask = np.ones((batch, 1, self.seq, self.capacity), np.bool_)
        for row, start in enumerate(self.starts):
            for new in range(self.seq):
                mask[row, 0, new] = (places > start + new) | (places < pads[row])
        positions = self.first_position + random.integers(0, 20, (batch, 2, self.seq))
        cache = (batch, config.num_heads, self.capacity, config.head_dim)
        return {
            "inputs_embeds": random.standard_normal((batch, self.seq, config.hidden_size), np.float32),
            "attention_mask": mask,
            "position_ids": positions,
            "write_indices": np.array(self.starts, np.int64),
            "key_cache": random.standard_normal(cache, np.float32),
            "value_cache": random.standard_normal(cache, np.float32),
        }


CALLS = {
    "a prompt": Call((0,), 5, 64),
    "a prompt in a cache that just holds it": Call((0,), 9, 9),
    "a prompt of one": Call((0,), 1, 64),
    "a long prompt in more room than it needs": Call((0,), 150, 320),
    "three prompts, two with padding": Call((0, 0, 0), 7, 64, (0, 3, 5)),
    "one more token": Call((11,), 1, 64),
    "one more token in the last place": Call((63,), 1, 64),
    "rows at different places": Call((3, 17, 60, 0), 1, 64),
    "rows at different places, some with padding": Call((12, 40), 1, 192, (4, 30)),
    "several tokens at different places": Call((2, 50, 20), 6, 64, (1, 0, 19)),
    "the model's last positions": Call((30,), 4, 64, first_position=2028),
    "the traced lengths": Call((4, 4), 3, 11),
}


def expected_of(reference, block_id: int, inputs: dict[str, np.ndarray]):
    """(hidden states, new keys, new values), each row alone through the unpatched block, batch first."""
    _, model = reference
    block = model.get_submodule(CHATGLM_6B.block.format(block_id=block_id))
    rows, seq = [], inputs["inputs_embeds"].shape[1]
    for row, start in enumerate(inputs["write_indices"].tolist()):
        past = np.stack([inputs[name][row, :, :start] for name in ("key_cache", "value_cache")])  # [2, heads, past, …]
        given = (
            inputs["inputs_embeds"][row][:, None],
            inputs["attention_mask"][row : row + 1, :, :, : start + seq],
            inputs["position_ids"][row : row + 1],
            past.transpose(0, 2, 1, 3)[:, :, None],
        )
        with torch.inference_mode():
            tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in given]
            hidden, presents = CHATGLM_6B.run_reference_block(block, block_id, *tensors)
        new = presents[:, start:, 0].numpy().transpose(0, 2, 1, 3)  # [2, heads, seq, head_dim]
        rows.append((hidden[:, 0].numpy(), new[0], new[1]))
    return rows


def run_bound(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Run a block with its caches bound as inputs and outputs; they are changed where they lie."""
    binding = session.io_binding()
    hidden = np.full_like(inputs["inputs_embeds"], np.nan)
    arrays = [*inputs.items()]
    outputs = [
        ("hidden_states", hidden),
        ("key_cache_out", inputs["key_cache"]),
        ("value_cache_out", inputs["value_cache"]),
    ]
    for bind, bound in ((binding.bind_input, arrays), (binding.bind_output, outputs)):
        for name, array in bound:
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    return hidden
