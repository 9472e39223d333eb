"""What a serialized SentencePiece model says of itself beyond its pieces: how it segments and how it normalizes.

Read on the wire, like `sentencepiece_model`: fields 2 (trainer) and 3 (normalizer) of the model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from glmexport.errors import CheckpointError
from glmexport.sentencepiece_model import read_varint

UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4
KINDS = {UNIGRAM: "Unigram", BPE: "BPE", WORD: "Word", CHAR: "Char"}


@dataclass(frozen=True)
class SentencePieceFacts:
    """kind: one of KINDS. pieces, scores, kinds: by piece id. The rest is of the normalizer.

    charsmap: whether characters are replaced (NFKC and the like). dummy_prefix: whether a space is put in front.
    trims: whether spaces at the ends and repeated ones are dropped.
    """

    kind: int
    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    charsmap: bool
    dummy_prefix: bool
    trims: bool


def read_facts(model: bytes, origin: str) -> SentencePieceFacts:
    """Raises CheckpointError where the bytes are no SentencePiece model."""
    try:
        return _read(model)
    except (IndexError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{origin} is truncated or corrupt: no SentencePiece model; download it again."
        ) from error


def _read(model: bytes) -> SentencePieceFacts:
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    kind, charsmap, dummy_prefix, trims = UNIGRAM, False, True, True
    for field, value in _fields(model):
        if not isinstance(value, bytes):
            continue
        inner = dict(_fields(value)) if field in (1, 2, 3) else {}
        if field == 1:
            text, score, piece_kind = inner.get(1, b""), inner.get(2, bytes(4)), inner.get(3, 1)
            pieces.append(text.decode() if isinstance(text, bytes) else "")
            scores.append(struct.unpack("<f", score)[0] if isinstance(score, bytes) else 0.0)
            kinds.append(piece_kind if isinstance(piece_kind, int) else 1)
        elif field == 2:
            found = inner.get(3, UNIGRAM)
            kind = found if isinstance(found, int) else UNIGRAM
        elif field == 3:
            charsmap = bool(inner.get(2))
            dummy_prefix, trims = bool(inner.get(3, 1)), bool(inner.get(4, 1))
    return SentencePieceFacts(kind, tuple(pieces), tuple(scores), tuple(kinds), charsmap, dummy_prefix, trims)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; fixed-width numbers are given as their bytes."""
    position = 0
    while position < len(data):
        tag, position = read_varint(data, position)
        wire = tag & 7
        if wire == 0:
            value, position = read_varint(data, position)
            yield tag >> 3, value
            continue
        size, position = read_varint(data, position) if wire == 2 else ({1: 8, 5: 4}[wire], position)
        if position + size > len(data):
            raise ValueError("a field reaches past the end")
        yield tag >> 3, data[position : position + size]
        position += size
