"""What the commands that run a bundle share: where graphs go, how tokens are chosen, what a run says of itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glmexport.cli import output
from glmexport.errors import GlmExportError
from glmexport.sizes import parse_size, size_in_words

if TYPE_CHECKING:
    from glmexport.generation import Generation
    from glmexport.sampling import Sampling
    from glmexport.session import Session

Function = Callable[..., Any]

_ENDED = {
    "end": "ended by the end token",
    "length": "cut at the most tokens it may have",
    "stop": "ended by a stop text",
    None: "stopped by Ctrl-C",
}

_SESSION = (
    click.option(
        "--threads", type=click.IntRange(1, 1024), metavar="N", help="Threads of each graph.  [default: one a core]"
    ),
    click.option(
        "--memory-limit",
        metavar="SIZE",
        help="The most that the files of open graphs and the KV cache may take, such as 2GB; what is beyond it is "
        "streamed from disk. The process takes some 100 MB, and half as much again for packed weights, more.",
    ),
    click.option(
        "--providers",
        metavar="A,B",
        help="onnxruntime's execution providers, first choice first, such as CUDAExecutionProvider.",
    ),
    click.option(
        "--gpu-memory", metavar="SIZE", help="Put as many blocks on the GPU as fit into this, the rest on the CPU."
    ),
    click.option(
        "--flavor",
        type=click.Choice(["portable", "ort"]),
        help="Of the graphs to run.  [default: ort where the bundle has it and all runs on the CPU]",
    ),
)
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Print where each graph would go, and load nothing.")
_SAMPLING = (
    click.option("--greedy", is_flag=True, help="Always the most likely token."),
    click.option(
        "--temperature",
        type=float,
        default=0.95,
        show_default=True,
        help="Above 1: more even chances; below: the likely gets likelier; 0 is --greedy.",
    ),
    click.option(
        "--top-k",
        type=int,
        default=50,
        show_default=True,
        help="Sample among so many of the likeliest tokens; 0 is all.",
    ),
    click.option(
        "--top-p",
        type=float,
        default=0.7,
        show_default=True,
        help="Sample among the likeliest tokens that together have this probability.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        show_default=True,
        help="Above 1: tokens that were there are less likely.",
    ),
    click.option("--seed", type=int, help="Start the random numbers here, for the same answer every time."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated."),
    click.option(
        "--max-tokens",
        type=int,
        metavar="N",
        help="The most tokens of an answer.  [default: what the model has room for]",
    ),
)


def session_options(function: Function) -> Function:
    """`--threads`, `--memory-limit`, `--providers`, `--gpu-memory`, `--flavor`."""
    for option in reversed(_SESSION):
        function = option(function)
    return function


def generation_options(function: Function) -> Function:
    """Those of a session, `--dry-run`, and how tokens are chosen."""
    for option in reversed((*_SAMPLING, *_SESSION, _DRY_RUN)):
        function = option(function)
    return function


def parse_ids(text: str) -> list[int]:
    """Ids of a list such as `5,17,9` or `[5, 17, 9]`. Raises GlmExportError."""
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        raise GlmExportError(f"{text!r:.60} are no ids; expected whole numbers such as 5,17,9.")
    return [int(word) for word in words]


def utf8(data: bytes) -> str:
    """The text of what came from a pipe, whatever the terminal's own encoding is. Raises GlmExportError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GlmExportError(f"The input {data[:20]!r} is not UTF-8 text; convert it.") from error


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """How tokens are chosen. Raises GlmExportError for values that are none."""
    from glmexport.sampling import Sampling

    keys = ("greedy", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return Sampling(**{key: options[key] for key in keys})


def open_session(bundle: Path, options: Mapping[str, Any], *, quiet: bool) -> Session:
    """The session that the options ask for; nothing is loaded. Raises GlmExportError."""
    from glmexport.session import Session

    limit, gpu = (
        None if text is None else parse_size(text) for text in (options["memory_limit"], options["gpu_memory"])
    )
    providers = tuple(name.strip() for name in (options["providers"] or "").split(",") if name.strip())
    session = Session(
        bundle,
        threads=options["threads"],
        memory_limit=limit,
        providers=providers,
        gpu_memory=gpu,
        flavor=options["flavor"],
    )
    placement, notify = session.placement, output.notifier(quiet)
    if placement.raised and placement.limit is not None:
        notify(
            f"The memory limit of {size_in_words(limit or 0)} is raised to {size_in_words(placement.limit)}, which the "
            "largest graph needs."
        )
    if gpu is not None and placement.gpu:
        count = sum(session.graph_sizes[name] for name in placement.gpu)
        notify(f"{len(placement.gpu)} of {len(session.graph_sizes)} graphs, {size_in_words(count)}, go on the GPU.")
    elif gpu is not None:
        notify(
            f"No block fits into {size_in_words(gpu)} of GPU memory beside what running one needs; all are on the CPU."
        )
    return session


def load(session: Session, *, quiet: bool) -> None:
    """Open the graphs that are to be kept, with a progress bar where somebody watches. Raises GlmExportError."""
    kept = (*session.placement.gpu, *session.placement.resident)
    total = sum(session.graph_sizes[name] for name in kept)
    with output.progress(quiet or not sys.stderr.isatty(), total, "opened") as advance:
        session.load(advance)


def print_plan(session: Session) -> None:
    """Where each graph goes, and the arithmetic of memory."""
    from glmexport import names
    from glmexport.placement import gpu_needs

    console, config = output.console(), session.config
    start, full = session.placement, session.plan(config.max_positions)
    listing = output.table("graph", "bytes", "", "where", right=("bytes", ""))
    for name, count in session.graph_sizes.items():
        where = "GPU" if name in start.gpu else "memory" if name in start.resident else "streamed from disk"
        later = ", streamed later" if name in full.streamed and name in start.resident else ""
        listing.add_row(name, f"{count:,}", size_in_words(count), where + later)
    console.print(listing)
    for device, graphs in (("GPU", start.gpu), ("memory", start.resident), ("streamed", start.streamed)):
        count = sum(session.graph_sizes[name] for name in graphs)
        console.print(f"{device:<10}{len(graphs)} graphs, {size_in_words(count)}")
    if start.gpu:
        needs = gpu_needs(config, config.max_positions, session.bundle.form.float_bytes)
        reserve = needs.fixed + needs.block * sum(name != names.HEAD for name in start.gpu)
        console.print(f"          {size_in_words(reserve)} of GPU memory beside them, for KV cache and activations")
    each, most = session.kv_bytes(1, 1), session.kv_bytes(1, config.max_positions)
    console.print(f"KV cache  {size_in_words(each)} a token, {size_in_words(most)} at {config.max_positions} positions")
    if start.limit is not None:
        raised = ", raised to what the largest graph needs" * start.raised
        console.print(f"limit     {size_in_words(start.limit)}{raised}")


def stats_in_words(generation: Generation) -> str:
    """One line of statistics."""
    stats = generation.stats
    decode = f"decode {stats.decode_tokens} tokens, {stats.decode_speed:.1f}/s" if stats.decode_tokens else "no decode"
    return (
        f"prefill {stats.prefill_tokens} tokens, {stats.prefill_speed:.1f}/s; {decode}; KV cache "
        f"{size_in_words(stats.kv_bytes)}, graphs {size_in_words(stats.held_bytes)}, process "
        f"{size_in_words(peak_memory())} at most; {_ENDED[generation.finish_reason]}"
    )


def stats_as_json(generation: Generation) -> dict[str, Any]:
    """The same for programs; bytes, seconds and tokens a second."""
    import dataclasses

    stats = generation.stats
    speeds = {"prefill_speed": stats.prefill_speed, "decode_speed": stats.decode_speed}
    return {**dataclasses.asdict(stats), **speeds, "peak_memory": peak_memory()}


def peak_memory() -> int:
    """Bytes of memory that this process held at most, as the operating system counts it."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
