"""ModelPatch: all that the core knows about one architecture."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glmexport.config import ModelConfig, TokenizerFacts
from glmexport.errors import BundleError

BlockFunction = Callable[
    [nn.Module, int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    tuple[torch.Tensor, torch.Tensor],
]


@dataclass(frozen=True)
class Transform:
    """One named change `nn.Module -> nn.Module` that makes a model export-friendly and computes the same."""

    name: str
    summary: str
    apply: Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class ModelPatch:
    """One architecture: how to know it, what its unpatched reference is, and what makes it export.

    recognise: raw `config.json` -> whether this is the architecture.
    read_config: raw `config.json` and tokenizer facts -> ModelConfig; raises CheckpointError.
    build_reference: ModelConfig -> the unpatched reference on torch's current default device (`meta` included), in eval
        mode, whose `state_dict()` names are the checkpoint's tensor names.
    run_reference_block: (unpatched block, block_id, hidden [seq, batch, hidden], attention_mask bool
        [batch, 1, seq, total] where True hides, position_ids int64 [batch, 2, seq], past
        [2, past, batch, heads, head_dim]) ->
        (hidden [seq, batch, hidden], presents [2, total, batch, heads, head_dim]).
    transforms: applied in this order.
    embedding, block, final_norm, head: paths of these submodules in the reference; `block` holds `{block_id}`.
    ignored_tensors: regular expressions (full match) of checkpoint tensors that may be there and are not used.
    """

    name: str
    title: str
    recognise: Callable[[Mapping[str, Any]], bool]
    read_config: Callable[[Mapping[str, Any], TokenizerFacts], ModelConfig]
    build_reference: Callable[[ModelConfig], nn.Module]
    run_reference_block: BlockFunction
    transforms: tuple[Transform, ...]
    embedding: str
    block: str
    final_norm: str
    head: str
    ignored_tensors: tuple[str, ...] = ()

    @property
    def embedding_name(self) -> str:
        """Name of the embedding's tensor [vocab, hidden] in the checkpoint."""
        return f"{self.embedding}.weight"

    @property
    def head_name(self) -> str:
        """Name of the output head's tensor [vocab, hidden] in the checkpoint."""
        return f"{self.head}.weight"

    def apply(self, model: nn.Module) -> nn.Module:
        """Apply every transform in order; works on the model in place and returns it."""
        for transform in self.transforms:
            model = transform.apply(model)
        return model


def all_patches() -> tuple[ModelPatch, ...]:
    """Every supported architecture, as listed in `glmexport.patches.PATCHES`.

    This is the one place where the core reaches into the patches package.
    """
    patches = importlib.import_module("glmexport.patches").PATCHES
    for patch in patches:
        if not isinstance(patch, ModelPatch):
            raise TypeError(f"glmexport.patches.PATCHES must hold ModelPatch objects, found {type(patch).__name__}")
    return tuple(patches)


def patch_named(architecture: str) -> ModelPatch:
    """The patch of an architecture that a bundle states. Raises BundleError where there is none."""
    patch = next((patch for patch in all_patches() if patch.name == architecture), None)
    if patch is None:
        raise BundleError(f"The bundle's architecture {architecture!r:.80} is not one this glmexport knows.")
    return patch
