"""From logits to tokens: each step against transformers' own, in its order, and what is left to chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmexport.errors import GlmExportError
from glmexport.models.chatglm_6b import ChatGLMForConditionalGeneration
from glmexport.sampling import (
    Sampler,
    Sampling,
    force_finite,
    log_softmax,
    min_p_of,
    penalise,
    softmax,
    top_k_of,
    top_p_of,
)

FORCED = 5


LENGTHS = st.integers(1, 40)


def scores_of(count=LENGTHS, width=32):
    """Logits with many ties, of either sign, small and large."""
    ties = st.sampled_from([-3.0, -1.5, -0.0, 0.0, 0.5, 1.0, 2.0])
    any_size = st.floats(-1e4, 1e4, width=width, allow_subnormal=False)
    dtype = {32: np.float32, 64: np.float64}[width]
    return st.one_of(arrays.arrays(dtype, count, elements=element) for element in (ties, any_size, ties | any_size))


SCORES = scores_of()
NO_IDS = torch.zeros(1, 0, dtype=torch.long)


def by_transformers(scores, *processors, prompt=()):
    """What is left of scores [vocab], in float64: -inf where a token is ruled out."""
    ids = torch.tensor([list(prompt)], dtype=torch.long)
    return LogitsProcessorList(processors)(ids, torch.from_numpy(scores.astype(np.float64))[None])[0].numpy()


class Recorder:
    """Stands in for the random numbers: remembers from what they would choose."""

    def choice(self, ids, p):
        self.ids, self.probabilities = np.array(ids), np.array(p)
        return ids[0]


def choices(sampling, logits, prompt=()):
    """(ids that a sampler chooses among, their probabilities)."""
    sampler = Sampler(sampling, prompt, FORCED)
    sampler._random = recorder = Recorder()
    sampler.choose(logits)
    assert len({*recorder.ids.tolist()}) == len(recorder.ids)
    return recorder.ids, recorder.probabilities


def distribution(sampling, logits, prompt=()):
    """Probability of every token [vocab] that a sampler chooses by."""
    ids, probabilities = choices(sampling, logits, prompt)
    result = np.zeros(len(logits))
    result[ids] = probabilities
    return result


def assert_same_top_p(kept, expected, scores, top_p):
    """The same scores are kept, wherever ties stand; but where a sum of probabilities is top_p to the last bits."""
    longer, shorter = sorted((kept, expected), key=len, reverse=True)
    ordered = np.sort(softmax(scores))[::-1]
    assert np.array_equal(np.sort(scores[longer])[::-1][: len(shorter)], np.sort(scores[shorter])[::-1])
    for place in range(len(shorter), len(longer)):
        assert abs(ordered[:place].sum() - top_p) < 1e-9


# Each step


@given(scores_of(width=64), st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_top_k_keeps_what_transformers_keeps(scores, top_k):
    kept = top_k_of(scores, top_k)
    assert kept.tolist() == np.flatnonzero(np.isfinite(by_transformers(scores, TopKLogitsWarper(top_k)))).tolist()


def test_top_k_by_example():
    scores = np.array([1.0, 3.0, 2.0, 3.0, 2.0])
    assert top_k_of(scores, 1).tolist() == [1, 3], "what equals the lowest one kept is kept too"
    assert top_k_of(scores, 2).tolist() == [1, 3]
    assert top_k_of(scores, 3).tolist() == [1, 2, 3, 4]
    for everything in (0, 5, 6, 10**9):
        assert top_k_of(scores, everything).tolist() == [0, 1, 2, 3, 4]


@given(scores_of(width=64), st.floats(1e-6, 1, exclude_max=True) | st.sampled_from([0.1, 0.5, 0.7, 0.9]))
@settings(max_examples=300, deadline=None)
def test_top_p_keeps_what_transformers_keeps(scores, top_p):
    kept = top_p_of(scores, np.arange(len(scores)), top_p)
    expected = np.flatnonzero(np.isfinite(by_transformers(scores, TopPLogitsWarper(top_p))))
    assert_same_top_p(kept, expected, scores, top_p)


def test_top_p_by_example():
    scores = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    ids = np.arange(4)
    assert top_p_of(scores, ids, 1e-300).tolist() == [1], "at least one"
    assert top_p_of(scores, ids, 0.39).tolist() == [1]
    assert top_p_of(scores, ids, 0.41).tolist() == [1, 3]
    assert top_p_of(scores, ids, 0.69).tolist() == [1, 3]
    assert top_p_of(scores, ids, 0.71).tolist() == [1, 3, 2]
    assert top_p_of(scores, ids, 1).tolist() == [1, 3, 2, 0]
    assert len(top_p_of(np.zeros(2), np.arange(2), 0.5)) == 1, "what reaches it exactly is enough"
    assert len(top_p_of(np.zeros(4), np.arange(4), 0.5)) == 2
    assert top_p_of(scores, np.array([0, 2]), 0.6).tolist() == [2], "probabilities are those among the ids given"


@given(SCORES, st.data())
@settings(max_examples=200, deadline=None)
def test_the_penalty_is_transformers(scores, data):
    penalty = data.draw(st.sampled_from([0.5, 0.999, 1.0, 1.3, 7.0]))
    seen = data.draw(st.sets(st.integers(0, len(scores) - 1)))
    found = scores.copy()
    penalise(found, seen, penalty)
    ids = torch.tensor([sorted(seen)], dtype=torch.long)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.from_numpy(scores.copy())[None])[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-7)
    assert found.dtype == np.float32


def test_the_penalty_by_example():
    scores = np.array([2.0, -2.0, 0.0, 3.0], np.float32)
    penalise(scores, {0, 1, 2}, 2.0)
    assert scores.tolist() == [1.0, -4.0, 0.0, 3.0]


@given(SCORES, st.floats(0.01, 100))
@settings(max_examples=200, deadline=None)
def test_the_temperature_is_transformers(scores, temperature):
    found = distribution(Sampling(temperature=temperature, top_k=0, top_p=1.0), scores)
    expected = softmax(by_transformers(scores, TemperatureLogitsWarper(temperature)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


@given(arrays.arrays(np.float32, (3, 7), elements=st.floats(-1e5, 1e5, width=32)))
@settings(max_examples=50, deadline=None)
def test_softmax_and_its_logarithm_are_torchs(scores):
    reference = torch.from_numpy(scores).double()
    np.testing.assert_allclose(softmax(scores), torch.softmax(reference, -1).numpy(), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(log_softmax(scores), torch.log_softmax(reference, -1).numpy(), rtol=1e-9, atol=1e-9)


# The chain


@given(scores_of(st.integers(6, 40)), st.data())
@settings(max_examples=300, deadline=None)
def test_the_whole_chain_is_transformers_in_its_order(scores, data):
    temperature = data.draw(st.sampled_from([0.3, 0.95, 1.0, 4.0]))
    top_k = data.draw(st.sampled_from([1, 3, 10, 100]))
    top_p = data.draw(st.sampled_from([0.1, 0.5, 0.7, 0.99]))
    penalty = data.draw(st.sampled_from([0.8, 1.0, 1.3]))
    prompt = data.draw(st.lists(st.integers(0, len(scores) - 1), max_size=5))
    penalised = scores.copy()
    penalise(penalised, set(prompt), penalty)  # compared with transformers' own above, to the last bit but one
    left = by_transformers(penalised, TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k))
    last = by_transformers(left, TopPLogitsWarper(top_p))
    kept, probabilities = choices(Sampling(False, temperature, top_k, top_p, penalty), scores, prompt)
    expected = np.flatnonzero(np.isfinite(last))
    assert_same_top_p(kept, expected, left, top_p)
    if set(kept.tolist()) == set(expected.tolist()):
        np.testing.assert_allclose(probabilities, softmax(last)[kept], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_the_chain_is_what_generate_of_the_reference_samples_from(golden_checkpoint, golden, penalty):
    """transformers' own loop with its own order of processors, asked for its processed scores."""
    model = ChatGLMForConditionalGeneration.from_pretrained(golden_checkpoint, dtype=torch.float32)
    prompt = torch.from_numpy(golden["long.input_ids"])
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.8, repetition_penalty=penalty)
    torch.manual_seed(0)
    answer = model.generate(
        prompt,
        max_new_tokens=5,
        do_sample=True,
        temperature=0.8,
        top_k=40,
        top_p=0.8,
        repetition_penalty=penalty,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = answer.sequences[0].tolist()
    for step, (logits, scores) in enumerate(zip(answer.logits, answer.scores, strict=True)):
        found = distribution(sampling, logits[0].numpy(), whole[: prompt.shape[1] + step])
        np.testing.assert_allclose(found, softmax(scores[0].numpy()), atol=1e-6)
        assert 1 < np.count_nonzero(found) <= 40


def test_the_defaults_are_the_originals():
    sampling = Sampling()
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.95, 50, 0.7)
    assert (sampling.greedy, sampling.repetition_penalty, sampling.seed) == (False, 1.0, None)


def test_an_answers_own_tokens_are_penalised_too():
    logits = np.array([3.0, 2.9, 2.0, 0, 0, 0], np.float32)
    sampler = Sampler(Sampling(greedy=True, repetition_penalty=1.5), [], FORCED)
    assert [sampler.choose(logits) for _ in range(4)] == [0, 1, 0, 0]
    sampler = Sampler(Sampling(greedy=True, repetition_penalty=1.5), [0], FORCED)
    assert [sampler.choose(logits) for _ in range(2)] == [1, 0]


@given(SCORES)
@settings(max_examples=50, deadline=None)
def test_logits_are_left_as_they_are(scores):
    before = scores.copy()
    Sampler(Sampling(repetition_penalty=1.7, seed=1), range(len(scores)), 0).choose(scores)
    assert np.array_equal(scores, before)


# Logits that are not finite


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("options", [{"greedy": True}, {"temperature": 0.0}, {"temperature": 2.0, "top_p": 1.0}])
def test_one_logit_that_is_not_finite_forces_the_id(wrong, penalty, options):
    logits = np.arange(20, dtype=np.float32)
    for place in (0, FORCED, 7, 19):
        broken = logits.copy()
        broken[place] = wrong
        for prompt in ([], [FORCED, 19, 7]):
            sampler = Sampler(Sampling(repetition_penalty=penalty, **options), prompt, FORCED)
            assert [sampler.choose(broken) for _ in range(3)] == [FORCED] * 3
            assert Sampler(Sampling(greedy=True), prompt, FORCED).choose(logits) == 19


def test_a_score_that_the_penalty_makes_infinite_forces_the_id_too():
    """The original looks at the scores after the penalty."""
    logits = np.zeros(10, np.float32)
    logits[7] = -3e38
    with np.errstate(over="ignore"):
        assert Sampler(Sampling(greedy=True, repetition_penalty=1.3), [7], FORCED).choose(logits) == FORCED
    assert Sampler(Sampling(greedy=True), [7], FORCED).choose(logits) == 0


def test_scores_are_zeroed_and_one_is_forced_as_in_the_original():
    scores = np.array([1, np.nan, 3, 4], np.float32)
    force_finite(scores, 2)
    assert scores.tolist() == [0, 0, 5e4, 0]
    fine = np.array([1, 2, 3, 3e38], np.float32)
    force_finite(fine, 2)
    assert fine.tolist() == np.array([1, 2, 3, 3e38], np.float32).tolist()


# Chance


def draws(sampling, logits, count):
    sampler = Sampler(sampling, [], FORCED)
    return [sampler.choose(logits) for _ in range(count)]


LOGITS = np.random.default_rng(3).normal(0, 0.7, 30).astype(np.float32)


def test_a_seed_gives_the_same_tokens_and_another_one_others():
    first = draws(Sampling(seed=1), LOGITS, 40)
    assert draws(Sampling(seed=1), LOGITS, 40) == first
    assert draws(Sampling(seed=2), LOGITS, 40) != first
    assert draws(Sampling(seed=0), LOGITS, 40) != first


def test_without_a_seed_each_run_is_another():
    assert draws(Sampling(), LOGITS, 60) != draws(Sampling(), LOGITS, 60)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 0.6, "top_k": 8, "top_p": 1.0},
        {},
        {"temperature": 3.0, "top_k": 0, "top_p": 0.9},
    ],
)
def test_tokens_come_as_often_as_their_probability_says(options):
    count = 6000
    sampling = Sampling(seed=11, **options)
    values = {"temperature": 0.95, "top_k": 50, "top_p": 0.7} | options
    steps = [TemperatureLogitsWarper(values["temperature"])]
    steps += [TopKLogitsWarper(values["top_k"] or len(LOGITS))]
    steps += [TopPLogitsWarper(values["top_p"])]
    expected = count * softmax(by_transformers(LOGITS, *steps))
    found = np.bincount(draws(sampling, LOGITS, count), minlength=len(LOGITS))
    possible = expected > 0
    assert found[~possible].sum() == 0
    statistic = ((found - expected)[possible] ** 2 / expected[possible]).sum()
    free = int(possible.sum()) - 1
    assert free >= 3
    assert statistic < free + 4 * math.sqrt(2 * free), "chi square, four standard deviations"


def test_greedy_and_a_temperature_of_0_take_the_most_likely_and_no_chance():
    for sampling in (Sampling(greedy=True), Sampling(temperature=0), Sampling(temperature=-0.0), Sampling(True, 1e30)):
        assert sampling.is_greedy
        assert draws(sampling, LOGITS, 3) == [int(LOGITS.argmax())] * 3
    assert not Sampling().is_greedy


# Extremes


@pytest.mark.parametrize(
    ("options", "most_likely"),
    [
        ({"temperature": 1e-30}, True),
        ({"temperature": 5e-324}, True),
        ({"temperature": 1e30}, False),
        ({"temperature": 1e308, "top_k": 0, "top_p": 1.0}, False),
        ({"top_k": 10**9, "top_p": 1.0}, False),
        ({"top_k": 1}, True),
        ({"top_p": 1e-300, "top_k": 0}, True),
        ({"top_p": 1.0, "top_k": 0}, False),
    ],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e30])
def test_extremes_give_valid_tokens(options, most_likely, scale):
    logits = LOGITS * np.float32(scale)
    found = draws(Sampling(seed=4, **options), logits, 50)
    assert all(0 <= token < len(logits) for token in found)
    if most_likely:
        assert set(found) == {int(logits.argmax())}
    elif scale == 1e-3:
        assert len(set(found)) > 5


def test_a_flat_temperature_draws_from_all_that_top_k_leaves():
    found = draws(Sampling(temperature=1e30, top_k=7, top_p=1.0, seed=1), LOGITS, 300)
    assert set(found) == set(np.argsort(-LOGITS)[:7].tolist())


def test_a_vocabulary_of_one_token_gives_it():
    assert draws(Sampling(), np.zeros(1, np.float32), 3) == [0, 0, 0]


# Values that are none


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, ("temperature", "-0.1")),
        ({"temperature": math.nan}, ("temperature", "nan")),
        ({"temperature": math.inf}, ("temperature", "inf")),
        ({"top_k": -1}, ("top-k", "-1")),
        ({"top_p": 0.0}, ("top-p", "0.0")),
        ({"top_p": 1.0001}, ("top-p", "1.0001")),
        ({"top_p": math.nan}, ("top-p", "nan")),
        ({"repetition_penalty": 0.0}, ("repetition penalty", "0.0")),
        ({"repetition_penalty": -1.0}, ("repetition penalty", "-1.0")),
        ({"repetition_penalty": math.inf}, ("repetition penalty", "inf")),
        ({"repetition_penalty": math.nan}, ("repetition penalty", "nan")),
        ({"seed": -1}, ("seed", "-1")),
    ],
)
def test_a_value_that_is_none_gives_a_sentence(options, words):
    with pytest.raises(GlmExportError, match=r"^[^\n]*\.$") as caught:
        Sampling(**options)
    for word in words:
        assert word in str(caught.value)


# What servers add: min-p, subtracted penalties, a window, biases


@settings(max_examples=200)
@given(scores=scores_of(width=64), min_p=st.floats(0.001, 1.0))
def test_min_p_keeps_what_transformers_keeps(scores, min_p):
    kept = np.sort(min_p_of(scores, np.arange(len(scores)), min_p))
    theirs = by_transformers(scores, MinPLogitsWarper(min_p))
    ours = np.isin(np.arange(len(scores)), kept)
    borderline = np.isclose(scores, scores.max() + np.log(min_p), rtol=1e-9, atol=1e-9)
    assert ((ours == np.isfinite(theirs)) | borderline).all()
    assert scores.argmax() in kept or scores.max() in scores[kept]


def test_penalties_that_are_subtracted_count_the_answers_tokens():
    logits = np.zeros(4, np.float32)
    sampler = Sampler(Sampling(presence_penalty=0.5, frequency_penalty=0.25), [0, 0, 1], 3)
    sampler._random = recorder = Recorder()
    for token in (2, 2, 1):
        sampler.follow(token)
    sampler.choose(logits)
    expected = softmax(np.array([0, -0.75, -1.0, 0]) / 0.95)
    assert dict(zip(recorder.ids.tolist(), recorder.probabilities, strict=True)) == pytest.approx(
        {token: expected[token] / expected[recorder.ids].sum() for token in recorder.ids.tolist()}
    )


@pytest.mark.parametrize(
    ("window", "penalised"), [(None, {0, 1, 2}), (0, set()), (1, {2}), (2, {1, 2}), (99, {0, 1, 2})]
)
def test_a_window_of_the_latest_tokens(window, penalised):
    sampling = Sampling(greedy=True, repetition_penalty=4.0, repeat_last_n=window)
    found = set()
    for token in range(3):
        logits = np.full(4, 0.1, np.float32)
        logits[token], logits[3] = 2.0, 1.0
        sampler = Sampler(sampling, [0, 1], 3)
        sampler.follow(2)
        found |= {token} if sampler.choose(logits) == 3 else set()
    assert found == penalised


def test_a_bias_is_added_before_anything_else():
    logits = np.array([5, 0, 0], np.float32)
    assert Sampler(Sampling(greedy=True, logit_bias=((2, 6.0),)), [], 0).choose(logits) == 2
    assert not Sampling(greedy=True, logit_bias=((2, 6.0),)).is_argmax
    assert Sampling(greedy=True).is_argmax
    assert not Sampling(greedy=True, presence_penalty=0.1).is_argmax


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": -0.1},
        {"min_p": math.nan},
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.inf},
        {"repeat_last_n": -1},
        {"logit_bias": ((1, 101.0),)},
        {"logit_bias": ((1, math.nan),)},
    ],
)
def test_values_of_those_that_are_none_give_a_sentence(options):
    with pytest.raises(GlmExportError, match="found") as error:
        Sampling(**options)
    assert str(error.value).endswith(".")
