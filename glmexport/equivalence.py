"""Prove that a patched model computes what the unpatched one computes, before anything is exported."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from glmexport import names
from glmexport.config import ModelConfig, SpecialIds
from glmexport.errors import ExportError
from glmexport.graphs import BlockGraph, EmbeddingGraph, InPlaceBlockGraph, LmHeadGraph, parameters_to
from glmexport.patch import ModelPatch
from glmexport.prompt import prepare_prompt

TOLERANCES = {"float32": 1e-5, "float16": 2.0**-5}
"""Largest absolute difference allowed: activations are of the order of 1 to 10, and the sums run in another order. In
float16 numbers from 4 to 8 are 2**-8 apart, and each of some ten steps may round the other way."""


SPARE_PLACES = 3
"""Of a cache that is written into, which no row may see."""


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


def check_patch(
    patch: ModelPatch, config: ModelConfig, dtype: str = "float32", flavors: Sequence[str] = (names.PORTABLE,)
) -> float:
    """Largest absolute difference between the model patched for each flavor and the unpatched one, prefill and decode.

    Runs a narrow, seeded model of the same kind through both: lengths 2 to 9, left-padded batch, infilling, last
    positions, two decode steps; in float32, and then in `dtype` if that is another.
    Raises ExportError where the difference is above the tolerance or not a number.
    """
    small = narrow(config)
    unpatched = _seeded(patch.build_reference(small))
    patched = {flavor: patch.apply(copy.deepcopy(unpatched), flavor) for flavor in flavors}
    worst = 0.0
    for computed_in in dict.fromkeys(("float32", dtype)):
        for model in (unpatched, *patched.values()):
            parameters_to(model, computed_in)
        for flavor, model in patched.items():
            with torch.inference_mode():
                worst = max(_differences(patch, small, unpatched, model, flavor))
            if not worst <= TOLERANCES[computed_in]:
                transforms = patch.transforms_of(flavor)
                raise ExportError(
                    f"The patched {patch.name} differs from the unpatched one by {worst:.2e} in {computed_in}, at most "
                    f"{TOLERANCES[computed_in]:.0e} is allowed; nothing was exported: one of "
                    f"{', '.join(t.name for t in transforms)} is wrong."
                )
    return worst


def _seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5, generator=generator)
    return model.float()


def _differences(
    patch: ModelPatch, config: ModelConfig, unpatched: nn.Module, patched: nn.Module, flavor: str
) -> Iterator[float]:
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
                rows_first = flavor != names.PORTABLE
                embedded = EmbeddingGraph(patched.get_submodule(patch.embedding), flavor)(tokens)
                yield _apart(embedded.transpose(0, 1) if rows_first else embedded, hidden)
                for block_id in range(config.num_blocks):
                    path, past = patch.block.format(block_id=block_id), pasts[block_id]
                    expected = patch.run_reference_block(
                        unpatched.get_submodule(path), block_id, hidden, hides, places, past
                    )
                    block, inputs = patched.get_submodule(path), (hidden, hides, places, past)
                    found = run_in_place(block, *inputs) if rows_first else BlockGraph(block)(*inputs)
                    told = ~(hides[:, 0].all(-1).T & rows_first)  # over nothing, Attention gives 0
                    yield _apart(found[0][told], expected[0][told])
                    yield _apart(found[1], expected[1])
                    hidden, pasts[block_id] = expected
                logits = unpatched.get_submodule(patch.head)(unpatched.get_submodule(patch.final_norm)(hidden))[-1]
                last = (patched.get_submodule(patch.final_norm), patched.get_submodule(patch.head), "none", flavor)
                yield _apart(LmHeadGraph(*last)(hidden.transpose(0, 1) if rows_first else hidden), logits)


def run_in_place(
    block: nn.Module, hidden: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `ModelPatch.run_reference_block` gives, by a block that writes into caches, with some places to spare."""
    length, batch = past.shape[1:3]
    seq = hidden.shape[0]
    room = seq + SPARE_PLACES
    caches = [torch.nn.functional.pad(one.permute(1, 2, 0, 3), (0, 0, 0, room)) for one in past]
    seen = torch.nn.functional.pad(mask, (0, SPARE_PLACES), value=True)
    indices = torch.full((batch,), length)
    out, *caches = InPlaceBlockGraph(block)(hidden.transpose(0, 1), seen, positions, indices, *caches)
    presents = torch.stack([one[:, :, : length + seq].permute(2, 0, 1, 3) for one in caches])
    return out.transpose(0, 1), presents


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    difference = float((found - expected).abs().max())
    return difference if difference == difference else float("inf")  # max() over floats would lose a NaN
