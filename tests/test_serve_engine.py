"""Many answers at once: each as if it were alone, in order, in its slot, and gone at the next step when cancelled."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import END, SPECIAL, VOCAB, FakeRunner, Heard, alone, engine_of, logits_after, until

from glmexport.errors import GlmExportError
from glmexport.generation import END as ENDED
from glmexport.generation import LENGTH, STOP
from glmexport.sampling import Sampling, log_softmax
from glmexport.serve.engine import BROKEN, QueueFullError, StoppedError, Watch
from glmexport.serve.row import CANCELLED, LATE, LOST, STOPPED, Ask, Row
from glmexport.serve.rows import PortableRows
from glmexport.serve.throughput import in_words, throughput
from glmexport.session import Session

GREEDY = Sampling(greedy=True)


def ask_of(*words: int, max_tokens: int = 6, **more) -> Ask:
    return Ask((*words, 1, 2), max_tokens, more.pop("sampling", GREEDY), logprobs=more.pop("logprobs", 0), **more)


# Rows beside each other


def test_fifty_prompts_together_give_what_each_gives_alone():
    asks = [ask_of(10 + number % 30, number % 7, max_tokens=1 + number % 19) for number in range(50)]
    runner, heard = FakeRunner(slots=8), Heard()
    with engine_of(runner) as engine:
        engine.submit(asks, heard)
        for number, ask in enumerate(asks):
            assert heard.ids(number) == alone(ask)
            assert heard.end(number).reason == LENGTH
    assert max(len(call[1]) for call in runner.calls if call[0] == "decode") > 4, "rows were computed together"
    assert not runner.rows, "every slot was freed"


def test_sampled_answers_depend_on_their_own_seed_alone():
    def answers(count):
        asks = [
            ask_of(9, sampling=Sampling(temperature=3.0, top_k=0, top_p=1.0, seed=100 + number))
            for number in range(count)
        ]
        heard = Heard()
        with engine_of(FakeRunner(slots=count)) as engine:
            engine.submit(asks, heard)
            return [heard.ids(number) for number in range(count)]

    few, many = answers(2), answers(8)
    assert many[:2] == few
    assert len({tuple(ids) for ids in many}) > 4


def test_one_prompt_a_step_and_rows_in_the_order_they_came():
    runner, heard = FakeRunner(slots=2), Heard()
    with engine_of(runner, max_queue=10) as engine:
        engine.submit([ask_of(20 + number, max_tokens=3) for number in range(6)], heard)
        for number in range(6):
            heard.end(number)
    prompts = [call[2][0] for call in runner.calls if call[0] == "prefill"]
    assert prompts == [20, 21, 22, 23, 24, 25]
    kinds = [call[0] for call in runner.calls]
    assert kinds[:4] == ["prefill", "prefill", "decode", "prefill"] or kinds[:3] == ["prefill", "prefill", "decode"]
    assert ["prefill"] * 3 not in [kinds[i : i + 3] for i in range(len(kinds))], "rows that run are not kept waiting"


def test_a_budget_of_tokens_begins_several_prompts_in_one_step():
    gate = threading.Semaphore(0)
    runner, heard = FakeRunner(slots=8, gate=gate), Heard()
    with engine_of(runner, max_batched_tokens=10) as engine:
        engine.submit([ask_of(7, 8) for _ in range(5)], heard)  # 4 tokens each
        gate.release(100)
        for number in range(5):
            heard.end(number)
        with pytest.raises(GlmExportError, match=r"12 tokens, the context 10"):
            engine.submit([ask_of(*range(10))], heard)
    assert [call[0] for call in runner.calls[:3]] == ["prefill", "prefill", "prefill"] or [
        call[0] for call in runner.calls[:3]
    ] == ["prefill", "prefill", "decode"]


def test_a_bundle_answers_fifty_prompts_together_as_one_by_one(quick_bundle):
    with Session(quick_bundle, threads=1) as session:
        special, tokenizer = session.config.special_ids, session.tokenizer
        prompts = [tokenizer.prompt_ids(f"{number} 你好" * (1 + number % 3)) for number in range(50)]
        asks = [Ask(tuple(prompt), 5, GREEDY, logprobs=0) for prompt in prompts]

        def together(slots):
            from glmexport.serve.engine import Engine

            heard = Heard()
            engine = Engine(PortableRows(Session(quick_bundle, threads=1), slots), tokenizer, special)
            engine.submit(asks, heard)
            found = [(heard.ids(number), heard.text(number)) for number in range(50)]
            engine.stop("over")
            assert engine.join(20)
            return found

        assert together(8) == together(1)


# Leaving


def test_a_cancelled_row_leaves_its_slot_at_the_next_step():
    gate = threading.Semaphore(2)  # the first prompt, and one token
    runner, first, second = FakeRunner(slots=1, gate=gate), Heard(), Heard()
    with engine_of(runner) as engine:
        answers = engine.submit([ask_of(10, max_tokens=50)], first)
        engine.submit([ask_of(11, max_tokens=2)], second)
        until(lambda: len(runner.calls) == 2)
        answers.cancel()
        gate.release(1)  # the step that may have begun already
        assert first.end().reason == CANCELLED
        assert first.end().answer_tokens <= 3
        gate.release(10)
        assert second.end().reason == LENGTH
    assert [call[0] for call in runner.calls].count("prefill") == 2


def test_a_row_that_is_cancelled_in_the_queue_never_begins():
    gate = threading.Semaphore(0)
    runner, first, second = FakeRunner(slots=1, gate=gate), Heard(), Heard()
    with engine_of(runner) as engine:
        engine.submit([ask_of(10, max_tokens=3)], first)
        engine.submit([ask_of(11)], second).cancel()
        gate.release(100)
        assert second.end().reason == CANCELLED
        assert first.end().reason == LENGTH
    assert [call[2][0] for call in runner.calls if call[0] == "prefill"] == [10]


def test_a_row_whose_time_is_over_is_told():
    heard = Heard()
    with engine_of(FakeRunner()) as engine:
        engine.submit([ask_of(10, deadline=0.0)], heard)
        assert heard.end().reason == LATE
        assert heard.end().error.endswith(".")


def test_a_full_queue_is_refused_with_a_time_to_come_again():
    gate = threading.Semaphore(0)
    heard = Heard()
    with engine_of(FakeRunner(slots=2, gate=gate), max_queue=3) as engine:
        engine.submit([ask_of(10)] * 5, heard)
        with pytest.raises(QueueFullError, match="expected at most 3") as refused:
            engine.submit([ask_of(10)], heard)
        assert 1 <= refused.value.retry_after <= 120
        gate.release(1000)
        for number in range(5):
            heard.end(number)
        engine.submit([ask_of(10)], Heard())


def test_a_stopped_engine_tells_who_waits_and_lets_the_running_end():
    gate = threading.Semaphore(0)
    heard, late = Heard(), Heard()
    runner = FakeRunner(slots=1, gate=gate)
    with engine_of(runner) as engine:
        engine.submit([ask_of(10)], heard)
        gate.release(1)
        until(lambda: bool(runner.calls))
        engine.submit([ask_of(11)], late)
        engine.stop("Going.")
        assert late.end().reason == STOPPED
        assert late.end().error == "Going."
        with pytest.raises(StoppedError, match="Going"):
            engine.submit([ask_of(12)], heard)
        gate.release(100)
        assert heard.end().reason == LENGTH
        assert engine.join(20)


def test_a_stop_without_grace_ends_the_running_answers():
    gate = threading.Semaphore(1)
    heard = Heard()
    with engine_of(FakeRunner(gate=gate)) as engine:
        engine.submit([ask_of(10, max_tokens=40)], heard)
        engine.stop("Now.", drain=False)
        gate.release(100)
        assert heard.end().reason == STOPPED


@pytest.mark.parametrize(
    ("error", "words"), [(RuntimeError("cuda"), BROKEN), (MemoryError(), "memory"), (GlmExportError("No."), "No.")]
)
def test_a_runner_that_fails_loses_its_answers_and_nothing_else(error, words, caplog):
    runner = FakeRunner()
    runner.broken = error
    heard, later = Heard(), Heard()
    with engine_of(runner) as engine:
        engine.submit([ask_of(10)], heard)
        assert heard.end().reason == LOST
        assert words in heard.end().error
        runner.broken = None
        engine.submit([ask_of(10)], later)
        assert later.end().reason == LENGTH


def test_prompts_without_room_are_refused_with_both_numbers():
    with engine_of(FakeRunner(max_length=8)) as engine:
        with pytest.raises(GlmExportError, match=r"8 tokens, the context 8"):
            engine.submit([ask_of(*range(6))], Heard())
        with pytest.raises(GlmExportError, match=r"expected 8 together"):
            engine.submit([ask_of(5, max_tokens=6)], Heard())


def test_the_watch_hears_of_every_token():
    class Counting(Watch):
        begun_rows = rows = prompts = 0
        ends = ()

        def begun(self, queued):
            self.begun_rows += queued >= 0

        def first_token(self, since_asked):
            self.prompts += 1

        def step(self, seconds, rows):
            self.rows += rows

        def ended(self, row, piece):
            self.ends = (*self.ends, piece.end)

    watch, heard = Counting(), Heard()
    with engine_of(FakeRunner(), watch=watch) as engine:
        engine.submit([ask_of(10), ask_of(11)], heard)
        heard.end(0), heard.end(1)
    assert (watch.begun_rows, watch.prompts, watch.rows) == (2, 2, 10)
    assert sum(end.answer_tokens for end in watch.ends) == 12


# One row


class Letters:
    """A tokenizer whose every token is some bytes of UTF-8."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def stream(self):
        import codecs

        decoder, pieces = codecs.getincrementaldecoder("utf-8")("replace"), self.pieces

        class Stream:
            def push(self, token):
                return decoder.decode(pieces[token])

            def finish(self):
                return decoder.decode(b"", final=True)

        return Stream()


def one_hot(token: int) -> np.ndarray:
    logits = np.zeros(VOCAB, np.float32)
    logits[token] = 9
    return logits


def fed(row: Row, tokens: list[int]):
    """The pieces of a row whose model gives these tokens."""
    pieces = []
    for token in tokens:
        pieces.append(row.take(one_hot(token)))
        if pieces[-1].end is not None:
            break
    return pieces


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("aあ中b🙂", max_size=12),
    stops=st.lists(st.text("aあ中b🙂", min_size=1, max_size=3), max_size=2),
    data=st.data(),
)
def test_characters_are_whole_and_stop_texts_are_never_seen(text, stops, data):
    """However the bytes are cut into tokens, given out is the text before the first stop text to be complete."""
    raw, pieces = text.encode(), [b""] * 6
    while raw:
        count = data.draw(st.integers(1, min(4, len(raw))))
        pieces.append(raw[:count])
        raw = raw[count:]
    tokens = list(range(6, len(pieces)))
    row = Row(Ask((1, 2), len(tokens) + 1, GREEDY, tuple(stops)), Letters(pieces), SPECIAL, lambda piece: None)
    given_out = fed(row, [*tokens, END])
    shown = "".join(piece.text for piece in given_out)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(ends)[1]] if ends else text)
    assert given_out[-1].end.reason == (STOP if ends else ENDED)
    assert "\ufffd" not in shown
    so_far = ""
    for piece in given_out:
        so_far += piece.text
        assert shown.startswith(so_far), "nothing that was given out is taken back"


def row_of(ask: Ask, pieces: list[bytes] | None = None) -> Row:
    return Row(ask, Letters(pieces or [bytes([97 + i % 26]) for i in range(VOCAB)]), SPECIAL, lambda piece: None)


def test_the_end_token_and_stop_ids_end_an_answer_unless_ignored():
    assert fed(row_of(Ask((1, 2), 9, GREEDY)), [10, END])[-1].end.reason == ENDED
    assert fed(row_of(Ask((1, 2), 9, GREEDY, stop_ids=frozenset((10,)))), [11, 10])[-1].end.reason == ENDED
    pieces = fed(row_of(Ask((1, 2), 3, GREEDY, ignore_end=True, stop_ids=frozenset((10,)))), [10, END, 10])
    assert pieces[-1].end.reason == LENGTH
    assert pieces[-1].end.answer_tokens == 3


def test_logprobs_are_the_models_own_whatever_is_adjusted():
    logits = logits_after([1, 2])
    sampling = Sampling(greedy=True, logit_bias=((7, 100.0),))
    piece = row_of(Ask((1, 2), 1, sampling, logprobs=3)).take(logits)
    (token,) = piece.tokens
    expected = log_softmax(logits)
    assert token.id == 7
    assert token.logprob == pytest.approx(expected[7])
    assert [other for other, _ in token.top] == list(np.argsort(-expected)[:3])


def test_tokens_of_a_stop_text_are_not_given():
    pieces = [b""] * 6 + [b"a", b"EN", b"D", b"EX"]
    row = row_of(Ask((1, 2), 9, GREEDY, ("END",), logprobs=0), pieces)
    found = fed(row, [6, 7, 8])
    assert "".join(piece.text for piece in found) == "a"
    assert [token.id for piece in found for token in piece.tokens] == [6]
    row = row_of(Ask((1, 2), 9, GREEDY, ("END",), logprobs=0), pieces)
    found = fed(row, [6, 7, 6, END])
    assert "".join(piece.text for piece in found) == "aENa"
    assert [token.id for piece in found for token in piece.tokens] == [6, 7, 6]


def test_scored_tokens_are_fed_and_not_chosen():
    ask = Ask((1, 2), 0, GREEDY, logprobs=1, scored=(10, 11, 12))
    heard, runner = Heard(), FakeRunner()
    with engine_of(runner) as engine:
        engine.submit([ask], heard)
        assert heard.ids() == [10, 11, 12]
        assert heard.end().answer_tokens == 0
    expected = [log_softmax(logits_after([1, 2, *ask.scored[:count]]))[ask.scored[count]] for count in range(3)]
    found = [token.logprob for piece in heard.pieces[0] for token in piece.tokens]
    assert found == pytest.approx(expected)
    assert len([call for call in runner.calls if call[0] == "decode"]) == 2, "nothing is computed that nobody asked for"


def test_logits_that_are_not_finite_force_the_id_and_have_logprobs():
    logits = logits_after([1])
    logits[4] = np.nan
    piece = row_of(Ask((1, 2), 1, GREEDY, logprobs=2)).take(logits)
    assert piece.tokens[0].id == SPECIAL.forced
    assert np.isfinite([logprob for _, logprob in piece.tokens[0].top]).all()


def test_the_throughput_of_any_runner():
    runner = FakeRunner(slots=4)
    points = throughput(runner, [10, 1, 2], tokens=4, warm_up=1)
    assert [point.rows for point in points] == [1, 2, 4]
    assert all(point.speed > 0 for point in points)
    assert not runner.rows
    assert [call for call in runner.calls if call[0] == "decode"][-1] == ("decode", (0, 1, 2, 3))
    assert in_words(points)[0].startswith("1 row  :")
