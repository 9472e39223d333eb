"""Greedy decoding of a bundle with nothing but onnxruntime and the bundle's manifest.

glmexport split examples/chatglm-6b-tiny -o out/demo
python examples/greedy_onnxruntime.py out/demo 371 1064 949 1501 1504
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
import onnxruntime as ort


def generate(bundle: Path, prompt: list[int], steps: int) -> list[int]:
    """The greedy continuation of `prompt`, whose last two ids are [gMASK] and <sop>."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    model = manifest["model"]
    if manifest["embedding"]["kind"] != "graph":
        raise SystemExit(f"{bundle} has no embedding graph: this example is for bundles that do.")
    sessions = [ort.InferenceSession(bundle / graph["file"]) for graph in manifest["graphs"]]
    embedding, blocks, lm = sessions[0], sessions[1:-1], sessions[-1]
    head_dim = model["hidden_size"] // model["num_heads"]
    pasts = [np.zeros((2, 0, 1, model["num_heads"], head_dim), manifest.get("dtype", "float32"))] * len(blocks)

    context = len(prompt) - 1  # places before <sop>
    ids = np.array([prompt])
    mask = np.zeros((1, 1, len(prompt), len(prompt)), bool)
    mask[..., :-1, -1] = True  # only <sop> sees itself
    positions = np.array([[[*range(context), context - 1], [0] * context + [1]]])
    answer: list[int] = []
    for step in range(steps):
        hidden = embedding.run(None, {"input_ids": ids})[0]
        for i, block in enumerate(blocks):
            feeds = {
                "inputs_embeds": hidden,
                "attention_mask": mask,
                "position_ids": positions,
                "past_key_values": pasts[i],
            }
            hidden, pasts[i] = block.run(["hidden_states", "presents"], feeds)
        token = int(lm.run(["logits"], {"hidden_states": hidden})[0][0].argmax())
        answer.append(token)
        ids = np.array([[token]])
        mask = np.zeros((1, 1, 1, len(prompt) + step + 1), bool)
        positions = np.array([[[context - 1], [step + 2]]])
    return answer


if __name__ == "__main__":
    print(*generate(Path(sys.argv[1]), [int(token) for token in sys.argv[2:]], steps=8))
