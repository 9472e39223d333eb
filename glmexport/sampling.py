"""From logits to the next token, in numpy.

The processors and their order are transformers' (repetition penalty, then temperature, top-k, top-p, min-p), with the
original's rule for logits that are not finite between them. Biases come first and the two penalties that are
subtracted right after the one that divides, as servers have them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport.errors import GlmExportError

Floats = npt.NDArray[np.floating[Any]]
FORCED_SCORE = 5e4
"""What the original gives the id that it forces; all others get 0."""
MAX_PENALTY = 2
MAX_BIAS = 100
"""Of subtracted penalties and of biases: as far as OpenAI's API goes."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults are the original's.

    greedy: the most likely token, whatever `temperature`, `top_k` and `top_p` say. temperature: scores are divided by
    it; 0 is greedy. top_k: sample among so many of the most likely tokens, 0 among all. top_p: sample among the most
    likely tokens that together have at least this probability. repetition_penalty: scores of tokens that prompt or
    answer hold already are divided by it (multiplied where negative); 1 changes nothing. seed: of the random numbers,
    None for others each time. min_p: sample among tokens that are at least so likely, the likeliest being 1.
    presence_penalty: subtracted from the scores of tokens that the answer holds; frequency_penalty: that times how
    often it does. repeat_last_n: the three penalties look at so many of the latest tokens instead, prompt and answer
    alike. logit_bias: (id, number) to add to the id's score.

    Raises GlmExportError for values that are none.
    """

    greedy: bool = False
    temperature: float = 0.95
    top_k: int = 50
    top_p: float = 0.7
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise GlmExportError(f"The temperature must be a number from 0 on, found {self.temperature}.")
        if self.top_k < 0:
            raise GlmExportError(f"top-k must be a whole number from 0 on (0: all tokens), found {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise GlmExportError(f"top-p must be above 0 and at most 1, found {self.top_p}.")
        if not 0 < self.repetition_penalty < np.inf:
            raise GlmExportError(f"The repetition penalty must be above 0, found {self.repetition_penalty}.")
        if self.seed is not None and self.seed < 0:
            raise GlmExportError(f"The seed must be a whole number from 0 on, found {self.seed}.")
        if not 0 <= self.min_p <= 1:
            raise GlmExportError(f"min-p must be from 0 to 1, found {self.min_p}.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= MAX_PENALTY:
                raise GlmExportError(
                    f"The {name.replace('_', ' ')} must be from -{MAX_PENALTY} to {MAX_PENALTY}, found "
                    f"{getattr(self, name)}."
                )
        if self.repeat_last_n is not None and self.repeat_last_n < 0:
            raise GlmExportError(f"repeat-last-n must be a whole number from 0 on, found {self.repeat_last_n}.")
        for token, bias in self.logit_bias:
            if not abs(bias) <= MAX_BIAS:
                raise GlmExportError(f"The bias of id {token} must be from -{MAX_BIAS} to {MAX_BIAS}, found {bias}.")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.greedy or self.temperature == 0

    @property
    def is_argmax(self) -> bool:
        """Whether the most likely token as the model gives it is taken, so that no other score is needed."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return self.is_greedy and not penalties and not self.logit_bias


class Sampler:
    """Chooses the tokens of one answer; has its own random numbers.

    prompt_ids: of the prompt, for the repetition penalty. forced: the id taken where a score is not finite.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], forced: int) -> None:
        self._sampling, self._forced = sampling, forced
        self._ids, self._prompt_length = list(prompt_ids), len(prompt_ids)
        self._seen = set(prompt_ids)
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token, from logits float32 [vocab], which are left as they are."""
        scores = logits.astype(np.float32)
        self._adjust(scores)
        force_finite(scores, self._forced)
        token = int(scores.argmax()) if self._sampling.is_greedy else self._sample(scores)
        self.follow(token)
        return token

    def follow(self, token: int) -> None:
        """Count a token as one of the answer's, whoever chose it."""
        self._seen.add(token)
        self._ids.append(token)

    def _adjust(self, scores: npt.NDArray[np.float32]) -> None:
        """Biases and penalties, in place."""
        sampling = self._sampling
        for token, bias in sampling.logit_bias:
            scores[token] += np.float32(bias)
        window = None
        if sampling.repeat_last_n is not None:
            window = self._ids[max(len(self._ids) - sampling.repeat_last_n, 0) :]
        penalise(scores, self._seen if window is None else set(window), sampling.repetition_penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            counted = self._ids[self._prompt_length :] if window is None else window
            subtract(scores, counted, sampling.presence_penalty, sampling.frequency_penalty)

    def _sample(self, scores: npt.NDArray[np.float32]) -> int:
        with np.errstate(over="ignore"):  # far below the highest at a temperature near 0: a probability of 0
            cooled = (scores.astype(np.float64) - scores.max()) / self._sampling.temperature
        ids = top_p_of(cooled, top_k_of(cooled, self._sampling.top_k), self._sampling.top_p)
        ids = min_p_of(cooled, ids, self._sampling.min_p)
        return int(self._random.choice(ids, p=softmax(cooled[ids])))


def penalise(scores: npt.NDArray[np.float32], seen: set[int], penalty: float) -> None:
    """Divide the scores of the ids in `seen` by `penalty` where positive, multiply where negative; in place, [vocab].

    Source: Keskar et al. 2019, CTRL, as transformers applies it.
    """
    if penalty == 1 or not seen:
        return
    ids = np.fromiter(seen, np.int64)
    theirs = scores[ids]
    scores[ids] = np.where(theirs < 0, theirs * np.float32(penalty), theirs / np.float32(penalty))


def subtract(scores: npt.NDArray[np.float32], ids: Iterable[int], presence: float, frequency: float) -> None:
    """Take `presence`, and `frequency` for each time it is there, from the score of each of `ids`; in place, [vocab].

    Source: the formula in OpenAI's documentation of the two parameters.
    """
    for token, count in Counter(ids).items():
        scores[token] -= np.float32(presence + frequency * count)


def force_finite(scores: npt.NDArray[np.float32], forced: int) -> None:
    """Where any score [vocab] is NaN or infinite, zero them all and force one id; in place.

    Source: `InvalidScoreLogitsProcessor` of the original modeling code, v1.1.0.
    """
    if not np.isfinite(scores).all():
        scores[:] = 0
        scores[forced] = FORCED_SCORE


def top_k_of(scores: Floats, top_k: int) -> npt.NDArray[np.int64]:
    """Ids of the `top_k` highest scores [vocab], with all that equal the lowest of them; all ids for 0."""
    if not 0 < top_k < len(scores):
        return np.arange(len(scores))
    lowest = np.partition(scores, -top_k)[-top_k]
    return np.flatnonzero(scores >= lowest)


def top_p_of(scores: Floats, ids: npt.NDArray[np.int64], top_p: float) -> npt.NDArray[np.int64]:
    """Those of `ids`, most likely first, that are needed to reach the probability `top_p` among them; at least one."""
    order = ids[np.argsort(-scores[ids], kind="stable")]
    if top_p == 1:
        return order
    before = np.cumsum(softmax(scores[order]))
    return order[: 1 + int(np.searchsorted(before[:-1], top_p))]


def min_p_of(scores: Floats, ids: npt.NDArray[np.int64], min_p: float) -> npt.NDArray[np.int64]:
    """Those of `ids` whose probability is at least `min_p` times the highest; the most likely one always."""
    if min_p == 0:
        return ids
    theirs = scores[ids]
    kept: npt.NDArray[np.int64] = ids[theirs >= theirs.max() + np.log(min_p)]
    return kept


def softmax(scores: Floats) -> npt.NDArray[np.float64]:
    """Probabilities of scores [..., n], in float64."""
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    result: npt.NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return result


def log_softmax(scores: Floats) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities of scores [..., n], in float64."""
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
