"""Every name that other programs rely on: graphs, files, inputs, outputs and dynamic axes."""

from __future__ import annotations

import re
from pathlib import PurePath

MANIFEST = "manifest.json"
RECIPE = "recipe.toml"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_MODEL = "ice_text.model"

# what a bundle is for
ONNX = "onnx"
MNN = "mnn"
RUNTIMES = (ONNX, MNN)

# flavors of the ONNX graphs: for any runtime, with a KV cache that grows; for onnxruntime, with one written in place
PORTABLE = "portable"
ORT = "ort"
FLAVORS = (PORTABLE, ORT)

# graphs
EMBEDDING = "embedding"
HEAD = "lm"
BLOCK_PREFIX = "glm_block_"

# kinds of graph: all graphs of a kind share one traced skeleton
KIND_EMBEDDING = "embedding"
KIND_BLOCK = "block"
KIND_HEAD = "lm_head"

# inputs and outputs
INPUT_IDS = "input_ids"
INPUTS_EMBEDS = "inputs_embeds"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
PAST = "past_key_values"
HIDDEN_STATES = "hidden_states"
PRESENTS = "presents"
LOGITS = "logits"
TOKEN_ID = "token_id"
KEY_CACHE = "key_cache"
VALUE_CACHE = "value_cache"
WRITE_INDICES = "write_indices"
KEY_CACHE_OUT = "key_cache_out"
VALUE_CACHE_OUT = "value_cache_out"

# dynamic axes
BATCH = "batch"
SEQ = "seq"
PAST_LENGTH = "past"
TOTAL = "total"
CAPACITY = "capacity"


def block_name(block_id: int) -> str:
    """Graph name of one block: `glm_block_<i>`."""
    return f"{BLOCK_PREFIX}{block_id}"


def graph_names(num_blocks: int, embedding: bool = True) -> tuple[str, ...]:
    """Names of all graphs in the order in which data flows through them; an embedding may be no graph."""
    return (*((EMBEDDING,) if embedding else ()), *(block_name(i) for i in range(num_blocks)), HEAD)


def graph_kind(graph: str) -> str:
    """Kind of the graph of that name: embedding, block or LM head."""
    return {EMBEDDING: KIND_EMBEDDING, HEAD: KIND_HEAD}.get(graph, KIND_BLOCK)


def graph_file(graph: str, runtime: str = ONNX) -> str:
    """File name of a graph: `<graph>.onnx`, or `<graph>.mnn`."""
    return f"{graph}.{runtime}"


def data_file(graph: str, runtime: str = ONNX) -> str:
    """File name of what a graph has beside it: `<graph>.onnx.data`, or `<graph>.mnn.weight`, as MNN looks for it."""
    return f"{graph}.{runtime}.{'data' if runtime == ONNX else 'weight'}"


def in_flavor(file: str, flavor: str) -> str:
    """Where a file of that flavor lies in a bundle: portable graphs at its top, others in a folder of their name."""
    return file if flavor == PORTABLE else f"{flavor}/{file}"


def shown(path: PurePath) -> str:
    """A file of a bundle as its manifest names it, for messages."""
    return in_flavor(path.name, ORT if path.parent.name == ORT else PORTABLE)


def block_id_of(graph: str) -> int | None:
    """The block id in a graph's name, None where it is no block."""
    match = re.fullmatch(rf"{BLOCK_PREFIX}(\d+)", graph)
    return int(match.group(1)) if match else None
