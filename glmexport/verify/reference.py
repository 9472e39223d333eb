"""The unpatched reference, streamed: one block's weights in memory at a time."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from glmexport.checkpoint import Checkpoint
from glmexport.prompt import IntArray
from glmexport.vocabulary import VocabularyMap

HEAD_BAND_BYTES = 64 << 20


class StreamedReference:
    """The parts of the reference model with the checkpoint's weights in float32, made when asked for."""

    def __init__(self, checkpoint: Checkpoint, vocabulary: VocabularyMap) -> None:
        """vocabulary: the rows that ids and logits are about, of a slimmed bundle."""
        self._checkpoint = checkpoint
        self._vocabulary = vocabulary
        self._patch = checkpoint.patch
        with torch.device("meta"):
            self._model = self._patch.build_reference(checkpoint.config)

    def embed(self, input_ids: IntArray) -> torch.Tensor:
        """input_ids [batch, seq] -> float32 [seq, batch, hidden]; reads only the rows it needs."""
        rows, places = np.unique(self._vocabulary.to_old(input_ids), return_inverse=True)
        name = self._checkpoint.embedding_name
        table = torch.cat([self._checkpoint.read_rows(name, int(row), int(row) + 1) for row in rows]).float()
        embedded: torch.Tensor = nn.functional.embedding(torch.from_numpy(places.reshape(input_ids.shape)), table)
        return embedded.transpose(0, 1)

    def weights(self, path: str) -> dict[str, torch.Tensor]:
        """Every parameter of the submodule at `path`, float32, by the checkpoint's name."""
        names = [name for name, _ in self._model.get_submodule(path).named_parameters(prefix=path)]
        return {name: self._checkpoint.read(name).float() for name in names}

    def module(self, path: str, weights: dict[str, torch.Tensor]) -> nn.Module:
        """The unpatched submodule at `path` holding these weights (not copied)."""
        module = copy.deepcopy(self._model.get_submodule(path))
        module.load_state_dict({name.removeprefix(f"{path}."): value for name, value in weights.items()}, assign=True)
        return module.eval()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final-normed states [rows, hidden] -> logits [rows, kept vocab]; the head's rows are read in bands.

        The product is in the states' dtype, the result float32.
        """
        name, vocab = self._checkpoint.head_name, self._checkpoint.config.vocab_size
        band = max(HEAD_BAND_BYTES // (4 * hidden.shape[-1]), 1)
        parts = [
            nn.functional.linear(hidden, self.kept_rows(name, start, min(start + band, vocab)).to(hidden.dtype)).float()
            for start in range(0, vocab, band)
        ]
        return torch.cat(parts, dim=-1)

    def kept_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Float32 rows of a [vocab, hidden] matrix of the checkpoint: the kept ones of old ids `start` to `stop`."""
        rows = self._checkpoint.read_rows(name, start, stop).float()
        return torch.from_numpy(self._vocabulary.select(start, stop, rows.numpy()))

    def table_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Float32 rows of such a matrix by new ids."""
        old_ids = self._vocabulary.old_ids()[start:stop]
        first, last = int(old_ids[0]), int(old_ids[-1]) + 1
        band = max(HEAD_BAND_BYTES // (4 * self._checkpoint.config.hidden_size), 1)
        return torch.cat([self.kept_rows(name, at, min(at + band, last)) for at in range(first, last, band)])
