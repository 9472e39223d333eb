"""`glmexport convert`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from glmexport.cli import output
from glmexport.interface import ARGMAX_MODES
from glmexport.sizes import size_in_words

if TYPE_CHECKING:
    from glmexport.bundle import Bundle

BITS = {"8": 8, "4": 4, "16": 16, "none": 32}
"""What `--bits` takes -> bits of a weight."""


@click.group(name="convert")
def command() -> None:
    """Convert a bundle to another runtime's format.

    \b
    Example:
      glmexport convert mnn int4/ -o mnn-int4/
    """


@command.command(name="mnn")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", "target", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@click.option(
    "--bits",
    type=click.Choice([*BITS]),
    help="Of the blocks' matrices, for a float32 bundle; none: as they are.  [default: as the bundle stores them]",
)
@click.option("--lm-bits", type=click.Choice([*BITS]), help="Of the LM head.  [default: 8 with --bits 4, else --bits]")
@click.option(
    "--block",
    type=click.IntRange(16),
    default=128,
    show_default=True,
    metavar="N",
    help="The most inputs that share a scale: the largest multiple of 16 up to it that divides every matrix's inputs "
    "is used, one scale per channel where none does.",
)
@click.option(
    "--memory",
    type=click.Choice(["low", "normal"]),
    help="How MNN is to hold the weights: low keeps integers and rounds activations to 8 bits; normal makes float32 of "
    "them.  [default: low where anything is quantized]",
)
@click.option("--argmax", type=click.Choice(ARGMAX_MODES), help="What the LM head gives.  [default: as the bundle's]")
@click.option("--checkpoint", metavar="CHECKPOINT", help="Round its weights where MNN cannot hold a bundle's integers.")
@output.revision_option
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Graphs at once, within 3 GB.")
@click.option("--force", is_flag=True, help="Replace an existing bundle, or an empty directory.")
@click.option("--copy", is_flag=True, help="Copy unchanged files instead of hard-linking them.")
@click.option("--resume", is_flag=True, help="Go on where a run that was stopped or killed has left off.")
@click.option("--json", "json_file", metavar="FILE", help="Also write what was made as JSON; - is stdout, no table.")
@output.quiet_option
def mnn(
    bundle: Path,
    target: Path,
    bits: str | None,
    lm_bits: str | None,
    block: int,
    memory: str | None,
    argmax: str | None,
    checkpoint: str | None,
    revision: str | None,
    jobs: int,
    force: bool,
    copy: bool,
    resume: bool,
    json_file: str | None,
    quiet: bool,
) -> None:
    """Convert BUNDLE to a bundle for MNN: glm_block_<i>.mnn and lm.mnn, each with its weights in <name>.mnn.weight.

    The raw embedding, the pieces (slim_vocab.txt or vocab.txt) and the tokenizer lie beside them. A quantized bundle's
    integers and scales go over as they are; a float32 bundle's matrices can be rounded on the way. Every graph is read
    back and run against onnxruntime before it is kept. Needs MNN: pip install 'glmexport[mnn]'.

    \b
    Examples:
      glmexport convert mnn int4/ -o mnn-int4/
      glmexport convert mnn bundle/ -o mnn-int8/ --bits 8 --block 64
      glmexport chat mnn-int4/
    """
    from glmexport.bundle import open_bundle
    from glmexport.checkpoint import open_checkpoint
    from glmexport.convert.mnn import convert_mnn, convert_total
    from glmexport.convert.mnn_plan import MnnOptions

    if not target.name:
        raise click.BadParameter("the name of a directory to make is needed.", param_hint="--output")
    opened = open_bundle(bundle)
    if json_file not in (None, "-"):
        output.demand_writable(Path(json_file), apart_from=target)
    blocks_bits, head_bits = (None if word is None else BITS[word] for word in (bits, lm_bits))
    options = MnnOptions(blocks_bits, head_bits, block, memory, argmax, jobs)
    with (
        nullcontext() if checkpoint is None else open_checkpoint(checkpoint, revision) as source,
        output.resumable(),
        output.progress(quiet, convert_total(opened), "of the bundle") as advance,
    ):
        convert_mnn(
            opened,
            target,
            options,
            checkpoint=source,
            force=force,
            resume=resume,
            copy=copy,
            notice=output.notifier(quiet),
            advance=advance,
        )
    made = open_bundle(target)
    if json_file is not None:
        keys, sizes = ("name", "weights", "checked", "matrices"), made.graph_sizes
        rows = [{**{key: graph[key] for key in keys}, "bytes": sizes[graph["name"]]} for graph in made.graphs]
        output.write_json(json_file, {"bundle": str(target), "mnn": made.manifest["mnn"], "graphs": rows})
    if json_file != "-":
        _print(made, opened.total_bytes)


def _print(made: Bundle, before: int) -> None:
    listing = output.table("graph", "weights", "bytes", "", "error, normal", "low", right=("bytes", ""))
    for graph in made.graphs:
        size, checked = made.graph_sizes[graph["name"]], graph["checked"]
        errors = [f"{checked[memory]:.1e}" if memory in checked else "" for memory in ("normal", "low")]
        listing.add_row(graph["name"], graph["weights"], f"{size:,}", size_in_words(size), *errors)
    console = output.console()
    console.print(listing)
    mnn = made.manifest["mnn"]
    console.print(
        f"{escape(str(made.directory))}: for MNN {mnn['version']}, {mnn['memory']} memory mode, "
        f"{size_in_words(before)} -> {size_in_words(made.total_bytes)}",
        soft_wrap=True,
    )
