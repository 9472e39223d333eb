"""The pieces of a serialized SentencePiece model, read and marked on the wire.

The protobuf classes for it that sentencepiece and transformers ship cannot be loaded into one process: both register
the same file name.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

NORMAL, UNUSED, BYTE = 1, 5, 6  # `SentencePiece.Type` of a SentencePiece model: what the types used here are called


def piece_kinds(model: bytes) -> list[int]:
    """`SentencePiece.Type` of each piece of a model as SentencePiece serializes it, [pieces]."""
    return [kind for _, _, kind in _entries(model)]


def without_pieces(model: bytes, drop: NDArray[np.bool_]) -> bytes:
    """The serialized model with the pieces where `drop` [pieces] is set marked as unused.

    It is what the C++ library calls SetVocabulary, which the Python one no longer offers and which spoils byte pieces.
    """
    parts = []
    end = 0
    for dropped, (start, stop, _) in zip(drop.tolist(), _entries(model), strict=True):
        message = model[start:stop] + (bytes((0x18, UNUSED)) if dropped else b"")  # the last value of a field counts
        parts.append(b"\x0a" + _as_varint(len(message)) + message)
        end = stop
    return b"".join(parts) + model[end:]


def _entries(model: bytes) -> Iterator[tuple[int, int, int]]:
    """(start, stop, type) of each piece's message in a model serialized by SentencePiece, where they come first.

    In it field 1 is the piece, 2 its score, 3 its type; SentencePiece writes fields in this order.
    """
    stop = 0
    while stop < len(model) and model[stop] == 0x0A:
        size, start = read_varint(model, stop + 1)
        stop = start + size
        length, position = read_varint(model, start + 1)
        position += length
        if position < stop and model[position] == 0x15:
            position += 5
        yield start, stop, model[position + 1] if position < stop and model[position] == 0x18 else NORMAL


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """(value, position after it) of a protobuf varint."""
    value = shift = 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return value | data[position] << shift, position + 1


def _as_varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*digits, value))
