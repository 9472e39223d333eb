"""What the reference would have said at each step of an answer that somebody else gave, in one pass over its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from glmexport.checkpoint import Checkpoint
from glmexport.config import ModelConfig
from glmexport.patch import ModelPatch
from glmexport.prompt import BoolArray, IntArray, prepare_prompt
from glmexport.session import Session
from glmexport.verify.reference import StreamedReference
from glmexport.vocabulary import VocabularyMap

Array: TypeAlias = npt.NDArray[Any]
BlockStep: TypeAlias = Callable[[Array, BoolArray, IntArray], Array]
"""(hidden [seq, batch, hidden], mask, positions) -> hidden, without past."""


class Reference(Protocol):
    """A model in parts. `blocks` gives one after the other, so that one is in memory at a time."""

    @property
    def config(self) -> ModelConfig: ...
    def embed(self, input_ids: IntArray) -> Array: ...
    def blocks(self) -> Iterator[BlockStep]: ...
    def logits(self, hidden: Array) -> Array:
        """Hidden states [rows, hidden] of the last block -> [rows, vocab]."""
        ...


def follow(
    reference: Reference, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[npt.NDArray[np.float32]]:
    """Logits float32 [tokens, vocab] from which each token of each answer would have been chosen."""
    ids = reference.config.special_ids
    rows = [prepare_prompt([[*prompt, *answer[:-1]]], ids) for prompt, answer in zip(prompts, answers, strict=True)]
    states = [reference.embed(row.input_ids) for row in rows]
    for block in reference.blocks():
        states = [block(state, row.attention_mask, row.position_ids) for state, row in zip(states, rows, strict=True)]
    ends = [state[len(state) - len(answer) :, 0] for state, answer in zip(states, answers, strict=True)]
    logits = reference.logits(np.concatenate(ends))
    return np.split(logits, np.cumsum([len(answer) for answer in answers])[:-1])


class CheckpointReference:
    """The unpatched reference with a checkpoint's weights, read block by block."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, vocabulary: VocabularyMap) -> None:
        """config, vocabulary: of what is compared with it, which may be slimmed."""
        self.config = config
        self._patch = checkpoint.patch
        self._parts = StreamedReference(checkpoint, vocabulary)

    def embed(self, input_ids: IntArray) -> Array:
        """Float32 [seq, batch, hidden]."""
        return self._parts.embed(input_ids).numpy()

    def blocks(self) -> Iterator[BlockStep]:
        """Each block in turn."""
        for block_id in range(self.config.num_blocks):
            path = self._patch.block.format(block_id=block_id)
            module = self._parts.module(path, self._parts.weights(path))
            yield block_step(self._patch, self.config, module, block_id)

    def logits(self, hidden: Array) -> Array:
        """Float32 [rows, vocab]."""
        path = self._patch.final_norm
        norm = self._parts.module(path, self._parts.weights(path))
        with torch.inference_mode():
            return self._parts.logits(norm(torch.from_numpy(hidden))).numpy()


class ModelReference:
    """The unpatched reference, held whole."""

    def __init__(self, patch: ModelPatch, config: ModelConfig, model: nn.Module) -> None:
        self.config = config
        self._patch, self._model = patch, model

    def embed(self, input_ids: IntArray) -> Array:
        """Float32 [seq, batch, hidden]."""
        rows = self._model.get_submodule(self._patch.embedding)(torch.from_numpy(input_ids))
        embedded: Array = rows.detach().transpose(0, 1).numpy()
        return embedded

    def blocks(self) -> Iterator[BlockStep]:
        """Each block in turn."""
        for block_id in range(self.config.num_blocks):
            module = self._model.get_submodule(self._patch.block.format(block_id=block_id))
            yield block_step(self._patch, self.config, module, block_id)

    def logits(self, hidden: Array) -> Array:
        """Float32 [rows, vocab]."""
        with torch.inference_mode():
            normed = self._model.get_submodule(self._patch.final_norm)(torch.from_numpy(hidden))
            logits: Array = self._model.get_submodule(self._patch.head)(normed).numpy()
        return logits


class SessionReference:
    """A bundle, run by onnxruntime."""

    def __init__(self, session: Session) -> None:
        self.config = session.config
        self._session = session

    def embed(self, input_ids: IntArray) -> Array:
        """Float32 [seq, batch, hidden]."""
        return self._session.embed(input_ids)

    def blocks(self) -> Iterator[BlockStep]:
        """Each block in turn."""
        for block_id in range(self.config.num_blocks):

            def step(hidden: Array, mask: BoolArray, positions: IntArray, number: int = block_id) -> Array:
                past = self._session.empty_past(hidden.shape[1])
                return self._session.block(number, hidden, mask, positions, past)[0]

            yield step

    def logits(self, hidden: Array) -> Array:
        """Float32 [rows, vocab]."""
        rows = [self._session.head(row[None, None])["logits"][0] for row in hidden]
        return np.stack(rows)


def block_step(patch: ModelPatch, config: ModelConfig, module: nn.Module, block_id: int) -> BlockStep:
    """One unpatched block as a function of numpy arrays."""
    past = torch.zeros(2, 0, 1, config.num_heads, config.head_dim)

    def step(hidden: Array, mask: BoolArray, positions: IntArray) -> Array:
        with torch.inference_mode():
            given = (torch.from_numpy(hidden), torch.from_numpy(mask), torch.from_numpy(positions))
            result: Array = patch.run_reference_block(module, block_id, *given, past)[0].numpy()
            return result

    return step
