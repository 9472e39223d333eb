"""Answers of a bundle: the original's tokens, transformers' tokens, and where an answer ends."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import make_config, make_tensors, write_checkpoint, write_weights
from conftest import split_directory
from derived_bundles import derived
from hypothesis import given, settings
from hypothesis import strategies as st

import glmexport
from glmexport import names
from glmexport.errors import BundleError, GlmExportError
from glmexport.generation import END, LENGTH, STOP, Decoder, StopTexts, generate
from glmexport.models.chatglm_6b import ChatGLMForConditionalGeneration
from glmexport.passes.slim_vocab import SlimPass
from glmexport.sampling import Sampling
from glmexport.session import Session

GREEDY = Sampling(greedy=True)


@pytest.fixture(scope="module")
def session(quick_bundle):
    with Session(quick_bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def reference(golden_checkpoint):
    return ChatGLMForConditionalGeneration.from_pretrained(golden_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def odd_session(bundle):
    with Session(bundle, threads=1) as session:
        yield session


@pytest.fixture
def short(golden):
    return golden["short.input_ids"][0].tolist()


def finished(generation):
    """The generation after all of it."""
    _ = generation.text
    return generation


def by_transformers(model, prompt, count, **options):
    """Ids that transformers' own loop gives after a prompt, greedily."""
    whole = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, **options)
    return whole[0, len(prompt) :].tolist()


# The same tokens


@pytest.mark.parametrize("case", ["short", "one", "long", "mask", "far"])
def test_greedy_is_what_the_original_gives(session, golden, case):
    prompt, expected = golden[f"{case}.input_ids"][0].tolist(), golden[f"{case}.greedy"].tolist()
    answer = finished(generate(session, prompt, sampling=GREEDY, max_tokens=len(expected)))
    assert answer.ids == expected
    assert answer.prompt_ids == prompt
    assert answer.finish_reason == LENGTH
    assert answer.stats.prefill_tokens == len(prompt)
    assert answer.stats.decode_tokens == len(expected) - 1
    assert answer.stats.kv_bytes == session.kv_bytes(1, len(prompt) + len(expected) - 1)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("case", ["short", "long", "mask"])
def test_greedy_is_what_transformers_generate_gives(session, reference, golden, case, penalty):
    prompt = golden[f"{case}.input_ids"][0].tolist()
    expected = by_transformers(reference, prompt, 24, repetition_penalty=penalty)
    sampling = Sampling(greedy=True, repetition_penalty=penalty)
    assert finished(generate(session, prompt, sampling=sampling, max_tokens=24)).ids == expected


@pytest.fixture(scope="module")
def seeded(shared):
    """(checkpoint, bundle) of another seed, other widths, a head of its own and float32 weights."""
    sizes = {"hidden_size": 48, "heads": 3, "inner": 80, "num_blocks": 3, "seed": 31, "dtype": torch.float32}
    checkpoint = shared("seeded-checkpoint", lambda path: write_checkpoint(path, **sizes))
    return checkpoint, shared("seeded-bundle", lambda path: split_directory(checkpoint, path, opset=17))


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_another_checkpoint_gives_transformers_tokens(seeded, penalty):
    checkpoint, bundle = seeded
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    with Session(bundle, threads=1) as session:
        for text in ("", "你好", "What is 12 plus 34?\n\tSay it twice.  "):
            prompt = session.tokenizer.prompt_ids(text)
            expected = by_transformers(model, prompt, 16, repetition_penalty=penalty)
            sampling = Sampling(greedy=True, repetition_penalty=penalty)
            answer = finished(generate(session, text, sampling=sampling, max_tokens=16))
            assert answer.prompt_ids == prompt
            assert answer.ids == expected
            assert answer.text == session.tokenizer.decode(expected)
        assert len(set(expected)) > 3


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_slimmed_bundle_gives_the_same_answers_in_its_own_ids(odd_session, bundle, checkpoint, shared, penalty):
    slim = shared("run-slim", lambda path: derived(bundle, path, SlimPass()))
    model = ChatGLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    sampling = Sampling(greedy=True, repetition_penalty=penalty)
    with Session(slim, threads=1) as session:
        assert session.config.vocab_size == odd_session.config.vocab_size - 40
        for text in ("你好", "12+34="):
            answer = finished(generate(session, text, sampling=sampling, max_tokens=12))
            full = finished(generate(odd_session, text, sampling=sampling, max_tokens=12))
            assert full.ids == by_transformers(model, full.prompt_ids, 12, repetition_penalty=penalty)
            images = [token for token in full.ids if token < 40]
            assert not images, "which only the full bundle can write; choose another seed"
            assert [token + 40 for token in answer.ids] == full.ids
            assert [token + 40 for token in answer.prompt_ids] == full.prompt_ids
            assert answer.text == full.text


# Batches


def run_batch(session, rows, steps):
    """Logits [steps, batch, vocab] and the greedy ids."""
    decoder = Decoder(session, rows)
    outputs, logits = decoder.prefill(), []
    for step in range(steps):
        logits.append(outputs[names.LOGITS])
        assert decoder.length == max(map(len, rows)) + step
        outputs = decoder.step(logits[-1].argmax(-1).tolist())
    return np.array(logits)


def test_a_batch_of_different_lengths_is_what_its_rows_are_alone(session):
    rows = [session.tokenizer.prompt_ids(text) for text in ("你好", "What is 12 plus 34? " * 4, "")]
    assert len({*map(len, rows)}) == 3
    together = run_batch(session, rows, 6)
    for i, row in enumerate(rows):
        alone = run_batch(session, [row], 6)[:, 0]
        assert np.array_equal(alone.argmax(-1), together[:, i].argmax(-1))
        assert np.abs(alone - together[:, i]).max() < 1e-4


def test_the_golden_batch_is_what_the_original_gives(session, golden):
    padded = golden["batch.input_ids"]
    rows = [row[(row == 3).sum() :].tolist() for row in padded]
    assert len(rows[0]) != len(rows[1])
    logits = run_batch(session, rows, len(golden["batch.greedy"]) + 1)
    assert np.array_equal(logits[:-1].argmax(-1), golden["batch.greedy"])
    assert np.abs(logits[1:] - golden["batch.decode_logits"]).max() < 1e-4


# Where an answer ends


def ending_with(session, token):
    """The session for which the token is the model's end token."""
    ids = dataclasses.replace(session.config.special_ids, eos=token)
    session.config = dataclasses.replace(session.config, special_ids=ids)
    return session


def test_the_end_token_is_among_the_ids_and_not_in_the_text(quick_bundle, golden, short):
    expected = golden["short.greedy"].tolist()
    with Session(quick_bundle, threads=1) as session:
        answer = finished(generate(ending_with(session, expected[2]), short, sampling=GREEDY))
        assert answer.ids == expected[:3]
        assert answer.finish_reason == END
        assert answer.stats.decode_tokens == 2, "the end token is not fed"


def test_the_models_own_end_token_has_no_text(session, monkeypatch):
    given_ids = iter([371, 1064, session.config.special_ids.eos])
    monkeypatch.setattr("glmexport.sampling.Sampler.choose", lambda sampler, logits: next(given_ids))
    answer = finished(generate(session, "a"))
    assert answer.ids == [371, 1064, 1505]
    assert answer.text == session.tokenizer.decode([371, 1064])
    assert answer.text
    assert answer.finish_reason == END


def test_an_end_token_as_the_last_of_max_tokens_is_an_end(quick_bundle, golden, short):
    with Session(quick_bundle, threads=1) as session:
        ending_with(session, golden["short.greedy"][2])
        assert finished(generate(session, short, sampling=GREEDY, max_tokens=3)).finish_reason == END
        assert finished(generate(session, short, sampling=GREEDY, max_tokens=2)).finish_reason == LENGTH


@pytest.mark.parametrize("count", [1, 2, 5])
def test_max_tokens_is_how_many_come(session, golden, short, count):
    answer = finished(generate(session, short, sampling=GREEDY, max_tokens=count))
    assert answer.ids == golden["short.greedy"].tolist()[:count]
    assert (answer.finish_reason, answer.stats.decode_tokens) == (LENGTH, count - 1)


def test_tokens_are_computed_as_they_are_asked_for(session, short):
    answer = generate(session, short, sampling=GREEDY, max_tokens=30)
    assert answer.ids == []
    next(iter(answer))
    assert 1 <= len(answer.ids) < 10
    assert answer.finish_reason is None


@pytest.mark.parametrize("text", ["你好", "", "a\n\n  b\t?"])
def test_pieces_joined_are_the_text_and_the_text_is_decoded_from_the_ids(session, text):
    answer = generate(session, text, sampling=Sampling(seed=3, temperature=3.0, top_k=0, top_p=1.0), max_tokens=60)
    pieces = list(answer)
    assert len(pieces) > 10
    assert "".join(pieces) == answer.text == session.tokenizer.decode(answer.ids)
    assert "" not in pieces


def test_the_same_seed_gives_the_same_answer(session):
    def ids(**options):
        return finished(generate(session, "你好", sampling=Sampling(temperature=3.0, **options), max_tokens=20)).ids

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)


# The model's positions


@pytest.fixture(scope="module")
def little(shared):
    """A model of 24 positions."""

    def make(path):
        path.mkdir()
        config = make_config(vocab_size=64) | {"max_sequence_length": 24}
        (path / "config.json").write_text(json.dumps(config), "utf-8")
        write_weights(path, make_tensors(vocab_size=64, seed=3), "bin")

    checkpoint = shared("little-checkpoint", make)
    with Session(shared("little", lambda path: split_directory(checkpoint, path, opset=17)), threads=1) as session:
        yield session


def prompt_of(session, count):
    ids = session.config.special_ids
    return [*[7] * (count - 2), ids.gmask, ids.bos]


@pytest.mark.parametrize("count", [24, 25, 300])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(little, count):
    with pytest.raises(GlmExportError, match=rf"^[^\n]*\b{count}\b[^\n]*\b24\b[^\n]*\.$"):
        generate(little, prompt_of(little, count))
    with pytest.raises(GlmExportError, match=rf"\b{count}\b.*\b24\b"):
        Decoder(little, [prompt_of(little, 5), prompt_of(little, count)])


@pytest.mark.parametrize("options", [{}, {"max_tokens": 1}, {"max_tokens": 100}])
def test_a_prompt_one_shorter_than_the_positions_gives_one_token(little, options):
    answer = finished(generate(little, prompt_of(little, 23), sampling=GREEDY, **options))
    assert len(answer.ids) == 1
    assert answer.finish_reason in (LENGTH, END)


def test_without_max_tokens_prompt_and_answer_fill_the_positions(little):
    ending_with(little, -1)
    for count in (2, 9, 22):
        answer = finished(generate(little, prompt_of(little, count), sampling=GREEDY))
        assert (len(answer.ids) + count, answer.finish_reason) == (24, LENGTH)
        assert finished(generate(little, prompt_of(little, count), sampling=GREEDY, max_tokens=99)).ids == answer.ids


def test_a_bundle_without_a_tokenizer_gives_ids_and_no_text(little):
    answer = finished(generate(little, prompt_of(little, 4), sampling=GREEDY, max_tokens=3))
    assert (len(answer.ids), answer.text, list(answer)) == (3, "", [])
    with pytest.raises(BundleError, match=r"^[^\n]*\.$"):
        generate(little, "text")
    with pytest.raises(GlmExportError, match=r"^[^\n]*no tokenizer[^\n]*\.$"):
        generate(little, prompt_of(little, 4), stop=["a"])


# Prompts that are none


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([5, 1501, 1504, 1856], ("1856", "1855")),
        ([5, 1501, -1, 1504], ("-1", "1855")),
        ([2**70, 1501, 1504], (str(2**70), "1855")),
        ([5, 1501], ("1504",)),
        ([5, 1504], ("1501",)),
        ([5, 1504, 1501], ("1501", "1504")),
        ([1504], ("1501",)),
        ([], ("1501", "1504")),
    ],
)
def test_ids_that_are_no_prompt_are_refused_in_a_sentence(session, prompt, words):
    with pytest.raises(GlmExportError, match=r"^[^\n]*\.$") as caught:
        generate(session, prompt)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"max_tokens": -3}, {"stop": ["a", ""]}])
def test_options_that_are_none_are_refused_in_a_sentence(session, options):
    with pytest.raises(GlmExportError, match=r"^[^\n]*\.$"):
        generate(session, "a", **options)


def test_half_a_character_is_refused_in_a_sentence(session):
    with pytest.raises(GlmExportError, match=r"^[^\n]*\.$"):
        generate(session, "a\ud800")


def test_an_infilling_prompt_needs_no_gmask(session, golden):
    assert 1501 not in golden["mask.input_ids"]
    answer = generate(session, golden["mask.input_ids"][0].tolist(), sampling=GREEDY, max_tokens=1)
    assert finished(answer).ids == golden["mask.greedy"][:1].tolist()


def test_special_names_in_a_text_are_tokens_only_when_asked_for(session):
    text = "ab[MASK]cd"
    plain, special = (generate(session, text, special=special).prompt_ids for special in (False, True))
    assert 1500 not in plain
    assert special.count(1500) == 1


# Stop texts


def cut_by_definition(text, stops):
    """Before the stop text that is complete first; of several, before the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


LETTERS = st.text(alphabet="ab\n", max_size=14)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3)


def cut(text, places):
    return [text[start:stop] for start, stop in zip([0, *places], [*places, len(text)], strict=True)]


@given(LETTERS, STOPS, st.data())
@settings(max_examples=400, deadline=None)
def test_what_comes_before_stop_texts_does_not_depend_on_where_the_text_is_cut(text, stops, data):
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    cutter = StopTexts(stops)
    shown = "".join(map(cutter.push, cut(text, places))) + cutter.finish()
    assert shown == cut_by_definition(text, stops)
    assert cutter.found == any(stop in text for stop in stops)


@given(LETTERS, st.text(alphabet="ab\n", min_size=1, max_size=5), st.data())
@settings(max_examples=300, deadline=None)
def test_one_stop_text_over_several_pieces(text, stop, data):
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    cutter, shown = StopTexts([stop]), ""
    for piece in cut(text, places):
        shown += cutter.push(piece)
        assert stop not in shown
    assert shown + cutter.finish() == cut_by_definition(text, [stop])
    assert cutter.found == (stop in text)


def test_only_the_beginning_of_a_stop_text_is_held_back():
    cutter = StopTexts(["end", "\n\n"])
    assert [cutter.push(piece) for piece in ("abc", "xe", "n", "x\n", "y", "en", "e")] == [
        "abc",
        "x",
        "",
        "enx",
        "\ny",
        "",
        "en",
    ]
    assert not cutter.found
    assert [cutter.push("nd"), cutter.push("more"), cutter.finish()] == ["", "", ""]
    assert cutter.found


def test_without_stop_texts_nothing_is_held_back():
    cutter = StopTexts()
    assert [cutter.push("a"), cutter.push(""), cutter.finish()] == ["a", "", ""]
    assert not cutter.found


@pytest.mark.parametrize("width", [1, 2, 7])
def test_an_answer_ends_before_a_stop_text(session, width):
    whole = generate(session, "你好", sampling=GREEDY, max_tokens=30)
    text = whole.text
    for start in range(0, len(text) - width, 5):
        stop = text[start : start + width]
        answer = generate(session, "你好", sampling=GREEDY, max_tokens=30, stop=["nowhere at all", stop])
        assert "".join(answer) == text[: text.index(stop)]
        assert answer.finish_reason == STOP
        assert answer.ids == whole.ids[: len(answer.ids)]
        assert stop in session.tokenizer.decode(answer.ids)


def test_the_first_of_two_stop_texts_ends_it(session):
    text = generate(session, "你好", sampling=GREEDY, max_tokens=30).text
    early, late = text[3:5], text[9:12]
    assert text.index(early) < text.index(late)
    for stop in itertools.permutations([early, late]):
        answer = generate(session, "你好", sampling=GREEDY, max_tokens=30, stop=stop)
        assert answer.text == text[: text.index(early)]


def test_a_stop_text_in_what_the_tokenizer_held_back_ends_it(session, monkeypatch):
    """Part of a newline piece and part of a character come out only when the answer ends."""
    piece = session.tokenizer.encode("x <")
    byte = next(i for i in range(1844) if session.tokenizer.piece(i) == "<0xE4>")
    for ids, stop in ((piece, "<"), ([*session.tokenizer.encode("x"), byte], "\ufffd")):
        given_ids = iter([*ids, session.config.special_ids.eos])
        monkeypatch.setattr("glmexport.sampling.Sampler.choose", lambda sampler, logits, ids=given_ids: next(ids))
        answer = generate(session, "a", stop=[stop])
        assert stop not in "".join(answer)
        assert answer.text.startswith("x")
        assert answer.finish_reason == STOP


# Logits that are not finite


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_gives_the_forced_piece(tmp_path, wrong):
    tensors = make_tensors(vocab_size=1856, seed=1)
    tensors["lm_head.weight"][700] = wrong
    checkpoint = write_checkpoint(tmp_path / "checkpoint", seed=1)
    write_weights(checkpoint, tensors, "bin")
    split_directory(checkpoint, tmp_path / "bundle", opset=17)
    with Session(tmp_path / "bundle", threads=1) as session:
        for sampling in (GREEDY, Sampling(seed=1), Sampling(seed=1, repetition_penalty=1.5)):
            answer = finished(generate(session, "a", sampling=sampling, max_tokens=3))
            assert answer.ids == [5, 5, 5]
            assert session.tokenizer.piece(5) == "▁"


# LM heads that give a token and no logits


@pytest.fixture(scope="module")
def argmax_only(shared, golden_checkpoint):
    return shared("golden-argmax-only", lambda path: split_directory(golden_checkpoint, path, opset=17, argmax="only"))


def test_a_head_that_gives_the_token_alone_is_greedy(argmax_only, golden, short):
    with Session(argmax_only, threads=1) as session:
        for sampling in (GREEDY, Sampling(temperature=0)):
            answer = finished(generate(session, short, sampling=sampling, max_tokens=8))
            assert answer.ids == golden["short.greedy"].tolist()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(greedy=True, repetition_penalty=1.1)])
def test_a_head_that_gives_the_token_alone_refuses_to_sample(argmax_only, short, sampling):
    with (
        Session(argmax_only, threads=1) as session,
        pytest.raises(GlmExportError, match=r"^[^\n]*--argmax only[^\n]*--greedy[^\n]*\.$"),
    ):
        finished(generate(session, short, sampling=sampling, max_tokens=8))


# What `import glmexport` offers


def test_importing_glmexport_loads_nothing_heavy():
    code = (
        "import sys, glmexport\n"
        "heavy = {'torch', 'onnxruntime', 'numpy', 'onnx', 'transformers'}\n"
        "assert not heavy & set(sys.modules), sys.modules.keys() & heavy\n"
        "glmexport.Session, glmexport.generate, glmexport.split\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'what runs a bundle needs neither'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_split_session_and_generate_as_documented(golden_checkpoint, golden, short, tmp_path):
    notices = []
    bundle = glmexport.split(golden_checkpoint, tmp_path / "bundle", opset=17, notice=notices.append)
    assert bundle.directory == tmp_path / "bundle"
    with glmexport.Session(str(tmp_path / "bundle"), memory_limit=2_000_000_000, threads=1) as session:
        answer = glmexport.generate(session, short, greedy=True, max_tokens=8)
        pieces = list(answer)
        assert answer.ids == golden["short.greedy"].tolist()
        assert "".join(pieces) == answer.text
    with pytest.raises(BundleError, match=r"^[^\n]*\.$"):
        glmexport.split(golden_checkpoint, tmp_path / "bundle", opset=17)
    assert glmexport.split(golden_checkpoint, tmp_path / "bundle", opset=17, force=True).directory.is_dir()


def test_a_history_makes_a_prompt_of_the_chat_format(session):
    with_history = glmexport.generate(session, "b", history=[("a", "1")], greedy=True, max_tokens=5)
    by_hand = glmexport.generate(session, "[Round 0]\n问：a\n答：1\n[Round 1]\n问：b\n答：", greedy=True, max_tokens=5)
    assert finished(with_history).ids == finished(by_hand).ids
    assert with_history.prompt_ids == by_hand.prompt_ids
    with pytest.raises(GlmExportError, match=r"^[^\n]*\.$"):
        glmexport.generate(session, [5, 1501, 1504], history=[("a", "1")])


def test_every_option_of_generate_reaches_the_sampler(session):
    options = {"temperature": 2.5, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 4}
    answer = finished(glmexport.generate(session, "a", max_tokens=12, **options))
    expected = finished(generate(session, "a", sampling=Sampling(False, **options), max_tokens=12))
    assert answer.ids == expected.ids
    for name, value in (("temperature", 0), ("top_k", 1), ("repetition_penalty", 0.02), ("seed", 5)):
        other = finished(glmexport.generate(session, "a", max_tokens=12, **(options | {name: value})))
        assert other.ids != answer.ids, name
    assert 1500 in glmexport.generate(session, "[MASK]", special=True).prompt_ids
    text = finished(glmexport.generate(session, "a", greedy=True, max_tokens=20)).text
    stopped = glmexport.generate(session, "a", greedy=True, max_tokens=20, stop=[text[5]])
    assert stopped.text == text[: text.index(text[5])]


def test_split_with_passes_gives_what_the_passes_give(checkpoint, tmp_path):
    bundle = glmexport.split(checkpoint, tmp_path / "b", opset=17, slim=True, embedding="bf16", quantize="int4")
    assert bundle.form.slim is not None
    assert bundle.form.embedding.kind == "raw"
    assert bundle.form.quantization is not None
    with glmexport.Session(bundle, threads=1) as session:
        assert len(finished(glmexport.generate(session, "a", greedy=True, max_tokens=4)).ids) == 4
    for wrong in ({"embedding": "int3"}, {"quantize": "int3"}):
        with pytest.raises(GlmExportError, match=r"^[^\n]*\.$"):
            glmexport.split(checkpoint, tmp_path / "c", **wrong)
