"""What one step of a block in `ort/` spends its time on, by operator, as onnxruntime's profiler counts it.

Example: python benchmarks/profile_step.py fast/ --past 16
         python benchmarks/profile_step.py fast/ --past 0 --length 512

Some blocks run in turn, so that weights and KV cache come from memory and not from a cache of the processor. The figure
of an operator is the median of its calls times how many there are in a block; profiling itself takes some of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from glmexport import names
from glmexport.bundle import open_bundle
from glmexport.errors import BundleError, GlmExportError
from glmexport.slot_cache import SlotCache
from glmexport.thread_pool import run_alone, share_threads

DEVICE = "cpu"
WARM_UP = 2


def opened(paths: Sequence[Path], folder: Path) -> list[onnxruntime.InferenceSession]:
    """The graphs with profiling on, over one pool of threads: pools of their own would spin beside each other."""
    run_alone()
    share_threads(None)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.enable_profiling = True
    sessions = []
    for path in paths:
        options.profile_file_prefix = str(folder / path.stem)
        sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
    return sessions


def bound(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """A binding of one block, whose caches come out where they go in; and its outputs, which the caller keeps."""
    binding = session.io_binding()
    outputs = {
        names.HIDDEN_STATES: np.empty_like(feeds[names.INPUTS_EMBEDS]),
        names.KEY_CACHE_OUT: feeds[names.KEY_CACHE],
        names.VALUE_CACHE_OUT: feeds[names.VALUE_CACHE],
    }
    for bind, arrays in ((binding.bind_input, feeds), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            bind(name, DEVICE, 0, array.dtype.type, array.shape, array.ctypes.data)
    return binding, outputs


def profile(directory: Path, *, past: int, batch: int, length: int, blocks: int, runs: int) -> dict[str, float]:
    """Operator -> microseconds of a step of one block, the longest first. Raises BundleError where there is none."""
    bundle = open_bundle(directory)
    config, number = bundle.config, min(blocks, bundle.config.num_blocks)
    if names.ORT not in bundle.flavors:
        raise BundleError(f"{directory} has no graphs in ort/; split with --flavor both.")
    if past + length > config.max_positions:
        raise BundleError(f"{past + length} places were asked for, and the model has {config.max_positions} positions.")
    cache = SlotCache(config, batch, bundle.form.cache_dtype(names.ORT), blocks=range(number))
    cache.reserve(past + length)
    random = np.random.default_rng(0)
    mask = np.zeros((batch, 1, length, cache.capacity), np.bool_)
    mask[..., past + length :] = True
    given = {
        names.INPUTS_EMBEDS: random.standard_normal((batch, length, config.hidden_size), np.float32),
        names.ATTENTION_MASK: mask,
        names.POSITION_IDS: np.zeros((batch, 2, length), np.int64),
        names.WRITE_INDICES: np.full(batch, past, np.int64),
    }
    entries = [bundle.graph(names.block_name(block), names.ORT) for block in range(number)]
    with tempfile.TemporaryDirectory() as folder:
        sessions = opened([bundle.whole_path(entry["file"]) for entry in entries], Path(folder))
        steps = []
        for block, session in enumerate(sessions):
            keys, values = cache.of(block)
            keys[:, :, :past] = values[:, :, :past] = random.standard_normal((past, config.head_dim), np.float32)
            steps.append((session, bound(session, {**given, names.KEY_CACHE: keys, names.VALUE_CACHE: values})))
        for _ in range(WARM_UP + runs):
            for session, (binding, _arrays) in steps:
                session.run_with_iobinding(binding)
        times: dict[str, list[float]] = defaultdict(list)
        for session in sessions:
            for event in json.loads(Path(session.end_profiling()).read_text("utf-8")):
                if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                    times[event["args"]["op_name"]].append(event["dur"])
    per_block = number * (WARM_UP + runs)
    totals = {kind: statistics.median(calls) * len(calls) / per_block for kind, calls in times.items()}
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def count(text: str) -> int:
    """A number from 1 up."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--past", type=int, default=16, help="places in the KV cache")
    parser.add_argument("--batch", type=count, default=1, help="rows")
    parser.add_argument("--length", type=count, default=1, help="tokens a row that are fed at once")
    parser.add_argument("--blocks", type=count, default=6, help="that run in turn")
    parser.add_argument("--runs", type=count, default=20)
    parser.add_argument("--json", action="store_true", help="operator -> microseconds")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    try:
        found = profile(options.pop("bundle"), **options)
    except GlmExportError as error:
        parser.error(str(error))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    whole = sum(found.values())
    for kind, time in found.items():
        print(f"{kind:24} {time:10.1f} us {time / whole:7.1%}")
    print(f"{'all':24} {whole:10.1f} us")


if __name__ == "__main__":
    main()
