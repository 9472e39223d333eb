"""The model's facts, read strictly once from a checkpoint and frozen.

Everything after the reading takes a `ModelConfig`; nobody looks a key up in a raw config a second time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glmexport.errors import CheckpointError

MAX_SIZE = 1 << 24
"""Of one dimension; the products of two stay far below 2**63."""

_MAX_BLOCKS = 4096


@dataclass(frozen=True)
class SpecialIds:
    """Token ids with a meaning of their own, in the numbering of the checkpoint or of a slimmed bundle.

    forced: what the original generates where a logit is not finite.
    """

    mask: int
    gmask: int
    bos: int
    eos: int
    pad: int
    forced: int


@dataclass(frozen=True)
class TokenizerFacts:
    """What the tokenizer files say about ids, as far as there are any.

    num_image_tokens: the key of that name in `tokenizer_config.json`, None where the file or the key is absent.
    piece_ids: SentencePiece id of every special piece found in the SentencePiece model, empty without one. These do not
    include the image-token offset.
    """

    num_image_tokens: int | None
    piece_ids: Mapping[str, int]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and ids of one model; every count is a number of elements, never of bytes."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_blocks: int
    num_heads: int
    inner_size: int
    max_positions: int
    layernorm_epsilon: float
    num_image_tokens: int
    special_ids: SpecialIds

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


def implausible_sizes(config: ModelConfig) -> list[str]:
    """Sizes and ids that no supported model has, in words; nothing may be built of them."""
    sizes = {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "inner": config.inner_size,
        "heads": config.num_heads,
        "positions": config.max_positions,
    }
    wrong = [f"{name} {size}" for name, size in sizes.items() if not 0 < size <= MAX_SIZE]
    if not 0 < config.num_blocks <= _MAX_BLOCKS:
        wrong.append(f"blocks {config.num_blocks}")
    ids = {"image tokens": config.num_image_tokens, **vars(config.special_ids)}
    wrong += [f"{name} {value}" for name, value in ids.items() if not 0 <= value <= config.vocab_size]
    if not wrong and config.hidden_size % config.num_heads:
        wrong.append(f"heads {config.num_heads}, which do not divide hidden {config.hidden_size}")
    return [f"{complaint:.80}" for complaint in wrong]


class RawConfig:
    """Typed, one-time access to the keys of a parsed `config.json`; all complaints are raised together."""

    def __init__(self, raw: Mapping[str, Any], origin: str) -> None:
        self._raw = raw
        self._origin = origin
        self._complaints: list[str] = []
        self._wrong: set[str] = set()

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """The whole number under `key`; a missing key without a default, or a value under `minimum`, is a complaint."""
        value = self._raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self._complain(key, f"a whole number of at least {minimum}")
            return minimum
        return value

    def positive_float(self, key: str) -> float:
        """The positive number under `key`."""
        value = self._raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            self._complain(key, "a positive number")
            return 1.0
        return float(value)

    def require(self, key: str, expected: object) -> None:
        """Complain unless the value under `key` is exactly `expected`."""
        if self._raw.get(key) != expected:
            self._complain(key, json.dumps(expected))

    def demand(self, holds: bool, complaint: str, *keys: str) -> None:
        """Add a complaint about the values of `keys` together, unless it holds or one of them is wrong already."""
        if not holds and self._wrong.isdisjoint(keys):
            self._complaints.append(complaint)

    def finish(self) -> None:
        """Raise CheckpointError naming every complaint, if there was any."""
        if self._complaints:
            raise CheckpointError(
                f"{self._origin} does not describe a supported model: " + "; ".join(self._complaints) + "."
            )

    def _complain(self, key: str, expected: str) -> None:
        self._wrong.add(key)
        found = f"{json.dumps(self._raw[key], ensure_ascii=False):.80}" if key in self._raw else "no such key"
        self._complaints.append(f"`{key}` must be {expected}, found {found}")
