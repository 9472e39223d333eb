"""`config.json` and `llm_config.json`: what the engine is told of the package, and how it is to run it."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from glmexport.config import ModelConfig
from glmexport.mnn_llm.chat_template import chat_template

GRAPH_FILE, WEIGHT_FILE = "llm.mnn", "llm.mnn.weight"
CONFIG_FILE, MODEL_CONFIG_FILE = "config.json", "llm_config.json"
TOKENIZER_FILE = "tokenizer.mtok"
EMBEDDING_FILES = {"bfloat16": "embeddings_bf16.bin", "float16": "embeddings_float16.bin"}


def config_files(config: ModelConfig, embedding: str, bits: Collection[int], tokenizer: str) -> dict[str, bytes]:
    """Name -> content of both files.

    embedding: dtype of the embedding file. bits: of the matrices. tokenizer: name of its file.
    """
    quantized, floats = not {4, 8}.isdisjoint(bits), not {4, 8}.issuperset(bits)
    run: dict[str, Any] = {
        "llm_model": GRAPH_FILE,
        "llm_weight": WEIGHT_FILE,
        "backend_type": "cpu",
        "thread_num": 4,
        # weights that were not rounded are not to be rounded by the engine either
        "precision": "low" if quantized else "high",
        "memory": "low",
        "max_new_tokens": min(512, config.max_positions),
        # prompts see all of themselves, so what was computed for a shorter one is worth nothing for a longer one
        "reuse_kv": False,
        "prompt_cache": False,
        # greedy, so that answers can be compared; `mixed` samples as the original does by default
        "sampler_type": "greedy",
        "mixed_samplers": ["topK", "topP", "temperature"],
        "temperature": 0.95,
        "topK": 50,
        "topP": 0.7,
    }
    if floats:  # with the apps' use_mmap, MNN 3.6.1 reads them wrongly from its cache when it loads a second time
        run["use_cached_mmap"] = False
    model: dict[str, Any] = {
        "model_type": "chatglm",
        "hidden_size": config.hidden_size,
        "layer_nums": config.num_blocks,
        "key_value_shape": [2, 1, 0, config.num_heads, config.head_dim],
        "attention_mask": "glm",
        "attention_type": "full",
        "is_visual": False,
        "tokenizer_file": tokenizer,
        "embedding_file": EMBEDDING_FILES[embedding],
        "jinja": {"chat_template": chat_template(), "eos": "<eop>"},
    }
    if embedding == "float16":
        model["tie_embeddings"] = [0, 0, 0, 16, 0]  # not tied: the engine's way to say that the file is float16
    return {CONFIG_FILE: _json(run), MODEL_CONFIG_FILE: _json(model)}


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()
