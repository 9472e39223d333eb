"""Write a ChatGLM-6B checkpoint with seeded random weights, full size by default: 13.4 GB of float16 in 8 shards.

    python benchmarks/synthesize.py /data/chatglm-6b-random
    python benchmarks/synthesize.py /data/small --blocks 2 --hidden 512 --heads 8 --vocab 4096 --format bin

The numbers are for measuring sizes, memory and time; a model of them says nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

POOL_ELEMENTS = 1 << 24
"""Random numbers are drawn once and dealt out from shifting starts: drawing 6.7 G of them would take minutes."""


def shapes(vocab: int, hidden: int, blocks: int, inner: int, head: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of the original's layout, in the order of its shards."""
    result: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (vocab, hidden)}
    for block in range(blocks):
        prefix = f"transformer.layers.{block}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result |= {f"{prefix}.{norm}.weight": (hidden,), f"{prefix}.{norm}.bias": (hidden,)}
        for name, rows, columns in (
            ("attention.query_key_value", 3 * hidden, hidden),
            ("attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", inner, hidden),
            ("mlp.dense_4h_to_h", hidden, inner),
        ):
            result |= {f"{prefix}.{name}.weight": (rows, columns), f"{prefix}.{name}.bias": (rows,)}
    result |= {"transformer.final_layernorm.weight": (hidden,), "transformer.final_layernorm.bias": (hidden,)}
    return result | ({"lm_head.weight": (vocab, hidden)} if head else {})


def tensor(name: str, shape: tuple[int, ...], pool: torch.Tensor, seed: int) -> torch.Tensor:
    """One seeded float16 tensor: norm weights near 1, matrices scaled so that activations keep their size."""
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(hash_of(name, seed))
    start = int(torch.randint(POOL_ELEMENTS, (), generator=generator))
    repeated = torch.cat([pool[start:], pool[:start]]).repeat(-(-count // POOL_ELEMENTS))[:count].reshape(shape)
    if len(shape) == 2:
        return repeated * (0.5 if "embeddings" in name else shape[1] ** -0.5)
    return repeated * 0.05 + (1.0 if name.endswith("layernorm.weight") else 0.0)


def hash_of(name: str, seed: int) -> int:
    """A seed of its own for each tensor, the same in every process."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % (1 << 31) + seed


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--format", choices=("bin", "safetensors"), default="bin")
    parser.add_argument("--head", choices=("own", "tied", "none"), default="tied", help="tied: equal to the embedding")
    for option, default in (("vocab", 130528), ("hidden", 4096), ("blocks", 28), ("heads", 32), ("inner", 0)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()
    table = shapes(
        options.vocab, options.hidden, options.blocks, options.inner or 4 * options.hidden, options.head != "none"
    )
    options.directory.mkdir(parents=True)
    pool = torch.randn(POOL_ELEMENTS, generator=torch.Generator().manual_seed(options.seed)).half()
    total = sum(2 * math.prod(shape) for shape in table.values())
    stem, suffix = ("pytorch_model", ".bin") if options.format == "bin" else ("model", ".safetensors")
    files: list[list[str]] = [[]]
    filled = 0
    for name, shape in table.items():
        if filled > total / options.shards and len(files) < options.shards:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += 2 * math.prod(shape)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"{stem}-{number:05d}-of-{len(files):05d}{suffix}"
        tied = options.head == "tied"
        source = {n: "transformer.word_embeddings.weight" if tied and n == "lm_head.weight" else n for n in names}
        shard = {name: tensor(source[name], table[name], pool, options.seed) for name in names}
        if suffix == ".bin":
            torch.save(shard, options.directory / file)
        else:
            save_file(shard, options.directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        del shard
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    first_special = options.vocab - 528 if options.vocab > 1024 else options.vocab - 8
    config = {
        "model_type": "chatglm",
        "torch_dtype": "float16",
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "num_layers": options.blocks,
        "num_attention_heads": options.heads,
        "inner_hidden_size": options.inner or 4 * options.hidden,
        "max_sequence_length": 2048,
        "layernorm_epsilon": 1e-05,
        "position_encoding_2d": True,
        "mask_token_id": first_special,
        "gmask_token_id": first_special + 1,
        "bos_token_id": first_special + 4,
        "eos_token_id": first_special + 5,
        "pad_token_id": 3,
    }
    (options.directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    seconds = time.monotonic() - begun
    print(f"{options.directory}: {total / 1e9:.2f} GB in {len(files)} shards, {seconds:.0f} s")


if __name__ == "__main__":
    main()
