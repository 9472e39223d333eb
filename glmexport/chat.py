"""The chat format of ChatGLM-6B: prompts with history, and what the original makes of an answer's text.

Source: `chat`, `stream_chat` and `process_response` of the original modeling code, v1.1.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Round = tuple[str, str]
"""One query and its answer."""

TRAINING_TIME, TRAINED_IN = "[[训练时间]]", "2023年"
_FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")
_BESIDE_CHINESE = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
_UNDECIDED = ",!:;?"
_BEGINNINGS = tuple(TRAINING_TIME[:end] for end in range(len(TRAINING_TIME) - 1, 0, -1))


def chat_prompt(query: str, history: Sequence[Round] = (), system: str = "") -> str:
    """The prompt's text: the query itself, or with a history every round with its number and the query as the last.

    system: what holds for all of the chat. The model knows no such role; it stands in front of the first query.
    """
    if system and history:
        history = [(f"{system}\n{history[0][0]}", history[0][1]), *history[1:]]
    elif system:
        query = f"{system}\n{query}"
    if not history:
        return query
    rounds = "".join(f"[Round {number}]\n问：{asked}\n答：{answer}\n" for number, (asked, answer) in enumerate(history))
    return f"{rounds}[Round {len(history)}]\n问：{query}\n答："


def polish(answer: str) -> str:
    """An answer as the original shows it and as it enters the history.

    Stripped; `[[训练时间]]` becomes the year; ASCII `, ! : ; ?` beside a Chinese character become full-width.
    """
    dated = answer.strip().replace(TRAINING_TIME, TRAINED_IN)
    return _BESIDE_CHINESE.sub(lambda match: match.group().translate(_FULL_WIDTH), dated)


class PolishedStream:
    """`polish` of an answer that comes in pieces: what `push` and `finish` give, joined, is `polish` of all of it.

    Held back is what later text can change: white space that may be the last, punctuation that a Chinese character may
    follow, and the beginning of `[[训练时间]]`.
    """

    def __init__(self) -> None:
        self._held = ""
        self._before = ""  # the last character given out, which decides on punctuation after it

    def push(self, text: str) -> str:
        """The text that is certain from here on."""
        self._held += text
        if not self._before:
            self._held = self._held.lstrip()
        self._held = self._held.replace(TRAINING_TIME, TRAINED_IN)
        end = len(self._held)
        beginning = next((start for start in _BEGINNINGS if self._held.endswith(start)), "")
        end -= len(beginning)
        while end and (self._held[end - 1] in _UNDECIDED or self._held[end - 1].isspace()):
            end -= 1
        return self._give(end)

    def finish(self) -> str:
        """What was held back; nothing may be pushed after it."""
        self._held = self._held.rstrip()
        return self._give(len(self._held))

    def _give(self, end: int) -> str:
        """Polish and give out the first characters of what is held; the one after them may decide on the last."""
        marked = self._before + self._held
        shown = _BESIDE_CHINESE.sub(lambda match: match.group().translate(_FULL_WIDTH), marked)
        shown = shown[len(self._before) : len(self._before) + end]
        self._before = shown[-1:] or self._before
        self._held = self._held[end:]
        return shown
