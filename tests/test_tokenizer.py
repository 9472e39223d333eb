"""The tokenizer: the original's own answers, what is lossless, slimmed vocabularies, streams, lists of pieces."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GOLDEN, GOLDEN_PIECES, GOLDEN_ROWS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from glmexport.errors import BundleError, CheckpointError, GlmExportError
from glmexport.sentencepiece_model import piece_kinds, without_pieces
from glmexport.tokenizer import SPECIAL_PIECES, Tokenizer
from glmexport.vocabulary import VocabularyMap

MODEL = (GOLDEN / "ice_text.model").read_bytes()
CASES = json.loads((Path(__file__).parent / "data/chatglm-6b-tiny/tokenizer_cases.json").read_text("utf-8"))["cases"]
BLANKS = [f"<|blank_{count}|>" for count in range(2, 81)]
MARKERS = re.compile("▁|<n>|" + "|".join(map(re.escape, ["<|tab|>", *BLANKS])))
MODELS = ("golden", "unigram", "bpe", "unigram without bytes")
WORDS = [first + second + third for first in "bdkmst" for second in ("a", "ei", "o") for third in ("n", "ra", "lu")]
CHARACTERS = "你好世界模型语言问答"


def sentences(count: int, seed: int) -> list[str]:
    """Made-up text with words of very different frequency, Chinese characters, numbers and indents."""
    dice = random.Random(seed)

    def word() -> str:
        if dice.random() < 0.2:
            return "".join(dice.choices(CHARACTERS, k=dice.randint(1, 4)))
        return WORDS[min(int(dice.expovariate(0.08)), len(WORDS) - 1)] + dice.choice(["", "", ".", ",", "7"])

    return ["    " * (number % 3) + " ".join(word() for _ in range(dice.randint(1, 12))) for number in range(count)]


@cache
def model(name: str) -> bytes:
    """A SentencePiece model; the trained ones have the golden one's kinds of piece and few of each."""
    if name == "golden":
        return MODEL
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(400, seed=1)),
        model_writer=written,
        model_type=name.split()[0],
        vocab_size=750,
        hard_vocab_limit=False,
        byte_fallback="without" not in name,
        control_symbols=list(SPECIAL_PIECES),
        user_defined_symbols=["<n>", "<|tab|>", *BLANKS],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        self_test_sample_size=20,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


@cache
def tokenizer(name: str = "golden", images: int = 0) -> Tokenizer:
    return Tokenizer(model(name), num_image_tokens=images)


def slimmed(full: Tokenizer, keep: np.ndarray) -> Tokenizer:
    """The tokenizer of a bundle that keeps these old ids and what is always kept; `full` has no image tokens."""
    vocabulary = VocabularyMap.from_ids(np.concatenate((keep, full.always_kept())), full.vocabulary.full_size + 9)
    return Tokenizer(full._processor.serialized_model_proto(), num_image_tokens=0, vocabulary=vocabulary)


def old_ids(tokens: Tokenizer, text: str) -> list[int]:
    """What a slimmed tokenizer writes a text with, in the checkpoint's numbering."""
    return tokens.vocabulary.to_old(np.array(tokens.encode(text), dtype=np.int64)).tolist()


def streamed(tokens: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokens.stream()
    return [*map(stream.push, ids), stream.finish()]


SNIPPETS = [
    "a",
    " ",
    "  ",
    " " * 79,
    "\n",
    "\t",
    "你",
    "é",
    "🙂",
    "<",
    "n>",
    "|tab",
    "|>",
    "\r",
    "\0",
    "def",
    "dan",
    "。",
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join))
LOSSLESS = TEXTS.filter(lambda text: not MARKERS.search(text))


def test_the_original_ids():
    """Each of the original's cases, which fail together: a list of all that differ says more than the first one."""
    wrong = []
    for case in CASES:
        tokens = tokenizer(images=case["num_image_tokens"])
        text, ids = case["text"], case["ids"]
        got = (
            tokens.encode(text),
            tokens.prompt_ids(text),
            tokens.decode(ids),
            tokens.decode(case["ids_with_special"]),
        )
        if got != (ids, case["ids_with_special"], case["decoded"], case["decoded"]):
            wrong.append((text, got))
        if "".join(streamed(tokens, ids)) != case["decoded"]:
            wrong.append((text, streamed(tokens, ids)))
    assert len(CASES) == 396
    assert not wrong


@given(TEXTS)
def test_the_original_way_to_stand_in_for_spaces(text):
    """As the original does it: one replacement after the other, the longest blank first."""
    marked = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for count in range(80, 1, -1):
        marked = marked.replace(" " * count, f"<|blank_{count}|>")
    assert tokenizer().encode(text) == tokenizer()._processor.Encode(marked)


@pytest.mark.parametrize("length", [1, 2, 79, 80, 81, 82, 160, 161, 241])
def test_runs_of_spaces(length):
    text = "x" + " " * length + "y"
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text
    blanks = [tokenizer().piece(token) for token in ids if "blank" in tokenizer().piece(token)]
    rest = length % 80
    assert blanks == ["<|blank_80|>"] * (length // 80) + ([f"<|blank_{rest}|>"] if rest > 1 else [])


@pytest.mark.parametrize("name", MODELS[:3])
@given(text=LOSSLESS)
def test_any_text_comes_back(name, text):
    assert tokenizer(name).decode(tokenizer(name).encode(text)) == text


@pytest.mark.parametrize(("text", "back"), [("a▁b", "a b"), ("<n>", "\n"), ("<|tab|>", "\t"), ("<|blank_3|>", "   ")])
def test_what_does_not_come_back(text, back):
    assert tokenizer().decode(tokenizer().encode(text)) == back


def test_what_looks_like_a_blank_and_is_none():
    for text in ("<|blank_1|>", "<|blank_81|>", "<|blank_02|>", "<N>", "<|TAB|>", "< n>"):
        assert tokenizer().decode(tokenizer().encode(text)) == text


@pytest.mark.parametrize("name", SPECIAL_PIECES)
def test_special_names_are_text_unless_asked(name):
    tokens = tokenizer()
    token = GOLDEN_PIECES + SPECIAL_PIECES.index(name)
    assert token not in tokens.encode(f"a {name} b")
    assert tokens.decode(tokens.encode(f"a {name} b")) == f"a {name} b"
    assert tokens.encode(name, special=True) == [token]
    assert tokens.encode(f"{name}你好", special=True) == [token, *tokens.encode("你好")]
    assert tokens.encode(f"你好{name}", special=True) == [*tokens.encode("你好"), token]
    assert tokens.prompt_ids(name, special=True) == [token, 1501, 1504]
    assert tokens.decode([token]) == ""


@pytest.mark.parametrize("name", MODELS[:3])
@given(parts=st.lists(LOSSLESS, min_size=1, max_size=4), special=st.sampled_from(SPECIAL_PIECES))
def test_special_tokens_add_nothing_to_the_text_around_them(name, parts, special):
    text = "".join(parts)
    assume(not MARKERS.search(text) and not any(name in text for name in SPECIAL_PIECES))
    tokens = tokenizer(name)
    ids = tokens.encode(special.join(parts), special=True)
    assert tokens.decode(ids) == text
    assert [token for token in ids if tokens.piece(token) == special] == tokens.encode(special, special=True) * (
        len(parts) - 1
    )


def test_ids_without_text():
    vocabulary = VocabularyMap.identity(20000 + GOLDEN_ROWS)
    tokens = Tokenizer(MODEL, num_image_tokens=20000, vocabulary=vocabulary)
    ids = tokens.encode("你好")
    assert tokens.decode([0, ids[0], 19999, *ids[1:], 20000 + GOLDEN_ROWS - 1, 20003]) == "你好"
    assert tokens.decode([]) == ""
    assert tokens.decode([20000]) == " ⁇ "


@pytest.mark.parametrize("ids", [[-1], [1844], [5, 1 << 40], [1 << 70]])
def test_ids_that_are_none(ids):
    with pytest.raises(GlmExportError, match="No such tokens in this bundle"):
        tokenizer().decode(ids)
    stream = tokenizer().stream()
    with pytest.raises(GlmExportError, match="No such tokens in this bundle"):
        [stream.push(token) for token in ids]


def test_text_that_is_no_unicode():
    for use in (tokenizer().encode, lambda text: tokenizer().ids_used_by([text])):
        with pytest.raises(GlmExportError, match="is not valid Unicode"):
            use("a\ud800")


# slimmed vocabularies


def test_dropping_images_and_padding_shifts_ids():
    vocabulary = VocabularyMap(20000 + GOLDEN_ROWS, ((20000, 21844),))
    tokens = Tokenizer(MODEL, num_image_tokens=20000, vocabulary=vocabulary)
    for case in CASES:
        if case["num_image_tokens"]:
            assert tokens.prompt_ids(case["text"]) == [token - 20000 for token in case["ids_with_special"]]
            assert tokens.decode(tokens.encode(case["text"])) == case["decoded"]
    assert "_restricted" not in vars(tokens)


@pytest.mark.parametrize("name", MODELS)
def test_a_corpus_is_written_as_before(name):
    full = tokenizer(name)
    corpus = [*sentences(80, seed=5), "a\tb\n\n  c", *(case["text"] for case in CASES[:198:4])]
    tokens = slimmed(full, full.ids_used_by(iter(corpus)))
    assert tokens.vocabulary.size < len(full.vocabulary_lines())
    for text in corpus:
        assert old_ids(tokens, text) == full.encode(text)
    assert "_restricted" not in vars(tokens)


@pytest.mark.parametrize("name", MODELS)
def test_the_restricted_model_agrees_where_nothing_is_missing(name):
    """Not needed for the corpus, but it shows that dropping pieces moves nothing that does not use them."""
    full = tokenizer(name)
    corpus = sentences(60, seed=6)
    tokens = slimmed(full, full.ids_used_by(corpus))
    for text in corpus:
        marked = re.sub(" {2,}", lambda run: f"<|blank_{len(run.group())}|>", text)
        assert tokens._resegment(marked, 0) == tokens.encode(text)


@pytest.mark.parametrize("name", MODELS[:3])
@given(text=LOSSLESS, seed=st.integers(0, 9))
@settings(deadline=None)
def test_any_text_can_be_written_with_what_is_always_kept(name, text, seed):
    full = tokenizer(name)
    pieces = len(full.vocabulary_lines())
    tokens = slimmed(full, np.random.default_rng(seed).integers(0, pieces, pieces // 8))
    ids = tokens.encode(text)
    assert tokens.decode(ids) == text
    assert "".join(streamed(tokens, ids)) == text
    if {*full.encode(text)} <= {*tokens.vocabulary.old_ids().tolist()}:
        assert old_ids(tokens, text) == full.encode(text)


@pytest.mark.parametrize("name", MODELS)
@given(text=LOSSLESS, seed=st.integers(0, 99), share=st.sampled_from([0.02, 0.5, 0.98]), with_unknown=st.booleans())
@settings(deadline=None)
def test_any_vocabulary_writes_a_text_or_says_that_it_cannot(name, text, seed, share, with_unknown):
    """Bytes, blanks and tab may be missing too; a text that does not come back has an unknown piece in it."""
    lines = tokenizer(name).vocabulary_lines()
    keep = np.random.default_rng(seed).random(len(lines)) < share
    keep[lines.index("▁")] = True
    keep[lines.index("<unk>")] = with_unknown
    vocabulary = VocabularyMap.from_ids(np.flatnonzero(keep), len(lines))
    tokens = Tokenizer(model(name), num_image_tokens=0, vocabulary=vocabulary)
    with nullcontext() if with_unknown else suppress(GlmExportError):
        ids = tokens.encode(text)
        assert tokens.decode(ids) == text or "<unk>" in map(tokens.piece, ids)


def only(*pieces: str) -> Tokenizer:
    """The golden tokenizer with these pieces and what ends a prompt."""
    lines = tokenizer().vocabulary_lines()
    keep = [lines.index(piece) for piece in ("▁", "[gMASK]", "<sop>", *pieces)]
    return Tokenizer(MODEL, num_image_tokens=0, vocabulary=VocabularyMap.from_ids(keep, len(lines)))


@pytest.mark.parametrize(
    ("pieces", "text", "expected"),
    [
        (["s", "e", "l", "f"], "self", ["▁", "s", "e", "l", "f"]),
        (["s", "e", "l", "f", "el"], "self", ["▁", "s", "el", "f"]),
        (["s", "<0x65>", "l", "f"], "self", ["▁", "s", "<0x65>", "l", "f"]),
        (["s", "<unk>", "l", "f"], "self", ["▁", "s", "<unk>", "l", "f"]),
        (["<0xE4>", "<0xBD>", "<0xA0>"], "你", ["▁", "<0xE4>", "<0xBD>", "<0xA0>"]),
        (["<0xE4>", "<0xBD>", "<unk>"], "你", ["▁", "<unk>"]),
        (["<unk>"], "🙂🙂", ["▁", "<unk>", "<unk>"]),
        (["a", "<0x09>"], "a\ta", ["▁", "a", "<0x09>", "a"]),
        (["<0x0A>"], "\n\n", ["▁", "<0x0A>", "<0x0A>"]),
        (["a"], "a    a", ["▁", "a", "▁", "▁", "▁", "▁", "a"]),
        ([], "   ", ["▁", "▁", "▁", "▁"]),
    ],
)
def test_what_stands_in_for_a_missing_piece(pieces, text, expected):
    tokens = only(*pieces)
    assert [tokens.piece(token) for token in tokens.encode(text)] == expected


def test_what_cannot_be_written():
    with pytest.raises(GlmExportError) as caught:
        only("s", "e").encode("self\t" + "e" * 200)
    message = str(caught.value)
    assert message.startswith(r"The slimmed vocabulary has no token for 'l', 'f', '\t' in the text 'self\te")
    assert message.endswith("...'; leave it out, or slim again with a corpus that holds it.")
    assert len(message) < 300
    with pytest.raises(GlmExportError, match=r"has no \[MASK\]; slim again and keep it"):
        only("s").encode("s[MASK]", special=True)
    assert only("s").encode("s[gMASK]s", special=True) == [0, 1, 2, 1]


@pytest.mark.parametrize("dropped", ["▁", "<n>", "[gMASK]", "<sop>", "<unk>", "▁def"])
def test_a_vocabulary_that_lacks_one_piece(dropped):
    """Nothing stands in for the space in front and for the ends of a prompt; anything else can be done without."""
    kept = np.delete(np.arange(GOLDEN_ROWS), tokenizer().vocabulary_lines().index(dropped))
    tokens = Tokenizer(MODEL, num_image_tokens=0, vocabulary=VocabularyMap.from_ids(kept, GOLDEN_ROWS))
    assert dropped not in tokens.vocabulary_lines()
    if dropped in ("▁", "[gMASK]", "<sop>"):
        with pytest.raises(BundleError, match=re.escape(f"The slimmed vocabulary has no {dropped}; slim again")):
            tokens.prompt_ids("你好")
    else:
        assert tokens.decode(tokens.prompt_ids("def\n你")) == "def\n你"
    assert tokens.decode(tokens.encode("the")) == "the", "written without any of them"


def test_what_is_always_kept():
    kept = {tokenizer().piece(token) for token in tokenizer().always_kept().tolist()}
    assert kept >= {*SPECIAL_PIECES, "<unk>", "<s>", "</s>", "<pad>", "<n>", "<|tab|>", *BLANKS, "▁", "a", "你"}
    assert kept >= {f"<0x{byte:02X}>" for byte in range(256)}
    assert not kept & {"▁the", "self", "▁="}
    assert tokenizer(images=20000).always_kept().tolist() == [token + 20000 for token in tokenizer().always_kept()]
    assert tokenizer(images=20000).ids_used_by(["你好"]).tolist() == [20005, 20295, 20455]
    assert tokenizer().ids_used_by(["a"] * 3000 + ["你好"]).tolist() == tokenizer().ids_used_by(["a", "你好"]).tolist()
    assert tokenizer().ids_used_by([]).tolist() == tokenizer().ids_used_by([""]).tolist() == []


@pytest.mark.parametrize(("name", "kind"), [("[gMASK]", 3), ("<n>", 4), ("<|tab|>", 4), ("<|blank_7|>", 4)])
def test_a_name_counts_whatever_its_kind_in_the_model(name, kind):
    before = name.encode() + b"\x15\0\0\0\0\x18"
    assert MODEL.count(before + bytes([kind])) == 1
    tokens = Tokenizer(MODEL.replace(before + bytes([kind]), before + b"\x01"), num_image_tokens=0)
    assert tokens._kinds[tokens._id_of[name]] == 1
    assert np.array_equal(tokens.always_kept(), tokenizer().always_kept())


@pytest.mark.parametrize("name", MODELS)
def test_dropped_pieces_are_marked_and_nothing_else(name):
    full = model(name)
    kinds = piece_kinds(full)
    drop = np.array(kinds) == 1
    restricted = without_pieces(full, drop)
    assert piece_kinds(restricted) == [5 if kind == 1 else kind for kind in kinds]
    assert without_pieces(full, np.zeros(len(kinds), dtype=bool)) == full
    processor, before = SentencePieceProcessor(model_proto=restricted), SentencePieceProcessor(model_proto=full)
    assert len(processor) == len(kinds)
    for piece_id, kind in enumerate(kinds):
        assert processor.IdToPiece(piece_id) == before.IdToPiece(piece_id)
        assert processor.GetScore(piece_id) == before.GetScore(piece_id)
        assert processor.IsUnused(piece_id) == (kind == 1)
        assert before.IsByte(piece_id) == (kind == 6)
        assert before.IsControl(piece_id) == (kind == 3)


# streams


@pytest.mark.parametrize("name", MODELS)
@given(data=st.data())
def test_a_stream_gives_what_decode_gives(name, data):
    """Any ids at all: pieces that make a blank together, wrong UTF-8, control pieces before the first text."""
    tokens = tokenizer(name)
    lines = tokens.vocabulary_lines()
    notable = ["▁", "<sop>", "<unk>", "<n>", "<|tab|>", "<", "n", ">", "<0x3C>", "<0xE4>", "<0xBD>", "<0xA0>", "<0xF0>"]
    known = [lines.index(piece) for piece in notable if piece in lines]
    ids = data.draw(st.lists(st.one_of(st.sampled_from(known), st.integers(0, len(lines) - 1)), max_size=30))
    assert "".join(streamed(tokens, ids)) == tokens.decode(ids)


@given(st.lists(st.sampled_from([*range(0x00, 0x100, 0x10), 0xBF, 0xC1, 0xE4, 0xED, 0xF4, 0xF5]), max_size=12))
def test_any_bytes_are_shown_as_sentencepiece_does(values):
    first = tokenizer().vocabulary_lines().index("<0x00>")
    ids = [first + value for value in values]
    assert "".join(streamed(tokenizer(), ids)) == tokenizer().decode(ids)


def test_a_stream_holds_back_no_more_than_it_must():
    emoji = tokenizer().encode("a🙂b")
    assert streamed(tokenizer(), emoji) == ["a", "", "", "", "🙂", "b", ""]
    assert streamed(tokenizer(), tokenizer().encode("一\n二\n"))[-1] == ""
    lines = tokenizer().vocabulary_lines()
    ids = [lines.index(piece) for piece in ("a", "<", "n", ">", "<", "a", "<0xE4>", "<0xBD>", "a", "<0xF0>")]
    assert streamed(tokenizer(), ids) == ["a", "", "", "\n", "", "<a", "", "", "\ufffd\ufffda", "", "\ufffd"]
    assert "".join(streamed(tokenizer(), ids)) == tokenizer().decode(ids)
    assert streamed(tokenizer(), [5, 5, 5]) == ["", " ", " ", ""]


# lists of pieces


def test_one_line_a_row():
    vocabulary = VocabularyMap.identity(3 + GOLDEN_ROWS)
    tokens = Tokenizer(MODEL, num_image_tokens=3, vocabulary=vocabulary)
    lines = tokens.vocabulary_lines()
    processor = SentencePieceProcessor(model_proto=MODEL)
    assert lines[:4] == ["<image_0>", "<image_1>", "<image_2>", "<unk>"]
    assert lines[3:1847] == [processor.IdToPiece(piece_id) for piece_id in range(1844)]
    assert lines[1847:] == [f"<padding_{row}>" for row in range(1847, 3 + GOLDEN_ROWS)]
    assert lines == "\n".join(lines).split("\n") == "\n".join(lines).splitlines()
    assert all(lines)
    assert [tokens.piece(row) for row in range(len(lines))] == lines
    with pytest.raises(ValueError, match="new ids must"):
        tokens.piece(len(lines))


def test_lines_of_a_slimmed_vocabulary():
    vocabulary = VocabularyMap(20000 + GOLDEN_ROWS, ((7, 8), (20004, 20006), (21501, 21505), (21850, 21851)))
    tokens = Tokenizer(MODEL, num_image_tokens=20000, vocabulary=vocabulary)
    specials = ["[gMASK]", "[sMASK]", "<unused_0>", "<sop>"]
    assert tokens.vocabulary_lines() == ["<image_7>", "<n>", "▁", *specials, "<padding_21850>"]


def renamed(**names: str) -> bytes:
    """The golden model with other texts, of as many bytes, in some of its pieces."""
    changed = MODEL
    for old, new in names.items():
        message = bytes([len(old)]) + old.encode()
        assert changed.count(b"\x0a" + message) == 1
        assert len(new.encode()) == len(old)
        changed = changed.replace(b"\x0a" + message, b"\x0a" + bytes([len(old)]) + new.encode())
    return changed


def test_line_breaks_in_a_piece_do_not_break_the_list():
    tokens = Tokenizer(renamed(message="a\nb\rc\r\n", compare="x\u2028y\\n"), num_image_tokens=0)
    lines = tokens.vocabulary_lines()
    assert "a<0x0A>b<0x0D>c<0x0D><0x0A>" in lines
    assert "x\u2028y\\n" in lines, "only the two that getline and universal newlines break at are replaced"
    assert len("\n".join(lines).split("\n")) == 1844
    assert tokens.piece(lines.index("a<0x0A>b<0x0D>c<0x0D><0x0A>")) == "a\nb\rc\r\n"


# models that are none


def test_loading_a_directory(tmp_path):
    assert Tokenizer.load(GOLDEN, num_image_tokens=0).encode("你好") == [5, 295, 455]
    path = tmp_path / "ice_text.model"
    with pytest.raises(CheckpointError, match=r"ice_text\.model cannot be read"):
        Tokenizer.load(tmp_path, num_image_tokens=0)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        Tokenizer.load(tmp_path, num_image_tokens=0)
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(CheckpointError, match="at most 67108864 are expected"):
        Tokenizer.load(tmp_path, num_image_tokens=0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a model",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-7],
        lambda data: data.replace("你".encode(), b"\xff\xff\xff"),
        lambda data: data.replace(b"<0x7F>", b"<0x7E>"),
    ],
    ids=["empty", "text", "half", "shortened", "not UTF-8", "a byte twice"],
)
def test_a_damaged_model(damage: Callable[[bytes], bytes], tmp_path):
    (tmp_path / "ice_text.model").write_bytes(damage(MODEL))
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(tmp_path, num_image_tokens=0)
    expected = "is truncated or corrupt: no SentencePiece model; download it again."
    assert str(caught.value) == f"{tmp_path / 'ice_text.model'} {expected}"


def test_models_of_something_else():
    with pytest.raises(CheckpointError, match=r"has no piece '\[gMASK\]', '<sop>'; expected the tokenizer of ChatGLM"):
        Tokenizer(MODEL.replace(b"[gMASK]", b"[GMASK]").replace(b"<sop>", b"<SOP>"), num_image_tokens=0)
    for images, rows in ((0, 1843), (13, GOLDEN_ROWS)):
        with pytest.raises(CheckpointError, match=f"needs {1844 + images} rows .* where the vocabulary has {rows}"):
            Tokenizer(MODEL, num_image_tokens=images, vocabulary=VocabularyMap.identity(rows))
