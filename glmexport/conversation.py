"""A chat: rounds of query and answer, each answer polished as it streams, kept for the next prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Sequence
from pathlib import Path

from glmexport.chat import PolishedStream, Round, chat_prompt
from glmexport.errors import GlmExportError
from glmexport.generation import Generation, generate
from glmexport.sampling import Sampling
from glmexport.session import Session

MAX_FILE_BYTES = 64 << 20


class Conversation:
    """The rounds so far and what continues them.

    history: rounds to begin with. system: what holds for all of them (`chat.chat_prompt`). latest: the
    last answer's generation, for its ids, statistics and reason of ending.
    """

    def __init__(
        self,
        session: Session,
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        history: Sequence[Round] = (),
        system: str = "",
    ) -> None:
        self.history: list[Round] = [*history]
        self.system = system
        self.latest: Generation | None = None
        self._session, self._sampling = session, sampling or Sampling()
        self._max_tokens, self._stop = max_tokens, stop

    def ask(self, query: str) -> Generator[str]:
        """Pieces of the answer's text; the round enters the history when they end, also where one stops early.

        Raises GlmExportError, before anything is computed, where history and query leave no room for an answer.
        """
        sampling = self._sampling
        if sampling.seed is not None:  # the same numbers in every round would be no chance at all
            sampling = dataclasses.replace(sampling, seed=sampling.seed + len(self.history))
        prompt = chat_prompt(query, self.history, self.system)
        try:
            self.latest = generate(
                self._session, prompt, sampling=sampling, max_tokens=self._max_tokens, stop=self._stop
            )
        except GlmExportError as error:
            if not self.history:
                raise
            raise GlmExportError(
                f"With the history of {len(self.history)} rounds: {error} /reset forgets it."
            ) from error
        return self._stream(query, self.latest)

    def _stream(self, query: str, generation: Generation) -> Generator[str]:
        polished, shown = PolishedStream(), ""
        try:
            for text in generation:
                piece = polished.push(text)
                if piece:
                    shown += piece
                    yield piece
            rest = polished.finish()
            if rest:
                shown += rest
                yield rest
        finally:
            if shown or generation.finish_reason:
                self.history.append((query, shown))

    def save(self, path: Path) -> None:
        """Write the rounds as JSON, a list of objects with `query` and `answer`. Raises GlmExportError."""
        rounds = [{"query": query, "answer": answer} for query, answer in self.history]
        try:
            path.write_text(json.dumps(rounds, ensure_ascii=False, indent=1) + "\n", "utf-8")
        except OSError as error:
            raise GlmExportError(f"{path} could not be written ({error.strerror}); choose another file.") from error


def read_history(path: Path) -> list[Round]:
    """The rounds that `Conversation.save` wrote. Raises GlmExportError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise GlmExportError(f"{path} has more than {MAX_FILE_BYTES} bytes; it is no saved chat.")
        document = json.loads(path.read_text("utf-8-sig"))
        rounds = [(entry["query"], entry["answer"]) for entry in document]
        json.dumps(rounds, ensure_ascii=False).encode()  # a lone surrogate is no text
    except OSError as error:
        raise GlmExportError(f"{path} cannot be read ({error.strerror}); give a saved chat.") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise GlmExportError(f"{path} is no saved chat; expected what /save writes.") from error
    if not isinstance(document, list) or not all(isinstance(text, str) for entry in rounds for text in entry):
        raise GlmExportError(f"{path} is no saved chat; expected what /save writes.")
    return rounds
