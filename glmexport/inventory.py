"""What a checkpoint or a bundle holds, part by part, from headers and the manifest alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmexport import names
from glmexport.bundle import open_bundle
from glmexport.config import ModelConfig

if TYPE_CHECKING:
    from glmexport.checkpoint import Checkpoint


def bundle_inventory(directory: Path) -> dict[str, Any]:
    """Facts of a bundle and its parts as plain JSON values. Raises BundleError."""
    bundle = open_bundle(directory)
    parts = [
        {
            "name": graph["name"],
            "parameters": int(graph["parameters"]),
            "bytes": sum(bundle.files[graph[key]].bytes for key in ("file", "data")),
            "dtypes": str(graph["weights"]),
        }
        for graph in bundle.graphs
    ]
    return {
        "kind": "bundle",
        "architecture": str(bundle.manifest["architecture"]),
        **_model(bundle.config),
        "opset": bundle.opset,
        "tied": bool(bundle.manifest["tied"]),
        "files": len(bundle.files),
        "parts": parts,
    }


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


def _model(config: ModelConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    special = values.pop("special_ids")
    values.pop("architecture")
    return {"model": values, "special_ids": special}
