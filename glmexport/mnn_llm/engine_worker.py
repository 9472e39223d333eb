"""Run as a process of its own: loads a package with MNN's LLM engine, answers one request, and ends.

`python -m glmexport.mnn_llm.engine_worker REQUEST.json RESULT.npz`. Whatever MNN prints goes to this process's stdout.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What `engine.ask` sends and takes."""
    # `from MNN import llm` would give the C module of that name, which its wrapper hides afterwards
    model = importlib.import_module("MNN.llm").create(request["config"])
    model.set_config(request["settings"])
    if not model._c_obj.load():  # the wrapper's own `load` forgets what this says
        return {"loaded": np.array(False)}
    result: dict[str, Any] = {"loaded": np.array(True)}
    for number, ids in enumerate(request["prompts"]):
        model.reset()
        result[f"tokens{number}"] = np.array(model._c_obj.generate(ids, request["steps"]), np.int64)
        if request["logits"]:
            model.reset()
            steps = (ids, *([int(token)] for token in result[f"tokens{number}"][:-1]))
            result[f"logits{number}"] = np.stack([_logits(model, step) for step in steps])
    for number, text in enumerate(request["texts"]):
        result[f"ids{number}"] = np.array(model.tokenizer_encode(text), np.int64)
    for number, chat in enumerate(request["chats"]):
        prompt = model.apply_chat_template(chat)
        result[f"chat{number}"] = np.array(model.tokenizer_encode(prompt), np.int64)
        result[f"prompt{number}"] = np.array(prompt)
    return result


def _logits(model: Any, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Float32 [vocab] after the last of these tokens, which are fed to what the engine has so far."""
    return np.array(model._c_obj.forward(ids).read(), np.float32).reshape(-1)


if __name__ == "__main__":
    done = answer(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    with Path(sys.argv[2]).open("wb") as file:
        np.savez(file, **done)
