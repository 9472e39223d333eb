"""How an answer is made: generation_config.json, the Modelfile over it, the request over both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmexport.errors import GlmExportError
from glmexport.sampling import Sampling
from glmexport.untrusted import parse_json, read_small_file

GENERATION_CONFIG = "generation_config.json"
MAX_BYTES = 1 << 20
LEAST_TOP_P = 1e-9
_SEEDS = 1 << 63

_FROM_CONFIG = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
"""Key of transformers' file -> parameter of a Modelfile."""


@dataclass(frozen=True)
class Options:
    """How one answer is made.

    max_tokens: None for what there is room for. context: places for prompt and answer, None for what the slot has.
    """

    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    context: int | None = None


def read_generation_config(directory: Path, *, demanded: bool = False) -> dict[str, Any]:
    """Parameters, by a Modelfile's names, that a directory's generation_config.json sets; empty where there is none.

    `do_sample: false` is a temperature of 0. Raises GlmExportError: a value that is none; no file where demanded.
    """
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        if demanded:
            raise GlmExportError(f"{directory} has no {GENERATION_CONFIG}; give the directory that holds it.")
        return {}
    raw = parse_json(read_small_file(path, MAX_BYTES), str(path))
    found = {ours: raw[theirs] for theirs, ours in _FROM_CONFIG.items() if raw.get(theirs) is not None}
    if raw.get("do_sample") is False:
        found["temperature"] = 0
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise GlmExportError(f"{path} sets {name} to {json.dumps(value):.60}, expected a number.")
    options_of(found)  # a value that is none is the server's to refuse, once, and not every request's
    return found


def options_of(*layers: Mapping[str, Any]) -> Options:
    """Options from parameters by a Modelfile's names, later layers over earlier ones; the rest are the original's.

    Besides those of `modelfile.PARAMETERS`: `logit_bias`, a mapping of ids. Conventions of other servers hold: a
    negative seed is none, top_k below 1 is all tokens, num_predict below 1 is as many as fit, repeat_last_n of -1 is
    all of them. Raises GlmExportError for values that are none.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values |= {name: value for name, value in layer.items() if value is not None}
    chosen: dict[str, Any] = {}
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"):
        if name in values:
            chosen[name] = float(values[name])
    if chosen.get("top_p") == 0:
        chosen["top_p"] = LEAST_TOP_P  # the likeliest token alone, as servers take it
    if "top_k" in values:
        chosen["top_k"] = max(int(values["top_k"]), 0)
    if "repeat_penalty" in values:
        chosen["repetition_penalty"] = float(values["repeat_penalty"])
    if values.get("repeat_last_n", -1) >= 0:
        chosen["repeat_last_n"] = int(values["repeat_last_n"])
    if values.get("seed", -1) != -1:
        chosen["seed"] = int(values["seed"]) % _SEEDS
    if "logit_bias" in values:
        chosen["logit_bias"] = tuple(values["logit_bias"].items())
    predict, context = int(values.get("num_predict", 0)), int(values.get("num_ctx", 0))
    return Options(
        Sampling(**chosen),
        tuple(values.get("stop", ())),
        predict if predict > 0 else None,
        context if context > 0 else None,
    )
