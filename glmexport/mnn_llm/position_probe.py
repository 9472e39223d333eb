"""Whether the installed engine counts positions as the model does, found out by having it run a tiny model.

The engine of MNN 3.6.1 gives answered tokens the position P - 3 for a prompt of P tokens, where the model was trained
with P - 2, that of the `[gMASK]`. The graph can make up for it, and must not where the engine is right.
"""

from __future__ import annotations

import base64
import functools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from glmexport.affine import Floats, Quantized
from glmexport.config import ModelConfig, SpecialIds
from glmexport.errors import ExportError
from glmexport.mnn.converter import mnn_of_json, mnn_version
from glmexport.mnn.matrix import FLOAT32, MnnMatrix
from glmexport.mnn_llm.engine import ask
from glmexport.mnn_llm.engine_config import EMBEDDING_FILES, GRAPH_FILE, WEIGHT_FILE, config_files
from glmexport.mnn_llm.engine_graph import ARCHITECTURE, engine_graph
from glmexport.mnn_llm.following import ModelReference, follow
from glmexport.mnn_llm.weight_writer import place_bytes
from glmexport.patch import patch_named

_ROWS = 96
_STEPS = 6
_LENGTHS = (0, 3, 9, 20)
_CONFIG = ModelConfig(
    architecture=ARCHITECTURE,
    vocab_size=_ROWS,
    hidden_size=64,
    num_blocks=2,
    num_heads=2,
    inner_size=128,
    max_positions=64,
    layernorm_epsilon=1e-5,
    num_image_tokens=0,
    special_ids=SpecialIds(mask=_ROWS - 6, gmask=_ROWS - 5, bos=_ROWS - 2, eos=_ROWS - 1, pad=3, forced=5),
)


@dataclass(frozen=True)
class _Weights:
    """A state dict as a source of weights."""

    tensors: Mapping[str, Floats]
    integers: tuple[str, ...] = ()

    def vector(self, name: str) -> Floats:
        return self.tensors[name]

    def bands(self, name: str) -> Iterator[Floats]:
        yield self.tensors[name]

    def quantized_bands(self, name: str) -> Iterator[Quantized]:
        raise KeyError(name)


@functools.cache
def needs_correction() -> bool:
    """Whether the graph must add 1 to the positions of answered tokens for the installed engine.

    Raises ExportError where the engine gives other tokens than the reference either way, GlmExportError without MNN.
    """
    wrong = {corrected: _tokens_that_differ(corrected) for corrected in (False, True)}
    right = [corrected for corrected, count in wrong.items() if not count]
    if len(right) != 1:
        found = ", ".join(f"{count} with {int(corrected)} added" for corrected, count in wrong.items())
        raise ExportError(
            f"MNN {mnn_version()}'s engine and the reference should agree on a tiny model for one way to count "
            f"positions; tokens that differ: {found}. Use MNN 3.6.1."
        )
    return right[0]


def _tokens_that_differ(corrected: bool) -> int:
    prompts = _prompts()
    reference, weights = _model()
    with tempfile.TemporaryDirectory(prefix="glmexport-mnn-") as directory:
        write_probe(Path(directory), weights, corrected)
        answers = ask(Path(directory), prompts, _STEPS).tokens
    expected = [logits.argmax(-1) for logits in follow(reference, prompts, answers)]
    return sum(int((np.array(found) != best).sum()) for found, best in zip(answers, expected, strict=True))


def write_probe(directory: Path, weights: _Weights, corrected: bool) -> None:
    """The tiny model as a package."""
    graph = engine_graph(
        _CONFIG, lambda name, outputs, inputs: MnnMatrix(outputs, inputs, FLOAT32), corrected=corrected
    )
    with (directory / WEIGHT_FILE).open("wb") as file:
        for place in graph.places:
            for part in place_bytes(place, weights, "rtn"):
                file.write(part.tobytes())
    (directory / GRAPH_FILE).write_bytes(mnn_of_json(graph.net.as_json(b"probe")))
    weights.tensors[patch_named(ARCHITECTURE).embedding_name].astype(np.float16).tofile(
        directory / EMBEDDING_FILES["float16"]
    )
    rows = "".join(f"{base64.b64encode(b'piece%d' % row).decode()} 0 1\n" for row in range(_ROWS))
    (directory / "tokenizer.txt").write_text(f"430 0\n0 0 0\n\n{_ROWS}\n{rows}")
    for name, content in config_files(_CONFIG, "float16", (FLOAT32,), "tokenizer.txt").items():
        (directory / name).write_bytes(content)


def _model() -> tuple[ModelReference, _Weights]:
    """The reference with seeded weights, strong enough that a position off by one changes tokens."""
    patch = patch_named(ARCHITECTURE)
    with torch.device("meta"):
        model = patch.build_reference(_CONFIG)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        spread = 1.0 if name == patch.embedding_name else 0.1 if tensor.dim() == 1 else 3.0 / tensor.shape[-1] ** 0.5
        state[name] = torch.randn(tensor.shape, generator=generator) * spread
        if "norm.weight" in name:
            state[name] += 1.0
        if name == patch.embedding_name:
            state[name] = state[name].half().float()  # as the package stores it
    model.load_state_dict(state, assign=True)
    weights = _Weights({name: tensor.numpy() for name, tensor in state.items()})
    return ModelReference(patch, _CONFIG, model.eval()), weights


def _prompts() -> list[list[int]]:
    random, ids = np.random.default_rng(0), _CONFIG.special_ids
    return [[*random.integers(8, ids.mask, length).tolist(), ids.gmask, ids.bos] for length in _LENGTHS]
