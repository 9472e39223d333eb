"""Prove that a patched model computes what the unpatched one computes, before anything is exported."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from glmexport.config import ModelConfig, SpecialIds
from glmexport.errors import ExportError
from glmexport.graphs import BlockGraph, EmbeddingGraph, LmHeadGraph, parameters_to
from glmexport.patch import ModelPatch
from glmexport.prompt import prepare_prompt

TOLERANCES = {"float32": 1e-5, "float16": 2.0**-5}
"""Largest absolute difference allowed: activations are of the order of 1 to 10, and the sums run in another order. In
float16 numbers from 4 to 8 are 2**-8 apart, and each of some ten steps may round the other way."""


def narrow(config: ModelConfig) -> ModelConfig:
    """The same architecture with the same head width, narrow enough to run in milliseconds.

    What a transform changes does not depend on how many heads, rows or blocks there are; that the wide model is right
    too is shown by `verify`, on its own weights.
    """
    return dataclasses.replace(
        config,
        vocab_size=32,
        hidden_size=2 * config.head_dim,
        num_heads=2,
        num_blocks=2,
        inner_size=48,
        num_image_tokens=0,
        special_ids=SpecialIds(mask=20, gmask=21, bos=24, eos=25, pad=3, forced=5),
    )


def check_patch(patch: ModelPatch, config: ModelConfig, dtype: str = "float32") -> float:
    """Largest absolute difference between the patched and the unpatched model, over prefill and decode.

    Runs a narrow, seeded model of the same kind through both: lengths 2 to 9, left-padded batch, infilling, last
    positions, two decode steps; in float32, and then in `dtype` if that is another.
    Raises ExportError where the difference is above the tolerance or not a number.
    """
    small = narrow(config)
    unpatched = _seeded(patch.build_reference(small))
    patched = patch.apply(copy.deepcopy(unpatched))
    worst = 0.0
    for computed_in in dict.fromkeys(("float32", dtype)):
        for model in (unpatched, patched):
            parameters_to(model, computed_in)
        with torch.inference_mode():
            worst = max(_differences(patch, small, unpatched, patched))
        if not worst <= TOLERANCES[computed_in]:
            raise ExportError(
                f"The patched {patch.name} differs from the unpatched one by {worst:.2e} in {computed_in}, at most "
                f"{TOLERANCES[computed_in]:.0e} is allowed; nothing was exported: one of "
                f"{', '.join(t.name for t in patch.transforms)} is wrong."
            )
    return worst


def _seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5, generator=generator)
    return model.float()


def _differences(patch: ModelPatch, config: ModelConfig, unpatched: nn.Module, patched: nn.Module) -> Iterator[float]:
    ids = config.special_ids
    prompts = (
        [[ids.gmask, ids.bos]],
        [[5, 7, ids.mask, 9, 11, 2, ids.bos]],
        [[6, ids.gmask, ids.bos], [4, 8, 15, 16, 2, 1, 0, ids.gmask, ids.bos]],
    )
    heads = (config.num_heads, config.head_dim)
    dtype = next(unpatched.parameters()).dtype
    for rows in prompts:
        prompt = prepare_prompt(rows, ids)
        steps = [(prompt.input_ids, prompt.attention_mask, prompt.position_ids)]
        steps.extend((prompt.input_ids[:, -1:], *prompt.decode_step(generated)) for generated in range(2))
        offsets = (0, max(config.max_positions - 1 - int(prompt.position_ids[:, 0].max()), 0))
        for offset in offsets:
            pasts = [torch.zeros(2, 0, len(rows), *heads, dtype=dtype)] * config.num_blocks
            for input_ids, mask, positions in steps:
                tokens, hides = torch.from_numpy(input_ids), torch.from_numpy(mask)
                places = torch.from_numpy(positions + np.array([[offset], [0]]))
                hidden = unpatched.get_submodule(patch.embedding)(tokens).transpose(0, 1)
                yield _apart(EmbeddingGraph(patched.get_submodule(patch.embedding))(tokens), hidden)
                for block_id in range(config.num_blocks):
                    path, past = patch.block.format(block_id=block_id), pasts[block_id]
                    expected = patch.run_reference_block(
                        unpatched.get_submodule(path), block_id, hidden, hides, places, past
                    )
                    found = BlockGraph(patched.get_submodule(path))(hidden, hides, places, past)
                    yield from (_apart(a, b) for a, b in zip(found, expected, strict=True))
                    hidden, pasts[block_id] = expected
                logits = unpatched.get_submodule(patch.head)(unpatched.get_submodule(patch.final_norm)(hidden))[-1]
                head = LmHeadGraph(patched.get_submodule(patch.final_norm), patched.get_submodule(patch.head), "none")
                yield _apart(head(hidden), logits)


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    difference = float((found - expected).abs().max())
    return difference if difference == difference else float("inf")  # max() over floats would lose a NaN
