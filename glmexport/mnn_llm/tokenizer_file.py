"""`tokenizer.mtok`: the checkpoint's SentencePiece model, and what is done to text around it, for MNN's engine.

The engine's older `tokenizer.txt` neither normalizes nor segments by Unigram, and puts a space in front of every part
of a text; the binary form can do what the original tokenizer does:

- newlines and tabs are pieces of their own, and so are runs of 2 to 80 spaces, the longest first. Here these pieces are
  written as what they stand for, so that answers show newlines and not `<n>`.
- a space is put in front of a text.
- Unigram models segment by score; BPE models by merges, which are made from the scores.

What a text cannot be: it may not hold the noncharacters below, which stand for something while a text is encoded. And
where two segmentations of a text have exactly the same score, as of a run of one character by pieces of different
length, the engine may take the other one: the text is the same, its ids are not.

Source of the layout: MNN's `PipelineTokenizer::load_vocab_binary`, 3.6.1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from glmexport.config import ModelConfig
from glmexport.mnn_llm.sentencepiece_facts import BPE, SentencePieceFacts
from glmexport.sentencepiece_model import BYTE, NORMAL

USER_DEFINED, UNKNOWN = 4, 2
SPACE = "▁"
LONGEST_RUN = 80
NEVER = -1e6  # the score of what no text is segmented into
UNKNOWN_PENALTY = 10.0  # as in SentencePiece: an unknown character scores so much less than any piece

# noncharacters: no text holds them, whatever it is
LONG_RUN, RUN, APART = "\ufdd0", "\ufdd1", "\ufdd2"
"""A run of 80 spaces; one space of a shorter run; between the characters of what would read as a special token."""

_MAGIC = "430 4\n"
_REPLACE, _SEQUENCE, _PREPEND = 3, 4, 2
_STOOD_FOR = {"<n>": "\n", "<|tab|>": "\t"} | {f"<|blank_{n}|>": " " * n for n in range(2, LONGEST_RUN + 1)}


@dataclass(frozen=True)
class Entry:
    """A row of the vocabulary as text is matched with it, and as it is shown."""

    text: bytes
    row: int
    score: float


def tokenizer_file(
    model: SentencePieceFacts, config: ModelConfig, row_of: Sequence[int], special: Sequence[int]
) -> bytes:
    """The whole file.

    row_of: id in the SentencePiece model -> row of the model's vocabulary, -1 where it is dropped. special: rows that
    the engine looks for by name before anything else, and does not show.
    """
    specials = " ".join(map(str, (*special, config.special_ids.eos)))
    lines = f"{_MAGIC}{len(special)} 1 0\n{specials}\n"
    entries = vocabulary_entries(model, row_of, config.vocab_size)
    if model.kind == BPE:
        merges = merge_rules(model, row_of, config.vocab_size)
        body = _bpe(entries, merges)
    else:
        unknown = next((row_of[i] for i, kind in enumerate(model.kinds) if kind == UNKNOWN), 0)
        body = _unigram(entries, max(unknown, 0))
    return lines.encode() + _normalizer(model) + b"\0" + body + _decoder() + struct.pack("<I", 0)


def vocabulary_entries(model: SentencePieceFacts, row_of: Sequence[int], rows: int) -> list[Entry]:
    """One entry a row, in the order of their bytes; rows without a piece are empty.

    In a Unigram model bytes are written as themselves, so that characters without a piece are segmented into them with
    the score that SentencePiece gives an unknown character, and text that reads `<0x41>` is not taken for a byte. Where
    a piece of its own has that text, the byte can only be shown. With BPE the engine looks for `<0x41>` itself.
    """
    normal = [score for score, kind in zip(model.scores, model.kinds, strict=True) if kind == NORMAL]
    unknown = min(normal, default=0.0) - UNKNOWN_PENALTY
    taken = {
        shown_as(piece).encode() for piece, kind in zip(model.pieces, model.kinds, strict=True) if kind == NORMAL
    } | {b"\n", b"\t", b" "}
    entries: dict[int, Entry] = {}
    for piece_id, (piece, score, kind) in enumerate(zip(model.pieces, model.scores, model.kinds, strict=True)):
        row = row_of[piece_id]
        if row < 0:
            continue
        text = shown_as(piece).encode()
        if piece in _STOOD_FOR:
            entries[row] = Entry(text, row, _run_score(len(text), unknown))
        elif kind == NORMAL:
            entries[row] = Entry(text, row, score)
        elif kind == USER_DEFINED:
            entries[row] = Entry(text, row, len(text) * max(normal, default=0.0) - 0.1)
        elif kind == UNKNOWN:
            entries[row] = Entry(text, row, unknown)
        elif kind == BYTE and model.kind != BPE and bytes((byte := int(piece[3:5], 16),)) not in taken:
            entries[row] = Entry(bytes((byte,)), row, _byte_score(byte, unknown))
        else:
            entries[row] = Entry(text, row, NEVER)
    everything = [entries.get(row, Entry(b"", row, NEVER)) for row in range(rows)]
    if model.kind == BPE:
        everything.append(Entry(b" ", rows, NEVER))  # what runs of spaces are merged from
    return sorted(everything, key=lambda entry: entry.text)


def merge_rules(model: SentencePieceFacts, row_of: Sequence[int], rows: int) -> list[tuple[int, int, int]]:
    """(left row, right row, rank) of every way to merge two pieces into one; the lowest rank is merged first.

    A BPE model of SentencePiece has no rules but scores: the two neighbours whose union scores best are merged.
    """
    known = {
        piece: row_of[i]
        for i, (piece, kind) in enumerate(zip(model.pieces, model.kinds, strict=True))
        if kind == NORMAL and row_of[i] >= 0
    }
    scores = {piece: model.scores[i] for i, piece in enumerate(model.pieces) if piece in known}
    blanks = {len(text): row_of[i] for i, piece in enumerate(model.pieces) if (text := _STOOD_FOR.get(piece, "")) > " "}
    single = rows
    # the longest run so far grows before another one begins
    runs = [(blanks[n], single) for n in range(LONGEST_RUN - 1, 1, -1) if {n, n + 1} <= blanks.keys()]
    if 2 in blanks:
        runs.append((single, single))
    rules = [(left, right, rank) for rank, (left, right) in enumerate(runs)]
    ranks = {score: rank for rank, score in enumerate(sorted(set(scores.values()), reverse=True), len(rules))}
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = known.get(piece[:cut]), known.get(piece[cut:])
            if left is not None and right is not None:
                rules.append((left, right, ranks[score]))
    return sorted(rules)


def shown_as(piece: str) -> str:
    """What a piece is written as: itself, or the newline, tab or spaces that it stands for."""
    return _STOOD_FOR.get(piece, piece)


def _run_score(length: int, unknown: float) -> float:
    """Nothing else matches them; of a run beyond 80 spaces the longest parts come first."""
    return length * length * 1e-6 + unknown


def _byte_score(byte: int, unknown: float) -> float:
    """So that the bytes of one character have the score of an unknown one together."""
    if byte < 0x80:
        return unknown
    following = 0 if byte < 0xC0 else 1 if byte < 0xE0 else 2 if byte < 0xF0 else 3
    return unknown / 4 if not following else unknown - following * unknown / 4


def _normalizer(model: SentencePieceFacts) -> bytes:
    runs = ((" " * LONGEST_RUN, LONG_RUN), ("  ", RUN * 2), (f"{RUN} ", RUN * 2))
    stood_for = (("<n>", "\n"), ("<|tab|>", "\t"))
    blanks = tuple((f"<|blank_{n}|>", " " * n) for n in range(2, LONGEST_RUN + 1))
    steps = [_replace(source, target) for source, target in ((APART, ""), *stood_for, *runs)]
    if model.dummy_prefix:
        steps.append(bytes((_PREPEND,)) + _text(SPACE))
    last = ((" ", SPACE), (RUN, " "), (LONG_RUN, " " * LONGEST_RUN), *blanks)
    steps += [_replace(source, target) for source, target in last]
    return struct.pack("<BI", _SEQUENCE, len(steps)) + b"".join(steps)


def _replace(source: str, target: str) -> bytes:
    return bytes((_REPLACE,)) + _text(source) + _text(target)


def _unigram(entries: Iterable[Entry], unknown: int) -> bytes:
    rows = [_bytes(entry.text) + struct.pack("<Id", entry.row, entry.score) for entry in entries]
    return struct.pack("<BIIB", 2, len(rows), unknown, 0) + b"".join(rows)


def _bpe(entries: Iterable[Entry], merges: Sequence[tuple[int, int, int]]) -> bytes:
    rows = [_bytes(entry.text) + struct.pack("<I", entry.row) for entry in entries]
    rules = b"".join(struct.pack("<III", *rule) for rule in merges)
    return struct.pack("<BIBBI", 0, len(rows), 1, 0, len(merges)) + b"".join(rows) + rules


def _decoder() -> bytes:
    """For whole texts: spaces, bytes, one string, and no space in front."""
    spaces = bytes((5,)) + _text(SPACE) + _text(" ")
    strip = bytes((6,)) + _text(" ") + struct.pack("<II", 1, 0)
    return struct.pack("<BI", 7, 4) + spaces + bytes((1,)) + bytes((4,)) + strip


def _text(text: str) -> bytes:
    return _bytes(text.encode())


def _bytes(data: bytes) -> bytes:
    return struct.pack("<H", len(data)) + data
