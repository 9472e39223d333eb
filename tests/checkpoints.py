"""Tiny seeded checkpoints in every format that a user can have, built in code.

`write_checkpoint` writes a directory and `make_tensors` gives the tensors it writes, for comparison;
`fill_hub_cache` lets the hub library find a checkpoint offline.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent.parent / "examples" / "chatglm-6b-tiny"
FORMATS = ("bin", "bin-sharded", "safetensors", "safetensors-sharded")
GOLDEN_PIECES = 1500  # text pieces before [MASK] in the golden SentencePiece model
HUB_REPO = "zai-org/chatglm-6b"
HUB_COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOLDEN_ROWS = 1856  # what that model needs, with the padding of the golden checkpoint


def make_tensors(
    *,
    vocab_size: int,
    hidden_size: int = 32,
    num_blocks: int = 2,
    heads: int = 2,
    inner: int = 64,
    tied: bool = False,
    with_head: bool = True,
    with_inv_freq: bool = True,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Every tensor of a ChatGLM-6B of these sizes, named and shaped as in the original checkpoint.

    Norm weights are near 1 and the rest is small, so that a forward pass stays finite in float16.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int, mean: float = 0.0, scale: float = 0.05) -> None:
        tensors[name] = (mean + scale * torch.randn(shape, generator=generator)).to(dtype)

    add("transformer.word_embeddings.weight", vocab_size, hidden_size, scale=0.5)
    for block in range(num_blocks):
        prefix = f"transformer.layers.{block}"
        add(f"{prefix}.input_layernorm.weight", hidden_size, mean=1.0)
        add(f"{prefix}.input_layernorm.bias", hidden_size)
        if with_inv_freq:
            quarter = hidden_size // heads // 4
            exponents = torch.arange(quarter, dtype=torch.float32) / quarter
            tensors[f"{prefix}.attention.rotary_emb.inv_freq"] = (10000.0**-exponents).half()
        add(f"{prefix}.attention.query_key_value.weight", 3 * hidden_size, hidden_size)
        add(f"{prefix}.attention.query_key_value.bias", 3 * hidden_size)
        add(f"{prefix}.attention.dense.weight", hidden_size, hidden_size)
        add(f"{prefix}.attention.dense.bias", hidden_size)
        add(f"{prefix}.post_attention_layernorm.weight", hidden_size, mean=1.0)
        add(f"{prefix}.post_attention_layernorm.bias", hidden_size)
        add(f"{prefix}.mlp.dense_h_to_4h.weight", inner, hidden_size)
        add(f"{prefix}.mlp.dense_h_to_4h.bias", inner)
        add(f"{prefix}.mlp.dense_4h_to_h.weight", hidden_size, inner)
        add(f"{prefix}.mlp.dense_4h_to_h.bias", hidden_size)
    add("transformer.final_layernorm.weight", hidden_size, mean=1.0)
    add("transformer.final_layernorm.bias", hidden_size)
    if tied and with_head:
        tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    elif with_head:
        add("lm_head.weight", vocab_size, hidden_size, scale=0.5)
    return tensors


def make_config(
    *,
    vocab_size: int,
    hidden_size: int = 32,
    num_blocks: int = 2,
    heads: int = 2,
    inner: int = 64,
    image_tokens: int = 0,
    tokenizer: bool = False,
    first_revision: bool = False,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Any]:
    """The matching `config.json`: special ids from the golden tokenizer, or the last 8 rows where there is none."""
    first_special = GOLDEN_PIECES + image_tokens if tokenizer else vocab_size - 8
    config: dict[str, Any] = {
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
        "model_type": "chatglm",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": num_blocks,
        "num_attention_heads": heads,
        "inner_hidden_size": inner,
        "max_sequence_length": 2048,
        "layernorm_epsilon": 1e-05,
        "position_encoding_2d": True,
        "use_cache": True,
        "bos_token_id": first_special + 4,
        "eos_token_id": first_special + 5,
    }
    if not first_revision:
        config |= {"mask_token_id": first_special, "gmask_token_id": first_special + 1, "pad_token_id": 3}
    return config


def write_checkpoint(
    directory: Path,
    *,
    fmt: str = "bin",
    vocab_size: int | None = None,
    hidden_size: int = 32,
    num_blocks: int = 2,
    heads: int = 2,
    inner: int = 64,
    image_tokens: int = 0,
    tied: bool = False,
    with_head: bool = True,
    with_inv_freq: bool = True,
    dtype: torch.dtype = torch.float16,
    tokenizer: bool = True,
    first_revision: bool = False,
    shards: int = 3,
    seed: int = 0,
) -> Path:
    """Write a checkpoint and return its directory, which is made if need be.

    vocab_size: rows of the embedding; by default what the golden tokenizer needs plus `image_tokens`, else 128.
    first_revision: the config has only the bos and eos ids, as in March 2023; give `image_tokens` as well.
    """
    if vocab_size is None:
        vocab_size = GOLDEN_ROWS + image_tokens if tokenizer else 128
    sizes: dict[str, int] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_blocks": num_blocks,
        "heads": heads,
        "inner": inner,
    }
    directory.mkdir(parents=True, exist_ok=True)
    config = make_config(
        **sizes, image_tokens=image_tokens, tokenizer=tokenizer, first_revision=first_revision, dtype=dtype
    )
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if tokenizer:
        copy_tokenizer(directory, image_tokens)
    tensors = make_tensors(**sizes, tied=tied, with_head=with_head, with_inv_freq=with_inv_freq, dtype=dtype, seed=seed)
    write_weights(directory, tensors, fmt, shards)
    return directory


def copy_tokenizer(directory: Path, image_tokens: int = 0) -> None:
    """Put the golden tokenizer files into `directory`, with that many image tokens."""
    shutil.copyfile(GOLDEN / "ice_text.model", directory / "ice_text.model")
    facts = json.loads((GOLDEN / "tokenizer_config.json").read_text(encoding="utf-8"))
    facts["num_image_tokens"] = image_tokens
    (directory / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")


def write_weights(directory: Path, tensors: Mapping[str, torch.Tensor], fmt: str, shards: int = 3) -> None:
    """Write the tensors in one of FORMATS; the sharded ones deal them out in turn."""
    stem, suffix = ("pytorch_model", ".bin") if fmt.startswith("bin") else ("model", ".safetensors")
    if not fmt.endswith("-sharded"):
        _save(dict(tensors), directory / f"{stem}{suffix}")
        return
    weight_map = {}
    for shard in range(shards):
        name = f"{stem}-{shard + 1:05d}-of-{shards:05d}{suffix}"
        part = {key: tensors[key] for key in list(tensors)[shard::shards]}
        _save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: weight_map[name] for name in tensors}}
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def fill_hub_cache(cache: Path, source: Path, commit: str = HUB_COMMIT, ref: str = "main") -> Path:
    """Move a checkpoint into the layout in which the hub library caches HUB_REPO; returns its snapshot directory.

    Code files are put beside it, as in the real repository; running one ends the process.
    """
    for name in ("modeling_chatglm.py", "tokenization_chatglm.py"):
        (source / name).write_text("raise SystemExit('remote code was run')", encoding="utf-8")
    folder = cache / f"models--{HUB_REPO.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for path in (folder / "blobs", folder / "refs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit, encoding="utf-8")
    for number, path in enumerate(sorted(source.iterdir())):
        blob = folder / "blobs" / f"{commit[:8]}{number:032x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})
