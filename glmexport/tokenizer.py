"""Text to the ids of a bundle and back, over the SentencePiece model of its checkpoint.

Three numberings meet here and nowhere else: a piece's id in the SentencePiece model; the checkpoint's (old) id, which
is that plus the image tokens in front; the bundle's (new) id, which is the old one's rank among the kept rows. What
comes after the last piece is padding.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor, set_min_log_level

from glmexport import names
from glmexport.errors import BundleError, CheckpointError, GlmExportError
from glmexport.sentencepiece_model import BYTE, NORMAL, UNUSED, piece_kinds, without_pieces
from glmexport.untrusted import few, quoted, read_small_file
from glmexport.vocabulary import VocabularyMap

GMASK, BOS = "[gMASK]", "<sop>"
SPECIAL_PIECES = ("[MASK]", GMASK, "[sMASK]", "<unused_0>", BOS, "<eop>", "<ENC>", "<dBLOCK>")

MODEL_LIMIT = 64 << 20  # bytes; the real one has 2.7 MB
_FATAL = 3  # of sentencepiece's log levels
_SPACE, _NEWLINE = "▁", "<n>"
_STAND_INS = {"\n": _NEWLINE, "\t": "<|tab|>"} | {" " * count: f"<|blank_{count}|>" for count in range(80, 1, -1)}
_STOOD_FOR = {piece: text for text, piece in _STAND_INS.items()}
_TO_REPLACE = re.compile("|".join(_STAND_INS))  # the longest run of spaces comes first
_TO_RESTORE = re.compile("|".join(map(re.escape, _STOOD_FOR)))
_BEGINNINGS = frozenset(piece[:end] for piece in _STOOD_FOR for end in range(1, len(piece)))
_BATCH = 1024  # texts of a corpus held at once
_EACH_BYTE = "glmexport-each-byte"  # SentencePiece shows every byte that belongs to no character as one U+FFFD
codecs.register_error(_EACH_BYTE, lambda error: ("\ufffd", getattr(error, "start", 0) + 1))


class Tokenizer:
    """Encodes and decodes in the bundle's ids.

    `decode(encode(text)) == text` for every Unicode text without "▁" (it is a space to SentencePiece) and without what
    reads like a newline, tab or blank piece; so it is with the original, apart from its clean-up of English.

    vocabulary: the rows that the bundle keeps.
    """

    def __init__(
        self,
        model: bytes,
        *,
        num_image_tokens: int,
        vocabulary: VocabularyMap | None = None,
        origin: str = names.TOKENIZER_MODEL,
    ) -> None:
        """Parse a SentencePiece model.

        num_image_tokens: of the checkpoint, also where the bundle keeps none of them.
        vocabulary: None keeps one row for each image token and piece.
        origin: what to call the model in errors.

        Raises CheckpointError: no such model, not this architecture's, too large for the vocabulary.
        """
        self._processor = load_processor(model, origin)
        self._pieces: list[str] = self._processor.IdToPiece(list(range(len(self._processor))))
        self._id_of = {piece: piece_id for piece_id, piece in enumerate(self._pieces)}
        if missing := [name for name in (_SPACE, _NEWLINE, GMASK, BOS) if name not in self._id_of]:
            raise CheckpointError(f"{origin} has no piece {few(missing)}; expected the tokenizer of ChatGLM-6B.")
        rows = num_image_tokens + len(self._pieces)
        self.vocabulary = VocabularyMap.identity(rows) if vocabulary is None else vocabulary
        if rows > self.vocabulary.full_size:
            raise CheckpointError(
                f"{origin} needs {rows} rows ({num_image_tokens} image tokens, {len(self._pieces)} pieces) where the "
                f"vocabulary has {self.vocabulary.full_size}; check that both are of one checkpoint."
            )
        self._first = num_image_tokens  # old id of piece 0
        self._new_of = self.vocabulary.to_new(np.arange(self._first, rows))  # [pieces], -1 where dropped
        names = "|".join(re.escape(name) for name in SPECIAL_PIECES if name in self._id_of)
        self._specials = re.compile(f"({names})")

    @classmethod
    def load(cls, directory: Path, *, num_image_tokens: int, vocabulary: VocabularyMap | None = None) -> Tokenizer:
        """The tokenizer of a directory that holds `ice_text.model`; errors as on construction."""
        path = directory / names.TOKENIZER_MODEL
        model = read_small_file(path, MODEL_LIMIT)
        return cls(model, num_image_tokens=num_image_tokens, vocabulary=vocabulary, origin=str(path))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, with none added.

        special: whether `[gMASK]`, `<sop>` and the other names of `SPECIAL_PIECES` in the text mean those tokens; else
        they are text like any other.

        Raises GlmExportError where the bundle keeps no tokens to write some of it with, and where it is no Unicode.
        """
        if not special:
            return self._encode(text)
        ids: list[int] = []
        begun = False
        for number, part in enumerate(self._specials.split(text)):
            if number % 2:
                ids.append(self._kept(part))
            elif part:
                ids += self._encode(part, continued=begun)
                begun = True
        return ids

    def prompt_ids(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a prompt: the text's, then `[gMASK]` and `<sop>`; arguments and errors as of `encode`."""
        return [*self.encode(text, special=special), self._kept(GMASK), self._kept(BOS)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; those of special tokens, images and padding have none. GlmExportError where one is no id."""
        return _restore(self._processor.DecodeIds(self._text_pieces(ids)))

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        return TextStream(self)

    def piece(self, new_id: int) -> str:
        """What a row is called: its piece as in the SentencePiece model, `<image_N>` or `<padding_N>` (N: the old id).

        ValueError where there is no such row.
        """
        return self._name(int(self.vocabulary.to_old(np.array(new_id))))

    def token_bytes(self, new_id: int) -> bytes:
        """UTF-8 of what a row writes by itself, wherever it stands; of rows without a text, what they are called.

        ValueError where there is no such row.
        """
        name = self.piece(new_id)
        piece_id = self._id_of.get(name)
        if piece_id is not None and self._processor.IsByte(piece_id):
            return bytes.fromhex(name[3:5])
        return _restore(name.replace(_SPACE, " ")).encode()

    def vocabulary_lines(self) -> list[str]:
        """`piece` of every row in the order of the new ids, in which `<0x0A>` and `<0x0D>` stand for line breaks."""
        names = map(self._name, self.vocabulary.old_ids().tolist())
        return [name.replace("\n", "<0x0A>").replace("\r", "<0x0D>") for name in names]

    def ids_used_by(self, texts: Iterable[str]) -> NDArray[np.int64]:
        """Old ids, ascending, of every piece that the full vocabulary writes these texts with."""
        used = np.zeros(len(self._pieces), dtype=bool)
        remaining = iter(texts)
        while batch := [_replace(text) for text in islice(remaining, _BATCH)]:
            for ids in self._processor.Encode(batch, return_type="numpy", num_threads=1):
                used[ids] = True
        return np.flatnonzero(used) + self._first

    def always_kept(self) -> NDArray[np.int64]:
        """Old ids, ascending, of the special, byte, blank, tab and newline pieces and of single characters.

        With them a bundle can write any text.
        """
        named = {*SPECIAL_PIECES, *_STOOD_FOR}
        keep = [
            kind not in (NORMAL, UNUSED) or len(piece) == 1 or piece in named
            for piece, kind in zip(self._pieces, self._kinds, strict=True)
        ]
        return np.flatnonzero(keep) + self._first

    def _encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Ids of a text without special tokens. continued: no space is put in front, as it is not the beginning."""
        skipped = 2 if continued else 0  # the space that SentencePiece puts in front, and a piece to stop it
        marked = _NEWLINE * continued + _replace(text)
        new = self._new_of[self._processor.Encode(marked, return_type="numpy")[skipped:]]
        # the whole text as ever where it can be: that the pieces of a corpus suffice for it depends on nothing else
        ids: list[int] = new.tolist() if (new >= 0).all() else self._resegment(marked, skipped)
        return ids

    def _resegment(self, marked: str, skipped: int) -> list[int]:
        """Ids of a text that the full vocabulary writes with dropped pieces."""
        self._kept(_SPACE)  # nothing can stand in for the space in front of a text, which decoding drops
        pieces = self._restricted.EncodeAsPieces(marked)[skipped:]
        tokens = zip(self._restricted.Encode(marked)[skipped:], pieces, strict=True)
        ids: list[int] = []
        missing: dict[str, None] = {}
        for is_byte, run in groupby(tokens, key=lambda token: self._kinds[token[0]] == BYTE):
            if is_byte:  # of some characters: each is written whole or not at all
                units = [(-1, bytes(int(piece[3:5], 16) for _, piece in run).decode("utf-8"))]
            else:
                units = [(piece_id, _restore(piece)) for piece_id, piece in run]
            for piece_id, surface in units:
                if piece_id >= 0 and self._new_of[piece_id] >= 0:
                    ids.append(int(self._new_of[piece_id]))
                    continue
                for character in surface:
                    spelled = self._spell(character)
                    ids += spelled
                    missing |= {} if spelled else {character: None}
        if missing:
            raise GlmExportError(
                f"The slimmed vocabulary has no token for {few(list(missing))} in the text {quoted(_restore(marked))}; "
                "leave it out, or slim again with a corpus that holds it."
            )
        return ids

    def _spell(self, character: str) -> list[int]:
        """New ids for one character: its own piece, else its UTF-8 bytes, else the unknown piece; else none at all."""
        own = _SPACE if character == " " else character
        unknown = self._pieces[self._processor.unk_id()]
        for pieces in ([own], [f"<0x{byte:02X}>" for byte in character.encode()], [unknown]):
            ids = [new for name in pieces if (new := self._new_id(name)) is not None]
            if len(ids) == len(pieces):
                return ids
        return []

    @cached_property
    def _restricted(self) -> SentencePieceProcessor:
        """The SentencePiece model that segments without the dropped pieces; control and byte pieces stay."""
        drop = (self._new_of < 0) & (np.array(self._kinds) == NORMAL)
        drop[self._id_of[_NEWLINE]] = False  # of whatever kind: `_encode` counts on one piece for it
        model = without_pieces(self._processor.serialized_model_proto(), drop)
        return load_processor(model, "The slimmed SentencePiece model")

    @cached_property
    def _kinds(self) -> list[int]:
        """`SentencePiece.Type` of every piece, [pieces]."""
        return piece_kinds(self._processor.serialized_model_proto())

    def _new_id(self, name: str) -> int | None:
        piece_id = self._id_of.get(name)
        return None if piece_id is None or self._new_of[piece_id] < 0 else int(self._new_of[piece_id])

    def _kept(self, name: str) -> int:
        new = self._new_id(name)
        if new is None:
            raise BundleError(f"The slimmed vocabulary has no {name}; slim again and keep it.")
        return new

    def _name(self, old_id: int) -> str:
        piece_id = old_id - self._first
        if piece_id < 0:
            return f"<image_{old_id}>"
        return self._pieces[piece_id] if piece_id < len(self._pieces) else f"<padding_{old_id}>"

    def _text_pieces(self, ids: Iterable[int]) -> list[int]:
        """Ids in the SentencePiece model of the bundle's ids, without those of images and padding."""
        try:
            piece_ids = self.vocabulary.to_old(np.array(list(ids), dtype=np.int64)) - self._first
        except (ValueError, OverflowError) as error:
            raise GlmExportError(f"No such tokens in this bundle: {error}.") from error
        text_ids: list[int] = piece_ids[(piece_ids >= 0) & (piece_ids < len(self._pieces))].tolist()
        return text_ids


def load_processor(model: bytes, origin: str) -> SentencePieceProcessor:
    """What runs a SentencePiece model. Raises CheckpointError, which names `origin`, where it is none."""
    set_min_log_level(_FATAL)  # what it would write to stderr is raised too
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        processor.IdToPiece(list(range(len(processor))))
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{origin} is truncated or corrupt: no SentencePiece model; download it again."
        ) from error
    return processor


class TextStream:
    """Text of ids that come one by one: what `push` and `finish` give, joined, is `decode` of all of them.

    Held back is what the next id can change: part of a character, and the beginning of a newline, tab or blank piece.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(_EACH_BYTE)
        self._silent: list[int] = []  # pieces before the first text: whether a space is dropped depends on all of them
        self._begun = False
        self._held = ""

    def push(self, new_id: int) -> str:
        """The text that is certain from this id on; GlmExportError where it is no id."""
        surfaces = map(self._surface, self._tokenizer._text_pieces([new_id]))
        self._held = _restore(self._held + "".join(surfaces))
        cut = self._held.rfind("<")
        cut = cut if cut >= 0 and self._held[cut:] in _BEGINNINGS else len(self._held)
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def finish(self) -> str:
        """What was held back; nothing may be pushed after it."""
        return _restore(self._held + self._utf8.decode(b"", final=True))

    def _surface(self, piece_id: int) -> str:
        processor = self._tokenizer._processor
        if processor.IsByte(piece_id):
            text = self._utf8.decode(bytes.fromhex(processor.IdToPiece(piece_id)[3:5]))
        else:
            text = self._utf8.decode(b"", final=True)
            if text or self._begun:  # after any text at all, a piece's own is the same whatever that was
                text += processor.DecodeIds([processor.PieceToId(_NEWLINE), piece_id])[len(_NEWLINE) :]
            else:
                self._silent.append(piece_id)
                text = processor.DecodeIds(self._silent)
        self._begun = self._begun or bool(text)
        return text


def _replace(text: str) -> str:
    """The text with pieces in the place of newlines, tabs and runs of spaces; GlmExportError where it is no Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GlmExportError(f"{quoted(text)} is not valid Unicode ({error.reason}); give it as UTF-8.") from error
    return _TO_REPLACE.sub(lambda match: _STAND_INS[match.group()], text)


def _restore(text: str) -> str:
    """The opposite of `_replace`, as the original does it: on text, whichever pieces that came from."""
    return _TO_RESTORE.sub(lambda match: _STOOD_FOR[match.group()], text)
