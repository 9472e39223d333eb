"""The chat format and a conversation: prompts, polished answers as they stream, and the history of both."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmexport import conversation
from glmexport.chat import PolishedStream, chat_prompt, polish
from glmexport.conversation import Conversation, read_history
from glmexport.errors import GlmExportError
from glmexport.generation import END, generate
from glmexport.sampling import Sampling
from glmexport.session import Session

GREEDY = Sampling(greedy=True)


@pytest.fixture(scope="module")
def session(quick_bundle):
    with Session(quick_bundle, threads=1) as session:
        yield session


# The format


def test_a_prompt_without_history_is_the_query_itself():
    assert chat_prompt("你好") == "你好"
    assert chat_prompt("  a\n", []) == "  a\n"


def test_a_prompt_with_one_round_numbers_it_0_and_the_query_1():
    expected = "[Round 0]\n问：你好\n答：好！\n[Round 1]\n问：再见\n答："
    assert chat_prompt("再见", [("你好", "好！")]) == expected


def test_a_prompt_with_three_rounds():
    rounds = [("a", "1"), ("b\nc", ""), ("", "3")]
    assert chat_prompt("d", rounds) == (
        "[Round 0]\n问：a\n答：1\n[Round 1]\n问：b\nc\n答：\n[Round 2]\n问：\n答：3\n[Round 3]\n问：d\n答："
    )


# Polishing


def polished_by_the_original(text: str) -> str:
    text = text.strip().replace("[[训练时间]]", "2023年")
    for half, full in ((",", "，"), ("!", "！"), (":", "："), (";", "；"), (r"\?", "？")):
        text = re.sub(rf"([\u4e00-\u9fff]){half}", rf"\1{full}", text)
        text = re.sub(rf"{half}([\u4e00-\u9fff])", rf"{full}\1", text)
    return text


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("你好,世界!", "你好，世界！"),
        (" \n a, b! c: d; e? \t", "a, b! c: d; e?"),
        (",中,中,", "，中，中，"),
        ("中,,中", "中，，中"),
        ("中,,,中", "中，,，中"),
        ("a,中", "a，中"),
        ("\u4e00!\u9fff?\u3400!\ua000?", "\u4e00！\u9fff？\u3400!\ua000?"),
        ("我训练于[[训练时间]],好", "我训练于2023年，好"),
        ("?[[训练时间]]:", "?2023年："),
        ("[[[训练时间]]]", "[2023年]"),
        ("[[训练时间]", "[[训练时间]"),
        ("中.中", "中.中"),
        ("", ""),
        (" , ", ","),
    ],
)
def test_polish_by_example(answer, shown):
    assert polished_by_the_original(answer) == shown
    assert polish(answer) == shown


TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*",!:;?", "中", "\u4e00", "\u9fff", "a", " ", "\n", "\x1c", "\u3000", "[[训练时间]]"]),
        st.sampled_from(["[", "[[", "[[训", "训练时间", "时间]]", "]", "]]", "，", "[[训练时间]"]),
        st.text(max_size=3),
    ),
    max_size=14,
)


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_polish_is_what_the_original_does(parts):
    assert polish("".join(parts)) == polished_by_the_original("".join(parts))


@given(TEXTS, st.data())
@settings(max_examples=500, deadline=None)
def test_a_stream_joined_is_polish_of_the_whole_wherever_it_is_cut(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    stream = PolishedStream()
    pieces = [stream.push(text[start:stop]) for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(pieces) + stream.finish() == polished_by_the_original(text)


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_a_stream_of_single_characters_joined_is_polish_of_the_whole(parts):
    stream = PolishedStream()
    text = "".join(parts)
    assert "".join(map(stream.push, text)) + stream.finish() == polished_by_the_original(text)


def test_a_stream_holds_back_only_what_later_text_can_change():
    stream = PolishedStream()
    given_out = [stream.push(text) for text in (" ", "ab", "c ", "d,", "中", "文", "[[训练", "时间", "]]", "[", "x")]
    assert given_out == ["", "ab", "c", " d", "，中", "文", "", "", "2023年", "", "[x"]
    assert stream.finish() == ""


@given(st.text(alphabet="abc中文好", min_size=1))
@settings(max_examples=50, deadline=None)
def test_a_stream_of_plain_text_is_given_out_at_once(text):
    stream = PolishedStream()
    assert [stream.push(character) for character in text] == list(text)


def test_what_is_held_back_at_the_end_is_given_without_white_space():
    stream = PolishedStream()
    assert stream.push("中文 ,! \n[[训") == "中文"
    assert stream.finish() == " ,! \n[[训"
    stream = PolishedStream()
    assert stream.push("a, [[训 \n") == "a, [[训"
    assert stream.finish() == ""


# A conversation


def ask(chat: Conversation, query: str) -> str:
    return "".join(chat.ask(query))


def test_each_answer_enters_the_next_prompt_polished(session):
    chat = Conversation(session, sampling=GREEDY, max_tokens=6)
    first = ask(chat, "你好")
    alone = generate(session, "你好", sampling=GREEDY, max_tokens=6)
    assert first == polish(alone.text)
    assert chat.latest.ids == alone.ids
    second = ask(chat, "12+34=")
    by_hand = f"[Round 0]\n问：你好\n答：{first}\n[Round 1]\n问：12+34=\n答："
    expected = generate(session, by_hand, sampling=GREEDY, max_tokens=6)
    assert chat.latest.prompt_ids == session.tokenizer.prompt_ids(by_hand)
    assert second == polish(expected.text)
    assert chat.latest.ids == expected.ids
    third = ask(chat, "?")
    by_hand = f"[Round 0]\n问：你好\n答：{first}\n[Round 1]\n问：12+34=\n答：{second}\n[Round 2]\n问：?\n答："
    assert chat.latest.prompt_ids == session.tokenizer.prompt_ids(by_hand)
    assert chat.history == [("你好", first), ("12+34=", second), ("?", third)]


def test_a_history_that_is_given_is_gone_on_with_and_left_as_it_is(session):
    given_rounds = [("a", "b")]
    chat = Conversation(session, sampling=GREEDY, max_tokens=2, history=given_rounds)
    ask(chat, "c")
    assert chat.latest.prompt_ids == session.tokenizer.prompt_ids("[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答：")
    assert len(chat.history) == 2
    assert given_rounds == [("a", "b")]


def test_a_stopped_answer_stays_in_the_history_as_far_as_it_was_shown(session):
    chat = Conversation(session, sampling=GREEDY, max_tokens=40)
    pieces = chat.ask("你好")
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert chat.history == [("你好", shown)]
    assert chat.latest.finish_reason is None
    assert len(chat.latest.ids) < 40
    ask(chat, "b")
    by_hand = f"[Round 0]\n问：你好\n答：{shown}\n[Round 1]\n问：b\n答："
    assert chat.latest.prompt_ids == session.tokenizer.prompt_ids(by_hand)


def test_an_answer_that_showed_nothing_before_it_was_stopped_leaves_no_round(session):
    chat = Conversation(session, sampling=GREEDY)
    chat.ask("你好").close()
    assert chat.history == []


def test_an_empty_answer_that_ended_by_itself_is_a_round(session, monkeypatch):
    chat = Conversation(session, sampling=GREEDY)
    end = session.config.special_ids.eos
    monkeypatch.setattr("glmexport.sampling.Sampler.choose", lambda sampler, logits: end)
    assert ask(chat, "你好") == ""
    assert chat.latest.finish_reason == END
    assert chat.history == [("你好", "")]


def test_a_query_that_leaves_no_room_changes_nothing_and_says_both_numbers(session):
    chat = Conversation(session, sampling=GREEDY, max_tokens=3)
    ask(chat, "a")
    before = [*chat.history]
    query = "中文 " * 1200
    count = len(session.tokenizer.prompt_ids(chat_prompt(query, before)))
    assert count > 2048
    with pytest.raises(GlmExportError, match=rf"^[^\n]*\b{count}\b[^\n]*\b2048\b[^\n]*\.$"):
        chat.ask(query)
    assert chat.history == before
    ask(chat, "b")
    assert len(chat.history) == 2


def test_stop_texts_and_max_tokens_are_those_of_the_conversation(session):
    whole = generate(session, "你好", sampling=GREEDY, max_tokens=12).text
    chat = Conversation(session, sampling=GREEDY, max_tokens=12, stop=[whole[6:8]])
    assert ask(chat, "你好") == polish(whole[: whole.index(whole[6:8])])
    chat = Conversation(session, sampling=GREEDY, max_tokens=1)
    ask(chat, "你好")
    assert len(chat.latest.ids) == 1


def test_a_seeded_conversation_repeats_and_each_round_has_a_seed_of_its_own(session):
    options = {"temperature": 5.0, "top_k": 0, "top_p": 1.0}

    def ids_of_rounds() -> list[list[int]]:
        chat = Conversation(session, sampling=Sampling(seed=5, **options), max_tokens=8)
        ids = []
        for _ in range(2):
            ask(chat, "a")
            ids.append(chat.latest.ids)
        return ids

    first = ids_of_rounds()
    assert ids_of_rounds() == first
    chat = Conversation(session, sampling=Sampling(seed=5, **options), max_tokens=8)
    answer = ask(chat, "a")
    prompt = f"[Round 0]\n问：a\n答：{answer}\n[Round 1]\n问：a\n答："
    ids = {}
    for seed in (5, 6):
        generation = generate(session, prompt, sampling=Sampling(seed=seed, **options), max_tokens=8)
        assert generation.text is not None
        ids[seed] = generation.ids
    assert first[1] == ids[6] != ids[5], "the same numbers in every round would be no chance at all"


# Saved chats

ROUNDS = st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=4)


@given(ROUNDS)
@settings(max_examples=60, deadline=None)
def test_what_is_saved_is_read_again(session, tmp_path_factory, rounds):
    path = tmp_path_factory.mktemp("chat") / "chat.json"
    Conversation(session, history=rounds).save(path)
    assert read_history(path) == rounds


def test_a_saved_chat_is_json_that_people_can_read(session, tmp_path):
    path = tmp_path / "chat.json"
    Conversation(session, history=[("你好", "好！"), ("b", "")]).save(path)
    text = path.read_text("utf-8")
    assert json.loads(text) == [{"query": "你好", "answer": "好！"}, {"query": "b", "answer": ""}]
    assert "你好" in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no JSON",
        b"[",
        b"5",
        b"null",
        b"{}",
        b'""',
        b'"abc"',
        b"[5]",
        b'["ab"]',
        b'[["query", "answer"]]',
        b'[{"query": "a"}]',
        b'[{"query": "a", "answer": 5}]',
        b'[{"query": null, "answer": "b"}]',
        b'{"query": "a", "answer": "b"}',
        b'[{"query": "\xff", "answer": "b"}]',
        b"[" * 100_000,
        b"9" * 10_000,
    ],
    ids=lambda content: ascii(content[:30]),
)
def test_a_damaged_file_gives_one_sentence(tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(GlmExportError, match=r"^[^\n]*chat\.json is no saved chat[^\n]*\.$"):
        read_history(path)


@given(st.binary(max_size=40) | st.text(alphabet='[]{}",:queryanswer 15\\', max_size=60).map(str.encode))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_saved_chat_or_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("chat") / "chat.json"
    path.write_bytes(content)
    found = None
    with contextlib.suppress(GlmExportError):
        found = read_history(path)
    if found is not None:
        assert json.loads(content) == [{"query": query, "answer": answer} for query, answer in found]


def test_half_a_character_in_a_saved_chat_gives_one_sentence(tmp_path):
    """It could neither be asked nor saved again."""
    path = tmp_path / "chat.json"
    path.write_bytes(rb'[{"query": "\ud800", "answer": "b"}]')
    with pytest.raises(GlmExportError, match=r"^[^\n]*\.$"):
        read_history(path)


def test_files_that_cannot_be_read_or_written_give_one_sentence(session, tmp_path):
    with pytest.raises(GlmExportError, match=r"absent\.json cannot be read \(No such file[^\n]*\.$"):
        read_history(tmp_path / "absent.json")
    with pytest.raises(GlmExportError, match=r"cannot be read \(Is a directory\)[^\n]*\.$"):
        read_history(tmp_path)
    with pytest.raises(GlmExportError, match=r"could not be written \(Is a directory\)[^\n]*\.$"):
        Conversation(session).save(tmp_path)


def test_a_file_that_is_too_large_for_a_chat_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(conversation, "MAX_FILE_BYTES", 10)
    path = tmp_path / "chat.json"
    path.write_text("[]       ")
    assert read_history(path) == []
    path.write_text("[]         ")
    with pytest.raises(GlmExportError, match=r"more than 10 bytes"):
        read_history(path)
