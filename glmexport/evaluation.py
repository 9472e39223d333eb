"""How well a bundle answers: exact answers, perplexity, and how far it is from another bundle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport import names
from glmexport.chat import Round, chat_prompt
from glmexport.errors import GlmExportError
from glmexport.generation import Decoder, check_length
from glmexport.prompt import prepare_prompt
from glmexport.sampling import Sampler, Sampling, log_softmax
from glmexport.session import Session
from glmexport.vocabulary import VocabularyMap

Array = npt.NDArray[Any]
Advance = Callable[[str, int], None]

HEAD_ROWS = 64
"""Places whose logits are in memory at once; 64 of 130528 are 33 MB in float32."""

MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that is expected. line: where it stands in its file."""

    prompt: str
    answer: str
    line: int = 0


@dataclass(frozen=True)
class Score:
    """What evaluating gave.

    exact: answers that were generated, greedily, word for word, of `count`. tokens: of all answers, end tokens among
    them. perplexity: of these tokens, None where the LM head gives no logits. divergence: mean Kullback-Leibler
    divergence in nats from the baseline's next-token probabilities to these, None without a baseline.
    answers: what was generated, in the order of the examples.
    """

    count: int
    exact: int
    tokens: int
    perplexity: float | None
    divergence: float | None
    answers: tuple[str, ...]

    @property
    def exact_share(self) -> float:
        """Exact answers as a share of all."""
        return self.exact / self.count


def read_examples(path: Path) -> list[Example]:
    """Examples of a file with one JSON object a line: `prompt`, `answer` and, if any, `history` ([[query, answer], …]).

    A history makes the prompt of the chat format. Raises GlmExportError, which names the line, for anything else.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise GlmExportError(f"{path} has more than {MAX_FILE_BYTES} bytes; give it in parts.")
        lines = path.read_text("utf-8-sig").split("\n")  # no other character ends a line of JSON
    except OSError as error:
        raise GlmExportError(f"{path} cannot be read ({error.strerror}); give a file of JSON lines.") from error
    except UnicodeDecodeError as error:
        raise GlmExportError(f"{path} is not UTF-8 text; convert it.") from error
    examples = [_example(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise GlmExportError(f"{path} holds no examples; expected one JSON object a line.")
    return examples


def evaluate(
    session: Session,
    examples: Sequence[Example],
    *,
    batch: int,
    baseline: Session | None = None,
    advance: Advance = lambda what, step: None,
) -> Score:
    """Answer every example greedily and measure the probabilities of the expected answers.

    batch: examples computed side by side. baseline: another bundle of the model to measure the divergence from; its
    vocabulary must hold this one's. advance: takes (what was done, examples), `2 * len(examples)` in all.
    Raises GlmExportError for prompts that are too long and for vocabularies that do not fit.
    """
    work = [_Work(session, example) for example in examples]
    order = sorted(range(len(work)), key=lambda i: len(work[i].row))  # rows of a batch are padded to one length
    batches = [[work[i] for i in order[start : start + batch]] for start in range(0, len(order), batch)]
    for rows in batches:
        _answer(session, rows)
        advance("answers", len(rows))
    logs, divergences = [], []
    translate = None if baseline is None else _Translation(session, baseline)
    for rows in batches:
        for ours, expected, theirs in _probabilities(session, rows, baseline, translate):
            logs.append(ours[np.arange(len(expected)), expected])
            if theirs is not None:
                divergences.append(_divergence(theirs, ours))
        advance("probabilities", len(rows))
    log = np.concatenate(logs) if logs else None
    return Score(
        count=len(work),
        exact=sum(item.is_exact for item in work),
        tokens=sum(len(item.answer_ids) for item in work),
        perplexity=None if log is None else _exp(-log.mean()),
        divergence=float(np.concatenate(divergences).mean()) if divergences else None,
        answers=tuple(item.answer for item in work),
    )


class _Work:
    """An example in ids. row: the prompt's. answer_ids: the expected answer's and the end token.

    limit: tokens that are generated at most; an exact answer has fewer. answer: what was generated; ended: whether it
    came to its end.
    """

    def __init__(self, session: Session, example: Example) -> None:
        self.example, self.answer, self.ended = example, "", False
        try:
            self.row = session.tokenizer.prompt_ids(example.prompt)
            self.answer_ids = [*session.tokenizer.encode(example.answer), session.config.special_ids.eos]
            check_length(session, len(self.row) + len(self.answer_ids) - 1)
        except GlmExportError as error:
            raise GlmExportError(f"Line {example.line}, prompt and answer together: {error}") from error
        self.limit = min(check_length(session, len(self.row)), 2 * len(self.answer_ids) + 8)

    @property
    def is_exact(self) -> bool:
        """Whether the answer is the expected one, but for white space around it."""
        return self.ended and self.answer.strip() == self.example.answer.strip()


def _answer(session: Session, rows: list[_Work]) -> None:
    """Generate greedily until every row has ended, or is longer than any exact answer would be."""
    ids = session.config.special_ids
    decoder = Decoder(session, [item.row for item in rows])
    samplers = [Sampler(Sampling(greedy=True), item.row, ids.forced) for item in rows]
    found: list[list[int]] = [[] for _ in rows]
    outputs = decoder.prefill()
    while True:
        if names.LOGITS in outputs:
            tokens = [sampler.choose(logits) for sampler, logits in zip(samplers, outputs[names.LOGITS], strict=True)]
        else:
            tokens = outputs[names.TOKEN_ID].tolist()
        for item, answer, token in zip(rows, found, tokens, strict=True):
            if not item.ended and len(answer) < item.limit:
                answer.append(token)
                item.ended = token == ids.eos
        if all(item.ended or len(answer) == item.limit for item, answer in zip(rows, found, strict=True)):
            break
        outputs = decoder.step(tokens)
    for item, answer in zip(rows, found, strict=True):
        item.answer = session.tokenizer.decode(answer[:-1] if item.ended else answer)


def _probabilities(
    session: Session, rows: list[_Work], baseline: Session | None, translate: _Translation | None
) -> Iterator[tuple[Array, Array, Array | None]]:
    """(log-probabilities [n, vocab], ids expected there [n], the baseline's log-probabilities or None), in parts."""
    if session.bundle.argmax == "only":
        return
    whole = [item.row + item.answer_ids[:-1] for item in rows]
    hidden = _hidden_at_answers(session, whole, rows)
    expected = np.concatenate([item.answer_ids for item in rows])
    theirs = None
    if baseline is not None and translate is not None:
        theirs = _hidden_at_answers(baseline, [translate.ids(row) for row in whole], rows)
    for start in range(0, len(expected), HEAD_ROWS):
        part = slice(start, start + HEAD_ROWS)
        ours = session.head(hidden[None, part])[names.LOGITS]
        other = None
        if theirs is not None and baseline is not None and translate is not None:
            other = log_softmax(translate.logits(baseline.head(theirs[None, part])[names.LOGITS]))
        yield log_softmax(ours), expected[part], other


def _hidden_at_answers(session: Session, whole: list[list[int]], rows: list[_Work]) -> Array:
    """Hidden states [n, hidden] of the places that the tokens of the answers follow, row after row."""
    prompt = prepare_prompt(whole, session.config.special_ids)
    pasts = session.empty_pasts(len(whole))
    hidden = session.forward(prompt.input_ids, prompt.attention_mask, prompt.position_ids, pasts)
    return np.concatenate([hidden[-len(item.answer_ids) :, i] for i, item in enumerate(rows)])


def _divergence(theirs: Array, ours: Array) -> Array:
    """Kullback-Leibler divergence in nats of each row: from the baseline's log-probabilities to ours, [n, vocab]."""
    probabilities = np.exp(theirs)
    with np.errstate(invalid="ignore"):  # a probability of 0 adds nothing, whatever its logarithm
        terms = np.where(probabilities == 0, 0, probabilities * (theirs - ours))
    result: Array = terms.sum(axis=-1)
    return result


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


class _Translation:
    """Ids of a bundle in the numbering of a baseline whose vocabulary holds its own."""

    def __init__(self, session: Session, baseline: Session) -> None:
        ours, theirs = _vocabulary(session), _vocabulary(baseline)
        fits = ours.full_size == theirs.full_size and baseline.bundle.argmax != "only"
        self._theirs = theirs.to_new(ours.old_ids()) if fits else np.array([-1])
        if (self._theirs < 0).any():
            raise GlmExportError(
                f"{session.bundle.directory} cannot be compared with {baseline.bundle.directory}: that one must hold "
                "every token of this one and give logits; name the full vocabulary first."
            )
        self._all = len(self._theirs) == baseline.config.vocab_size

    def ids(self, ids: list[int]) -> list[int]:
        """The baseline's ids for the bundle's."""
        translated: list[int] = self._theirs[ids].tolist()
        return translated

    def logits(self, logits: Array) -> Array:
        """The baseline's logits [n, its vocab] of the bundle's tokens [n, vocab]."""
        return logits if self._all else logits[:, self._theirs]


def _vocabulary(session: Session) -> VocabularyMap:
    slim = session.bundle.form.slim
    return slim.vocabulary if slim else VocabularyMap.identity(session.config.vocab_size)


def _example(path: Path, number: int, line: str) -> Example:
    expected = f"{path}, line {number} is no example; expected a JSON object with the texts `prompt` and `answer`"
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GlmExportError(f"{expected}, found no JSON.") from error
    if not isinstance(document, dict) or not all(isinstance(document.get(key), str) for key in ("prompt", "answer")):
        raise GlmExportError(f"{expected}.")
    history = document.get("history") or []
    if not isinstance(history, list) or not all(_is_round(entry) for entry in history):
        raise GlmExportError(f"{expected}, and a `history` of pairs [query, answer] if it has any.")
    rounds: list[Round] = [(query, answer) for query, answer in history]
    return Example(chat_prompt(document["prompt"], rounds), document["answer"], number)


def _is_round(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry)
