"""Perplexity, exact answers and divergence against what they are by definition, and files of examples."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from checkpoints import make_tensors, write_checkpoint, write_weights
from conftest import split_directory
from derived_bundles import derived, quantize_pass
from hypothesis import given, settings
from hypothesis import strategies as st

from glmexport import evaluation, names
from glmexport.chat import chat_prompt
from glmexport.errors import GlmExportError
from glmexport.evaluation import Example, evaluate, read_examples
from glmexport.generation import END, generate
from glmexport.models.chatglm_6b import ChatGLMForConditionalGeneration
from glmexport.passes.slim_vocab import SlimPass
from glmexport.prompt import prepare_prompt
from glmexport.sampling import Sampling
from glmexport.session import Session

EXAMPLES = [
    Example("你好", "好！", 1),
    Example("12+34=", "46", 2),
    Example("What is this? " * 6, "A long answer, longer than the others. " * 10, 3),
    Example("", "x", 4),
    Example("a", "", 5),
    Example(chat_prompt("c", [("a", "b")]), "d\n\te", 6),
    Example("b", "中文", 7),
]


@pytest.fixture(scope="module")
def session(quick_bundle):
    with Session(quick_bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def odd_session(bundle):
    with Session(bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def int4_session(bundle, shared):
    coarse = quantize_pass(4, head=4)
    with Session(shared("eval-int4", lambda path: derived(bundle, path, coarse)), threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def slim_session(bundle, shared):
    with Session(shared("eval-slim", lambda path: derived(bundle, path, SlimPass())), threads=1) as session:
        yield session


# Perplexity


def perplexity_of_the_reference(checkpoint, tokenizer, examples):
    """exp of the mean loss of all answer tokens, end tokens among them, one example at a time."""
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    total, count = 0.0, 0
    for example in examples:
        prompt, answer = tokenizer.prompt_ids(example.prompt), tokenizer.encode(example.answer)
        answer = [*answer, model.config.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            loss = model(torch.tensor([prompt + answer]), labels=labels).loss
        total += float(loss) * len(answer)
        count += len(answer)
    return math.exp(total / count), count


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_perplexity_is_that_of_the_references_own_loss(session, golden_checkpoint, batch):
    expected, count = perplexity_of_the_reference(golden_checkpoint, session.tokenizer, EXAMPLES)
    assert count > evaluation.HEAD_ROWS, "more than one part of a batch"
    score = evaluate(session, EXAMPLES, batch=batch)
    assert score.perplexity == pytest.approx(expected, rel=1e-4)
    assert score.tokens == count
    assert score.count == len(EXAMPLES)
    assert score.divergence is None


def test_perplexity_of_one_example(session, golden_checkpoint):
    for example in EXAMPLES[:2]:
        expected, _ = perplexity_of_the_reference(golden_checkpoint, session.tokenizer, [example])
        assert evaluate(session, [example], batch=8).perplexity == pytest.approx(expected, rel=1e-4)


def test_perplexity_of_a_bundle_with_image_tokens(odd_session, checkpoint):
    expected, _ = perplexity_of_the_reference(checkpoint, odd_session.tokenizer, EXAMPLES)
    assert evaluate(odd_session, EXAMPLES, batch=3).perplexity == pytest.approx(expected, rel=1e-4)


def test_a_memory_limit_changes_nothing(session, quick_bundle):
    with Session(quick_bundle, threads=1, memory_limit=1) as streamed:
        assert evaluate(streamed, EXAMPLES[:2], batch=2) == evaluate(session, EXAMPLES[:2], batch=2)


# Exact answers


@pytest.fixture
def ending(quick_bundle):
    """The golden bundle, with an end token that greedy answers reach: the commonest second or later one of these."""
    with Session(quick_bundle, threads=1) as session:
        found = [ids for example in EXAMPLES for ids in greedy(session, example.prompt, 12).ids[1:]]
        token = max(set(found), key=found.count)
        ids = dataclasses.replace(session.config.special_ids, eos=token)
        session.config = dataclasses.replace(session.config, special_ids=ids)
        yield session


def greedy(session, prompt, count):
    answer = generate(session, prompt, sampling=Sampling(greedy=True), max_tokens=count)
    _ = answer.text
    return answer


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_exact_answers_are_those_that_greedy_generation_gives(ending, batch):
    examples, right = [], 0
    for number, example in enumerate(EXAMPLES):
        answer = greedy(ending, example.prompt, 40)
        given_up = answer.finish_reason != END
        text = ending.tokenizer.decode(answer.ids[:-1])  # the end token has a text of its own here
        expected = "wrong" if given_up or number == 2 else f" {text}\n"
        examples.append(dataclasses.replace(example, answer=expected))
        right += expected != "wrong"
    assert right >= 2, "the end token was chosen for that"
    score = evaluate(ending, examples, batch=batch)
    assert score.exact == right < score.count
    assert score.exact_share == right / len(examples)
    for example, answer in zip(examples, score.answers, strict=True):
        assert (answer.strip() == example.answer.strip()) == (example.answer != "wrong"), "in the order of the examples"


def test_a_long_prompt_does_not_cut_the_answers_beside_it(tmp_path):
    """What a batch has room for after its longest prompt must not end a short prompt's answer."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", seed=5)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_sequence_length": 40}))
    split_directory(checkpoint, tmp_path / "bundle", opset=17)
    with Session(tmp_path / "bundle", threads=1) as session:
        whole = greedy(session, "a", 20).ids
        place = next(i for i in range(8, 20) if whole[i] not in whole[:i])
        ids = dataclasses.replace(session.config.special_ids, eos=whole[place])
        session.config = dataclasses.replace(session.config, special_ids=ids)
        long = "中 " * 12
        while len(session.tokenizer.prompt_ids(long)) < 36:
            long += "中"
        examples = [Example("a", session.tokenizer.decode(whole[:place]), 1), Example(long, "x", 2)]
        alone, together = (evaluate(session, examples, batch=batch) for batch in (1, 2))
        assert alone.exact == 1
        assert together.exact == 1
        assert together.perplexity == pytest.approx(alone.perplexity, rel=1e-5)


def test_an_empty_answer_is_exact_where_the_model_ends_at_once(session, monkeypatch):
    end = session.config.special_ids.eos
    monkeypatch.setattr("glmexport.sampling.Sampler.choose", lambda sampler, logits: end)
    score = evaluate(session, [Example("a", ""), Example("b", "c")], batch=2)
    assert (score.exact, score.answers) == (1, ("", ""))


def test_logits_that_are_not_finite_force_the_piece_here_too(session, monkeypatch):
    head = session.head
    monkeypatch.setattr(session, "head", lambda hidden: {name: x * np.nan for name, x in head(hidden).items()})
    score = evaluate(session, [Example("a", "")], batch=1)
    forced = session.tokenizer.decode([session.config.special_ids.forced] * 10)
    assert score.answers == (forced,)


def test_progress_counts_every_example_twice(session):
    told = []
    evaluate(session, EXAMPLES[:5], batch=2, advance=lambda what, step: told.append((what, step)))
    assert [step for _, step in told] == [2, 2, 1] * 2
    assert [what for what, _ in told] == ["answers"] * 3 + ["probabilities"] * 3


def test_a_head_that_gives_the_token_alone_has_exact_answers_and_no_perplexity(session, shared, golden_checkpoint):
    only = shared("golden-argmax-only", lambda path: split_directory(golden_checkpoint, path, opset=17, argmax="only"))
    with Session(only, threads=1) as alone:
        found, expected = (evaluate(each, EXAMPLES[:3], batch=2) for each in (alone, session))
        assert (found.answers, found.exact) == (expected.answers, expected.exact)
        assert (found.perplexity, found.divergence) == (None, None)
        with pytest.raises(GlmExportError, match=r"^[^\n]*\.$"):
            evaluate(session, EXAMPLES[:1], batch=1, baseline=alone)


def test_an_answer_that_the_model_holds_for_impossible_has_an_enormous_perplexity(tmp_path):
    tensors = make_tensors(vocab_size=1856, seed=1, dtype=torch.float32)
    tensors["lm_head.weight"] *= 1e5
    checkpoint = write_checkpoint(tmp_path / "checkpoint", seed=1, dtype=torch.float32)
    write_weights(checkpoint, tensors, "bin")
    split_directory(checkpoint, tmp_path / "bundle", opset=17)
    with Session(tmp_path / "bundle", threads=1) as session:
        assert evaluate(session, EXAMPLES[:2], batch=2).perplexity > 1e300


# Divergence


def test_a_bundle_does_not_diverge_from_itself(odd_session, bundle):
    assert abs(evaluate(odd_session, EXAMPLES, batch=3, baseline=odd_session).divergence) < 1e-9
    with Session(bundle, threads=1) as again:
        assert abs(evaluate(odd_session, EXAMPLES[:2], batch=1, baseline=again).divergence) < 1e-9


def log_probabilities(session, example, images=0):
    """[answer tokens, vocab], by the session's graphs one place at a time."""
    ids = session.config.special_ids
    answer = [*session.tokenizer.encode(example.answer), ids.eos]
    row = session.tokenizer.prompt_ids(example.prompt) + answer[:-1]
    prompt = prepare_prompt([row], ids)
    feeds = (prompt.input_ids, prompt.attention_mask, prompt.position_ids)
    hidden = session.forward(*feeds, session.empty_pasts(1))[-len(answer) :]
    logits = np.concatenate([session.head(place[None])[names.LOGITS] for place in hidden])[:, images:]
    return torch.log_softmax(torch.from_numpy(logits).double(), -1)


def test_the_divergence_of_int4_is_that_of_the_definition(int4_session, odd_session):
    for example in EXAMPLES[:2]:
        ours, theirs = (log_probabilities(session, example) for session in (int4_session, odd_session))
        expected = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
        assert expected > 1e-6
        score = evaluate(int4_session, [example], batch=1, baseline=odd_session)
        assert score.divergence == pytest.approx(expected, rel=1e-4)
        backwards = evaluate(odd_session, [example], batch=1, baseline=int4_session).divergence
        assert backwards != pytest.approx(expected, rel=1e-3), "which of the two is the baseline matters"


def test_the_divergence_of_several_examples_is_the_mean_of_their_tokens(int4_session, odd_session):
    alone = [evaluate(int4_session, [example], batch=1, baseline=odd_session) for example in EXAMPLES]
    expected = sum(score.divergence * score.tokens for score in alone) / sum(score.tokens for score in alone)
    for batch in (1, 4):
        score = evaluate(int4_session, EXAMPLES, batch=batch, baseline=odd_session)
        assert score.divergence == pytest.approx(expected, rel=1e-3)


def test_a_slimmed_bundle_is_compared_in_its_own_tokens(slim_session, odd_session):
    score = evaluate(slim_session, EXAMPLES, batch=3, baseline=odd_session)
    assert abs(score.divergence) < 1e-9
    expected, found = (log_probabilities(odd_session, EXAMPLES[0], images) for images in (40, 0))
    ours = log_probabilities(slim_session, EXAMPLES[0])
    assert torch.allclose(ours, expected, atol=1e-5)
    assert found.shape[1] == ours.shape[1] + 40


def test_a_slimmed_int4_bundle_against_the_full_float_one(slim_session, odd_session, shared):
    path = shared("eval-slim-int4", lambda path: derived(slim_session.bundle.directory, path, quantize_pass(4, head=4)))
    with Session(path, threads=1) as session:
        ours, theirs = log_probabilities(session, EXAMPLES[1]), log_probabilities(odd_session, EXAMPLES[1], 40)
        expected = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
        score = evaluate(session, [EXAMPLES[1]], batch=1, baseline=odd_session)
        assert score.divergence == pytest.approx(expected, rel=1e-4)


def test_the_full_bundle_against_the_slimmed_one_is_refused(slim_session, odd_session, session):
    with pytest.raises(GlmExportError, match=r"^[^\n]*cannot be compared[^\n]*\.$"):
        evaluate(odd_session, EXAMPLES[:1], batch=1, baseline=slim_session)
    with pytest.raises(GlmExportError, match=r"^[^\n]*cannot be compared[^\n]*\.$"):
        evaluate(odd_session, EXAMPLES[:1], batch=1, baseline=session)


def test_a_broken_baseline_is_not_taken_for_no_divergence(odd_session, int4_session, monkeypatch):
    head = odd_session.head
    monkeypatch.setattr(odd_session, "head", lambda hidden: {name: x * np.nan for name, x in head(hidden).items()})
    assert evaluate(int4_session, EXAMPLES[:2], batch=2, baseline=odd_session).divergence != 0


# Examples that do not fit


def test_an_example_that_is_too_long_names_its_line(session):
    fits = Example("a " * 20, "b", 1)
    with pytest.raises(GlmExportError, match=r"^Line 7\b[^\n]*2048[^\n]*\.$"):
        evaluate(session, [fits, Example("中文 " * 1200, "b", 7)], batch=2)
    with pytest.raises(GlmExportError, match=r"^Line 9\b[^\n]*2048[^\n]*\.$"):
        evaluate(session, [fits, Example("b", "中文 " * 1200, 9)], batch=2)


def test_an_example_that_is_no_unicode_names_its_line(session):
    with pytest.raises(GlmExportError, match=r"^[^\n]*[Ll]ine 3\b[^\n]*\.$"):
        evaluate(session, [Example("a\ud800", "b", 3)], batch=2)


# Files


def write(tmp_path, content):
    path = tmp_path / "examples.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_examples_are_one_json_object_a_line(tmp_path):
    path = write(tmp_path, '{"prompt": "你好", "answer": "好"}\n{"answer": "", "prompt": "b", "more": 5}\n')
    assert read_examples(path) == [Example("你好", "好", 1), Example("b", "", 2)]


def test_empty_lines_and_windows_line_ends_are_passed_over_and_counted(tmp_path):
    path = write(tmp_path, '\r\n{"prompt": "a", "answer": "b"}\r\n  \n\n{"prompt": "c", "answer": "d"}')
    assert read_examples(path) == [Example("a", "b", 2), Example("c", "d", 5)]


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}\n')
    assert read_examples(path) == [Example("a", "b", 1)]


def test_a_history_makes_the_prompt_of_the_chat_format(tmp_path):
    lines = [
        {"prompt": "c", "answer": "d", "history": [["a", "b"], ["e", "f"]]},
        {"prompt": "c", "answer": "d", "history": []},
        {"prompt": "c", "answer": "d", "history": None},
    ]
    found = read_examples(write(tmp_path, "\n".join(map(json.dumps, lines))))
    assert [example.prompt for example in found] == [chat_prompt("c", [("a", "b"), ("e", "f")]), "c", "c"]
    assert found[0].prompt.startswith("[Round 0]\n问：a\n答：b\n[Round 1]")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_text_that_json_can_hold_is_read_as_it_is(tmp_path_factory, pairs, ascii_only):
    lines = [json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=ascii_only) for prompt, answer in pairs]
    path = write(tmp_path_factory.mktemp("examples"), "\n".join(lines))
    assert [(example.prompt, example.answer) for example in read_examples(path)] == pairs


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x7f"])
def test_a_character_that_only_some_take_for_a_line_end_is_none(tmp_path, separator):
    line = json.dumps({"prompt": f"a{separator}b", "answer": "c"}, ensure_ascii=False)
    assert read_examples(write(tmp_path, line)) == [Example(f"a{separator}b", "c", 1)]


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "{",
        "5",
        "[]",
        "null",
        '"a"',
        "{}",
        '{"prompt": "a"}',
        '{"answer": "a"}',
        '{"prompt": 5, "answer": "a"}',
        '{"prompt": "a", "answer": null}',
        '{"prompt": "a", "answer": "b", "history": "c"}',
        '{"prompt": "a", "answer": "b", "history": 5}',
        '{"prompt": "a", "answer": "b", "history": [["c"]]}',
        '{"prompt": "a", "answer": "b", "history": [["c", 5]]}',
        '{"prompt": "a", "answer": "b", "history": [{"query": "c", "answer": "d"}]}',
        "[" * 100_000,
        "9" * 10_000,
    ],
    ids=lambda line: line[:40],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    path = write(tmp_path, f'{{"prompt": "a", "answer": "b"}}\n\n{line}\n')
    with pytest.raises(GlmExportError, match=r"^[^\n]*examples\.jsonl, line 3 is no example[^\n]*\.$"):
        read_examples(path)


def test_a_file_without_examples_is_refused(tmp_path):
    for content in (b"", b"\n \n"):
        with pytest.raises(GlmExportError, match=r"^[^\n]*holds no examples[^\n]*\.$"):
            read_examples(write(tmp_path, content))


def test_files_that_cannot_be_read_give_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(GlmExportError, match=r"^[^\n]*cannot be read \(No such file[^\n]*\.$"):
        read_examples(tmp_path / "absent")
    with pytest.raises(GlmExportError, match=r"^[^\n]*cannot be read \(Is a directory\)[^\n]*\.$"):
        read_examples(tmp_path)
    with pytest.raises(GlmExportError, match=r"^[^\n]*is not UTF-8[^\n]*\.$"):
        read_examples(write(tmp_path, b'{"prompt": "\xff", "answer": "b"}'))
    monkeypatch.setattr(evaluation, "MAX_FILE_BYTES", 5)
    with pytest.raises(GlmExportError, match=r"^[^\n]*more than 5 bytes[^\n]*\.$"):
        read_examples(write(tmp_path, b'{"prompt": "a", "answer": "b"}'))
