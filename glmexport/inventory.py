"""What a checkpoint or a bundle holds, part by part, from headers and the manifest alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmexport import names
from glmexport.bundle import Bundle, open_bundle
from glmexport.config import ModelConfig
from glmexport.form import FLOAT32, GRAPH, RAW

if TYPE_CHECKING:
    from glmexport.checkpoint import Checkpoint


def bundle_inventory(directory: Path) -> dict[str, Any]:
    """Facts of a bundle and its parts as plain JSON values. Raises BundleError."""
    bundle = open_bundle(directory)
    parts = [
        {
            "name": graph["name"],
            "parameters": int(graph["parameters"]),
            "bytes": bundle.graph_sizes[graph["name"]],
            "dtypes": str(graph["weights"]),
        }
        for graph in bundle.graphs
    ]
    parts = [*_embedding_part(bundle), *parts]
    return {
        "kind": "bundle",
        "architecture": str(bundle.manifest["architecture"]),
        "form": form_in_words(bundle),
        "runtime": bundle.runtime,
        **_model(bundle.config),
        "opset": bundle.opset,
        "tied": bool(bundle.manifest["tied"]),
        "files": len(bundle.files),
        "parts": parts,
    }


def form_in_words(bundle: Bundle) -> str:
    """`float32` or `float16`, or what passes made: `slim 1856, bfloat16 embedding, int4 and int8 matmulnbits`."""
    form, words = bundle.form, []
    if form.dtype != FLOAT32:
        words.append(form.dtype)
    if form.slim is not None:
        words.append(f"slim {bundle.config.vocab_size} of {form.slim.vocabulary.full_size} rows")
    if form.embedding.kind == RAW:
        words.append(f"{form.embedding.dtype} embedding")
    elif form.embedding.kind != GRAPH:
        words.append("shared embedding")
    if form.quantization is not None:
        bits = {record["bits"] for entry in bundle.graphs for record in entry["matrices"].values()}
        words.append(f"{' and '.join(f'int{count}' for count in sorted(bits))} {form.quantization.format}")
    if form.weights != FLOAT32:
        words.append(f"{form.weights} weights")
    if bundle.runtime == names.MNN:
        bits = {record["bits"] for entry in bundle.graphs for record in entry["matrices"].values()}
        kinds = [f"{'int' if count < 16 else 'float'}{count}" for count in sorted(bits)]
        words.append(f"{' and '.join(kinds)} for MNN {bundle.manifest['mnn']['version']}")
    if form.flavors != (names.PORTABLE,):
        words = [*(words or ["float32"]), f"{' and '.join(form.flavors)} graphs"]
    if form.kv_cache != FLOAT32:
        words.append(f"{form.kv_cache} KV cache")
    return ", ".join(words) or "float32"


def checkpoint_inventory(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts of a checkpoint and its parts as plain JSON values; reads no tensor."""
    import torch  # here: a bundle is inspected without it

    patch, config, weights = checkpoint.patch, checkpoint.config, checkpoint.weights
    prefixes: dict[str, tuple[str, ...]] = {names.EMBEDDING: (patch.embedding,)}
    prefixes |= {names.block_name(i): (patch.block.format(block_id=i),) for i in range(config.num_blocks)}
    prefixes[names.HEAD] = (patch.final_norm, patch.head)
    with torch.device("meta"):
        used = set(patch.build_reference(config).state_dict())
    parts = []
    for name, paths in prefixes.items():
        held = [
            weights.info(tensor)
            for tensor in weights.names()
            if tensor in used and any(tensor.startswith(f"{path}.") for path in paths)
        ]
        parts.append(
            {
                "name": name,
                "parameters": sum(math.prod(info.shape) for info in held),
                "bytes": sum(info.nbytes for info in held),
                "dtypes": ", ".join(sorted({info.dtype for info in held})),
            }
        )
    return {
        "kind": "checkpoint",
        "architecture": patch.name,
        **_model(config),
        "head": "its own" if checkpoint.has_own_head else "tied to the embedding",
        "files": len(weights.files),
        "tokenizer": [path.name for path in checkpoint.tokenizer_files],
        "parts": parts,
    }


def _embedding_part(bundle: Bundle) -> list[dict[str, Any]]:
    """An embedding that is no graph, as a part."""
    kind, name = bundle.form.embedding.kind, bundle.form.embedding_file
    if kind == GRAPH:
        return []
    parameters = bundle.config.vocab_size * bundle.config.hidden_size
    if name is None:
        return [{"name": names.EMBEDDING, "parameters": 0, "bytes": 0, "dtypes": f"rows of {names.HEAD}"}]
    dtype = bundle.form.embedding.dtype
    return [{"name": names.EMBEDDING, "parameters": parameters, "bytes": bundle.files[name].bytes, "dtypes": dtype}]


def _model(config: ModelConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    special = values.pop("special_ids")
    values.pop("architecture")
    return {"model": values, "special_ids": special}
