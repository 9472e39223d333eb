"""From logits to the next token, in numpy.

The processors and their order are transformers' (repetition penalty, then temperature, top-k, top-p), with the
original's rule for logits that are not finite between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport.errors import GlmExportError

Floats = npt.NDArray[np.floating[Any]]
FORCED_SCORE = 5e4
"""What the original gives the id that it forces; all others get 0."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults are the original's.

    greedy: the most likely token, whatever `temperature`, `top_k` and `top_p` say. temperature: scores are divided by
    it; 0 is greedy. top_k: sample among so many of the most likely tokens, 0 among all. top_p: sample among the most
    likely tokens that together have at least this probability. repetition_penalty: scores of tokens that prompt or
    answer hold already are divided by it (multiplied where negative); 1 changes nothing. seed: of the random numbers,
    None for others each time.

    Raises GlmExportError for values that are none.
    """

    greedy: bool = False
    temperature: float = 0.95
    top_k: int = 50
    top_p: float = 0.7
    repetition_penalty: float = 1.0
    seed: int | None = None

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

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.greedy or self.temperature == 0


class Sampler:
    """Chooses the tokens of one answer; has its own random numbers.

    prompt_ids: of the prompt, for the repetition penalty. forced: the id taken where a score is not finite.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], forced: int) -> None:
        self._sampling, self._forced = sampling, forced
        self._seen = set(prompt_ids)
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token, from logits float32 [vocab], which are left as they are."""
        scores = logits.astype(np.float32)
        penalise(scores, self._seen, self._sampling.repetition_penalty)
        force_finite(scores, self._forced)
        token = int(scores.argmax()) if self._sampling.is_greedy else self._sample(scores)
        self._seen.add(token)
        return token

    def _sample(self, scores: npt.NDArray[np.float32]) -> int:
        with np.errstate(over="ignore"):  # far below the highest at a temperature near 0: a probability of 0
            cooled = (scores.astype(np.float64) - scores.max()) / self._sampling.temperature
        ids = top_p_of(cooled, top_k_of(cooled, self._sampling.top_k), self._sampling.top_p)
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
