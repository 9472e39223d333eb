"""How fast a bundle runs, beside the least that reading its weights and KV cache takes on the same computer."""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport import names
from glmexport.bundle import open_bundle
from glmexport.errors import BundleError, GlmExportError
from glmexport.generation import Decoder
from glmexport.machine import BandwidthReader, read_cpu, read_memory
from glmexport.plotting import save_png, two_parts
from glmexport.prompt import sample_prompt
from glmexport.session import Pasts, Session
from glmexport.slot_cache import SlotCache
from glmexport.thread_pool import run_alone

Array = npt.NDArray[Any]
Advance = Callable[[str, int], None]

PASTS = (16, 256, 1024, 1900)
BATCHES = (1, 2, 4, 8)
LENGTHS = (16, 64, 256, 1024)
HISTORY = 1024
"""Places in the KV cache of the run whose memory is reported."""

FIRST_PROMPT = 16
"""Tokens of the prompt whose first token is waited for."""

LEAST_PROMPT = 2
"""Tokens of a prompt: those that every one ends with."""

DECODE, PREFILL = "decode", "prefill"
SHARE = 0.7
"""Of the memory that is available beside the graphs, which KV caches may take; portable ones are there thrice."""

LEAST_RUNS, LEAST_SECONDS = 5, 1.0
LONG_SECONDS = 4.0
"""A run that takes longer is measured once more, and not five times."""

BANDWIDTH_SECONDS = 0.05
"""Of each reading of the memory bandwidth, of which there is one between any two bursts of runs: on a computer that
others use too it may halve within a minute, and a bound must be of the same moments as what is held to it."""

BURST_SECONDS = 0.2


@dataclass(frozen=True)
class BenchOptions:
    """Places in the KV cache before a token that is decoded, rows at once, tokens of prompts. threads: of `Session`."""

    pasts: tuple[int, ...] = PASTS
    batches: tuple[int, ...] = BATCHES
    lengths: tuple[int, ...] = LENGTHS
    flavor: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if min((*self.pasts, *self.batches, *self.lengths), default=1) < 1:
            raise GlmExportError("Rows, places and lengths must be 1 or more.")


@dataclass(frozen=True)
class BenchRow:
    """One measurement. length: tokens a row that were fed at once. ms: for all rows, the median of several runs.

    bound_ms: what reading all weights once and the KV cache of every row takes at `bandwidth_gb_s`, the median of
    readings between these very runs. For a long prompt it is arithmetic that takes the time.
    """

    kind: str
    batch: int
    past: int
    length: int
    ms: float
    bound_ms: float
    tokens_per_s: float
    bandwidth_gb_s: float

    @property
    def ratio(self) -> float:
        """Measured / bound."""
        return self.ms / self.bound_ms


@dataclass(frozen=True)
class Start:
    """What a process of its own measured. Seconds count from before it was started; bytes as the system counts them.

    load_s: until all graphs are open. first_token_s: until a prompt of FIRST_PROMPT tokens has its first token.
    peak_rss_bytes: at most, HISTORY tokens of history included. kv_bytes: of these.
    """

    load_s: float
    first_token_s: float
    peak_rss_bytes: int
    kv_bytes: int


@dataclass
class BenchReport:
    """All of it. weight_bytes: of the graphs that every token goes through. left_out: what is not measured, and why.

    bandwidth: bytes a second, the median of the rows' and of one more reading.
    """

    bundle: str
    flavor: str
    weight_bytes: int
    start: Start
    bandwidth: float = 0.0
    rows: list[BenchRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For programs; `load_s` and `peak_rss_bytes` are those of `start`."""
        return {
            "bundle": self.bundle,
            "flavor": self.flavor,
            "weight_bytes": self.weight_bytes,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            **dataclasses.asdict(self.start),
            "bandwidth_gb_s": self.bandwidth / 1e9,
            "left_out": self.left_out,
        }


def bench(bundle: Path, options: BenchOptions, advance: Advance) -> BenchReport:
    """Measure. advance: takes (what, 1) before each part, `progress_total` times. Raises GlmExportError."""
    open_bundle(bundle)  # what is wrong with it is told before another process is asked
    advance("start", 1)
    start = _start_apart(bundle, options)
    memory = read_memory()
    with Session(bundle, flavor=options.flavor, threads=options.threads) as session:
        reader = BandwidthReader(options.threads or read_cpu().cores, memory.available)
        weights = sum(size for name, size in session.graph_sizes.items() if name != names.EMBEDDING)
        report = BenchReport(str(bundle), session.flavor, weights, start, left_out=[*_impossible(session, options)])
        bandwidths = [reader.read(BANDWIDTH_SECONDS)]
        session.load()
        for kind, batch, past, length in _plan(session, options):
            what = f"{kind} {batch} x {past or length}"
            advance(what, 1)
            session.release()  # the cache of the row before it
            needed = session.held_kv_bytes(batch, past + length) * (1 if session.flavor == names.ORT else 3)
            available = read_memory().available
            if available is not None and needed > SHARE * available:
                report.left_out.append(f"{what} (memory is too small for its KV cache of {needed / 1e9:.1f} GB)")
                continue
            seconds, bandwidth = _medians(_runs(session, batch, past, length), reader)
            bandwidths.append(bandwidth)
            bound = (weights + session.kv_bytes(batch, past + length) * (kind == DECODE)) / bandwidth
            speed = batch * length / seconds
            report.rows.append(
                BenchRow(kind, batch, past, length, seconds * 1e3, bound * 1e3, speed, bandwidth_gb_s=bandwidth / 1e9)
            )
    report.bandwidth = statistics.median(bandwidths)
    return report


def progress_total(options: BenchOptions) -> int:
    """How often `bench` calls `advance`, at most."""
    return 1 + len(options.lengths) + len(options.batches) * len(options.pasts)


def _plan(session: Session, options: BenchOptions) -> Iterator[tuple[str, int, int, int]]:
    """(kind, batch, past, length) of every row that the model has positions for."""
    lengths, pasts = _possible(session, options)
    yield from ((PREFILL, 1, 0, length) for length in lengths)
    for batch in options.batches:
        yield from ((DECODE, batch, past, 1) for past in pasts)


def _possible(session: Session, options: BenchOptions) -> tuple[list[int], list[int]]:
    """The lengths of prompts and of histories that the model has positions for."""
    most = session.config.max_positions
    lengths = [length for length in options.lengths if LEAST_PROMPT <= length < most]
    return lengths, [past for past in options.pasts if past < most]


def _impossible(session: Session, options: BenchOptions) -> Iterator[str]:
    """Sentences about the others."""
    most, asked = session.config.max_positions, (options.lengths, options.pasts)
    others = [
        ", ".join(str(number) for number in wanted if number not in possible)
        for wanted, possible in zip(asked, _possible(session, options), strict=True)
    ]
    if others[0]:
        yield f"prompts of length {others[0]} (the model takes {LEAST_PROMPT} to {most - 1} tokens)"
    if others[1]:
        yield f"histories of length {others[1]} (the model has {most} positions)"


def _runs(session: Session, batch: int, past: int, length: int) -> Callable[[], object]:
    """A function that feeds `length` tokens a row after `past` places."""
    if past == 0:
        prompt = sample_prompt(session.config, length)
        return lambda: Decoder(session, [prompt] * batch).prefill()
    filled = filled_cache(session, batch, past)
    tokens = np.full((batch, 1), sample_prompt(session.config, 3)[0], np.int64)
    mask = np.zeros((batch, 1, 1, past + 1), np.bool_)
    positions = np.full((batch, 2, 1), past // 2, np.int64)

    def decode() -> object:
        kept: Pasts = filled if isinstance(filled, SlotCache) else [*filled]  # the same places are written each time
        return session.head(session.forward(tokens, mask, positions, kept))

    return decode


def filled_cache(session: Session, batch: int, length: int) -> Pasts:
    """A KV cache that holds `length` places of random numbers: pages of zeros would all be the same one."""
    config, cache = session.config, session.empty_pasts(batch)
    random = np.random.default_rng(0)
    places = random.standard_normal((config.num_heads, length, config.head_dim), np.float32)
    if isinstance(cache, SlotCache):
        cache.reserve(length + 1)
        for array in (*cache.keys, *cache.values):
            array[:, :, :length] = places
        return cache
    turned = places.transpose(1, 0, 2)[None, :, None].astype(session.bundle.form.dtype)
    shape = (2, length, batch, config.num_heads, config.head_dim)
    return [np.broadcast_to(turned, shape).copy() for _ in range(config.num_blocks)]


def _medians(run: Callable[[], object], reader: BandwidthReader) -> tuple[float, float]:
    """(seconds of a run, bytes a second read from memory between bursts of runs).

    The first run does not count, nor the first of each burst: a reading leaves nothing in the processor's caches, and
    threads asleep.
    """
    times, bandwidths = list[float](), [reader.read(BANDWIDTH_SECONDS)]
    long = _timed(run) > LONG_SECONDS
    while not times or (not long and (len(times) < LEAST_RUNS or sum(times) < LEAST_SECONDS)):
        if not long:
            run()
        end = time.perf_counter() + BURST_SECONDS
        while not times or time.perf_counter() < end:
            times.append(_timed(run))
        bandwidths.append(reader.read(BANDWIDTH_SECONDS))
    return statistics.median(times), statistics.median(bandwidths)


def _timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _start_apart(bundle: Path, options: BenchOptions) -> Start:
    """Have another process load the bundle and run it: memory that this one has touched would count."""
    request = {
        "bundle": str(bundle.resolve()),
        "flavor": options.flavor,
        "threads": options.threads,
        "begun": time.time(),
    }
    command = [sys.executable, "-c", f"from {__name__} import start_here as run; run()", json.dumps(request)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise BundleError(f"{bundle} could not be run ({said[0]:.300}).")
    return Start(**json.loads(done.stdout))


def start_here() -> None:
    """In a process of its own: load, prefill, decode after HISTORY places, print a `Start` as JSON."""
    run_alone()
    request = json.loads(sys.argv[1])
    begun = request["begun"]
    try:
        with Session(request["bundle"], flavor=request["flavor"], threads=request["threads"]) as session:
            session.load()
            loaded = time.time() - begun
            Decoder(session, [sample_prompt(session.config, FIRST_PROMPT)]).prefill()
            first = time.time() - begun
            past = min(HISTORY, session.config.max_positions - 1)
            _runs(session, 1, past, 1)()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            start = Start(loaded, first, peak, session.kv_bytes(1, past + 1))
    except GlmExportError as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps(dataclasses.asdict(start)))


def plot_bench(report: BenchReport, path: Path) -> None:
    """Draw milliseconds a token over the history, beside their bounds, and prefill speed, into a PNG file.

    Raises GlmExportError.
    """
    figure, decode, prefill = two_parts()
    for number, batch in enumerate(sorted({row.batch for row in report.rows if row.kind == DECODE})):
        rows = [row for row in report.rows if row.kind == DECODE and row.batch == batch]
        pasts, color = [row.past for row in rows], f"C{number}"
        label = f"{batch} row" + "s" * (batch > 1)
        decode.plot(pasts, [row.ms for row in rows], color=color, marker="o", markersize=4, label=label)
        decode.plot(pasts, [row.bound_ms for row in rows], color=color, linestyle=":", linewidth=1.2)
    decode.plot([], [], color="0.4", linestyle=":", label="reading weights and KV cache")
    decode.set(title="Time of a step", xlabel="tokens in the KV cache", ylabel="milliseconds")
    rows = [row for row in report.rows if row.kind == PREFILL]
    prefill.plot([row.length for row in rows], [row.tokens_per_s for row in rows], marker="o", markersize=4)
    prefill.set(title="Prefill", xlabel="tokens of the prompt", ylabel="tokens a second")
    for axes in (decode, prefill):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    decode.legend(fontsize=8)
    save_png(figure, path)
