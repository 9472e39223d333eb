"""MNN's LLM engine, asked from outside: it prints to the C library's stdout, and a bad package can crash it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport.chat import Round
from glmexport.errors import ExportError
from glmexport.mnn.process import last_line, run_apart

Chat = tuple[str, Sequence[Round]]
"""A query, and the rounds before it."""

_SECONDS = 3600
_WORKER = "glmexport.mnn_llm.engine_worker"


@dataclass(frozen=True)
class Answers:
    """What the engine gave: for each prompt its tokens, and the logits [tokens, vocab] that they were chosen from.

    ids: of each text. chats: the prompt's text and its ids, of each chat.
    """

    tokens: tuple[list[int], ...]
    logits: tuple[npt.NDArray[np.float32], ...]
    ids: tuple[list[int], ...]
    chats: tuple[tuple[str, list[int]], ...]


def ask(
    package: Path,
    prompts: Sequence[Sequence[int]] = (),
    steps: int = 0,
    *,
    logits: bool = False,
    texts: Sequence[str] = (),
    chats: Sequence[Chat] = (),
    settings: Mapping[str, Any] | None = None,
) -> Answers:
    """Load a package and have it continue `prompts` greedily, tokenize `texts` and write the prompts of `chats`.

    settings: in the place of the package's own. Raises ExportError where the engine does not load it or crashes.
    """
    request = {
        "config": str(package / "config.json"),
        "settings": {"sampler_type": "greedy", "thread_num": 2, **(settings or {})},
        "prompts": [[int(token) for token in prompt] for prompt in prompts],
        "steps": steps,
        "logits": logits,
        "texts": list(texts),
        "chats": [_messages(chat) for chat in chats],
    }
    with tempfile.TemporaryDirectory(prefix="glmexport-mnn-") as directory:
        place = Path(directory)
        source, target, said, errors = (place / name for name in ("request.json", "result.npz", "said", "errors"))
        source.write_text(json.dumps(request), "utf-8")
        wrong = run_apart(["-m", _WORKER, str(source), str(target)], place, said, errors, timeout=_SECONDS)
        if wrong or not target.is_file():
            wrong = wrong or "it gave no answer"
            raise ExportError(f"MNN's engine failed on the package: {wrong} ({last_line(errors, said)}).")
        with np.load(target) as result:
            if not result["loaded"]:
                lines = said.read_text("utf-8", errors="replace").splitlines()
                reasons = [line for line in lines if "rror" in line or "ailed" in line] or ["no reason given"]
                raise ExportError(f"MNN's engine did not load the package ({reasons[-1]:.200}).")
            return Answers(
                tuple(result[f"tokens{i}"].tolist() for i in range(len(prompts))),
                tuple(result[f"logits{i}"] for i in range(len(prompts) if logits else 0)),
                tuple(result[f"ids{i}"].tolist() for i in range(len(texts))),
                tuple((str(result[f"prompt{i}"]), result[f"chat{i}"].tolist()) for i in range(len(chats))),
            )


def _messages(chat: Chat) -> list[dict[str, str]]:
    query, history = chat
    messages = []
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": query}]
