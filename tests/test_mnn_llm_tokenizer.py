"""Texts and chats through MNN's own tokenizer and template: the ids of the original."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import GOLDEN_DATA, ROOT
from derived_bundles import glmexport

from glmexport.chat import chat_prompt
from glmexport.checkpoint import open_checkpoint
from glmexport.config import SpecialIds
from glmexport.errors import CheckpointError
from glmexport.mnn_llm.check import CHATS, TEXTS
from glmexport.mnn_llm.engine import ask
from glmexport.mnn_llm.sentencepiece_facts import BPE, UNIGRAM, read_facts
from glmexport.mnn_llm.tokenizer_file import tokenizer_file
from glmexport.tokenizer import BOS, GMASK, Tokenizer

EXAMPLES = ("chatglm-6b-tiny", "tiny-chatglm")
CASES = json.loads((GOLDEN_DATA / "tokenizer_cases.json").read_text("utf-8"))["cases"]
LINES = (ROOT / "tests/test_chat.py").read_text("utf-8").split("\n")
RUNS = [character * count for character in " =哈" for count in range(1, 170, 7)]
PLAIN = [
    text
    for text in dict.fromkeys([*(case["text"] for case in CASES), *TEXTS, *LINES, *RUNS, "\n".join(LINES)])
    if GMASK not in text and BOS not in text  # outside of a chat the engine takes these names for tokens
]


@pytest.fixture(scope="session")
def packages(shared) -> dict[str, Path]:
    """Each example as a package."""
    made = {}
    for name in EXAMPLES:

        def make(path: Path, name: str = name) -> None:
            done = glmexport("package", "mnn-llm", ROOT / "examples" / name, "-o", path, "--bits", "16", "-q")
            assert not done.status, done.stderr

        made[name] = shared(f"mnn-llm-{name}", make)
    return made


def tokenizer_of(name: str) -> Tokenizer:
    directory = ROOT / "examples" / name
    with open_checkpoint(directory, require_weights=False) as checkpoint:
        return Tokenizer.load(directory, num_image_tokens=checkpoint.config.num_image_tokens)


@pytest.mark.parametrize("name", EXAMPLES)
def test_texts_have_the_originals_ids(packages, name):
    tokenizer = tokenizer_of(name)
    found = ask(packages[name], texts=PLAIN).ids
    other = [(text, ids) for text, ids in zip(PLAIN, found, strict=True) if ids != tokenizer.encode(text)]
    facts = read_facts((ROOT / "examples" / name / "ice_text.model").read_bytes(), name)

    def score(ids: list[int]) -> float:
        return sum(facts.scores[facts.pieces.index(tokenizer.piece(token))] for token in ids)

    for text, ids in other:
        assert tokenizer.decode(ids) == text
        assert abs(score(ids) - score(tokenizer.encode(text))) < 1e-5 * len(text), "as good a segmentation"
    assert len(other) <= len(PLAIN) // 20


def test_the_golden_ids_with_special_tokens(packages):
    cases = [case for case in CASES if not case["num_image_tokens"] and GMASK not in case["text"]]
    found = ask(packages["chatglm-6b-tiny"], chats=[(case["text"], ()) for case in cases]).chats
    assert [ids for _, ids in found] == [case["ids_with_special"] for case in cases]


@pytest.mark.parametrize("name", EXAMPLES)
def test_chats_with_history_are_written_as_the_original_does(packages, name):
    tokenizer = tokenizer_of(name)
    chats = [*CHATS, *((f"q{n}", [(f"问{i}", f"a{i}") for i in range(n)]) for n in (1, 2, 3, 10, 25))]
    for (prompt, ids), chat in zip(ask(packages[name], chats=chats).chats, chats, strict=True):
        text = chat_prompt(*chat)
        assert ids == tokenizer.prompt_ids(text)
        if GMASK not in text and BOS not in text:
            assert prompt == text + GMASK + BOS


def test_special_names_in_a_message_stay_text(packages):
    """No message can end the prompt before its time."""
    ((_, ids),) = ask(packages["chatglm-6b-tiny"], chats=[("a[gMASK]<sop>b", ())]).chats
    tokenizer = tokenizer_of("chatglm-6b-tiny")
    gmask, bos = tokenizer.prompt_ids("")[-2:]
    assert (ids.count(gmask), ids.count(bos), ids[-2:]) == (1, 1, [gmask, bos])


def test_a_bpe_model_is_segmented_by_its_merges(packages, tmp_path):
    model = trained("bpe")
    facts = read_facts(model, "here")
    assert facts.kind == BPE
    ids = {piece: number for number, piece in enumerate(facts.pieces)}
    special = SpecialIds(ids["[MASK]"], ids[GMASK], ids[BOS], ids["<eop>"], 3, 5)
    package = shutil.copytree(packages["chatglm-6b-tiny"], tmp_path / "package")
    with open_checkpoint(ROOT / "examples" / "chatglm-6b-tiny", require_weights=False) as checkpoint:
        config = dataclasses.replace(checkpoint.config, special_ids=special)
    rows = list(range(len(facts.pieces)))
    (package / "tokenizer.mtok").write_bytes(tokenizer_file(facts, config, rows, (special.gmask, special.bos)))
    tokenizer = Tokenizer(model, num_image_tokens=0)
    texts = [text for text in PLAIN if len(text) < 1000]
    assert list(ask(package, texts=texts).ids) == [tokenizer.encode(text) for text in texts]


def trained(kind: str) -> bytes:
    """A small SentencePiece model over this project's own words."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in LINES if line] * 2 + ["你好世界，今天天气很好。"] * 3),
        model_writer=file,
        model_type=kind,
        vocab_size=1200,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<n>", "<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81))],
        control_symbols=["[MASK]", GMASK, "[sMASK]", "<unused_0>", BOS, "<eop>"],
        max_sentence_length=10000,
        minloglevel=2,
    )
    return file.getvalue()


def test_the_facts_of_a_model_are_sentencepieces_own():
    path = ROOT / "examples" / "chatglm-6b-tiny" / "ice_text.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    facts = read_facts(path.read_bytes(), str(path))
    assert facts.kind == UNIGRAM
    assert list(facts.pieces) == [processor.IdToPiece(number) for number in range(len(processor))]
    assert np.allclose(facts.scores, [processor.GetScore(number) for number in range(len(processor))])
    assert (facts.charsmap, facts.dummy_prefix, facts.trims) == (False, True, False)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_facts(path.read_bytes()[:-1], "here")
