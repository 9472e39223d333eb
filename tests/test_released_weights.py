"""The released weights, for whoever has them: GLMEXPORT_CHATGLM_6B=DIR pytest -m weights --basetemp /data/tmp

Writes some 25 GB below the base directory and takes minutes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import glmexport
from glmexport.chat import polish

CHECKPOINT = os.environ.get("GLMEXPORT_CHATGLM_6B")
GREETING = "你好👋！我是人工智能助手 ChatGLM-6B，很高兴见到你，欢迎问我任何问题。"
"""What ChatGLM-6B answers, greedily, to 你好; shown in its repository's README."""


@pytest.mark.weights
@pytest.mark.skipif(CHECKPOINT is None, reason="GLMEXPORT_CHATGLM_6B names no checkpoint directory")
def test_chatglm_6b_greets(tmp_path: Path):
    bundle = glmexport.split(str(CHECKPOINT), tmp_path / "bundle", slim=True, embedding="bf16")
    with glmexport.Session(bundle, memory_limit=8_000_000_000) as session:
        answer = glmexport.generate(session, "你好", greedy=True, max_tokens=64)
        assert polish(answer.text) == GREETING
