"""`glmexport split`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glmexport.cli import output
from glmexport.cli.derived import embedding_in_words
from glmexport.cli.pass_options import EMBEDDINGS, passes_of_options, quantize_options, rounding_option, slim_options
from glmexport.cli.quantize import show_report
from glmexport.form import FLOAT32, GRAPH, SHARED, WEIGHTS
from glmexport.interface import ARGMAX_MODES, DEFAULT_OPSET, DTYPES, OPSETS
from glmexport.sizes import size_in_words

if TYPE_CHECKING:
    from glmexport.splitter import SplitPlan


class SplitCommand(click.Command):
    """`--argmax` takes a value or none: a following word that is no mode is the next argument."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Make a bare `--argmax` the value `also`."""
        following = [*args[1:], ""]
        pairs = zip(args, following, strict=False)  # without arguments only the filler is there
        return super().parse_args(
            ctx,
            ["--argmax=also" if word == "--argmax" and after not in ARGMAX_MODES else word for word, after in pairs],
        )


@click.command(name="split", cls=SplitCommand)
@click.argument("checkpoint")
@click.option("-o", "--output", "bundle", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@output.revision_option
@click.option(
    "--opset",
    type=click.IntRange(OPSETS.start, OPSETS.stop - 1),
    default=DEFAULT_OPSET,
    show_default=True,
    help="ONNX operator set of every graph.",
)
@click.option(
    "--argmax",
    type=click.Choice(ARGMAX_MODES),
    default="none",
    show_default=True,
    help="Add the greedy `token_id` to the LM head, or give it alone (`only`).",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=FLOAT32,
    show_default=True,
    help="What the graphs compute in; float16, for GPUs, halves weights, KV cache and activations.",
)
@click.option(
    "--flavor",
    type=click.Choice(["portable", "ort", "both"]),
    default="portable",
    show_default=True,
    help="Graphs for any runtime, with a KV cache that grows; for onnxruntime, in ort/, with one that they write into; "
    "or both, with the same weights.",
)
@click.option("--slim", is_flag=True, help="Drop the image-token rows, as `glmexport slim` does.")
@slim_options
@click.option(
    "--embedding",
    type=click.Choice([GRAPH, *EMBEDDINGS, SHARED]),
    default=GRAPH,
    show_default=True,
    help="embedding.onnx, a raw file of rows, or the rows of the quantized LM head, as `glmexport embed` does.",
)
@rounding_option
@click.option("--quantize", metavar="int8|int4", help="Quantize the blocks' matrices, as `glmexport quantize` does.")
@quantize_options
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default=FLOAT32,
    show_default=True,
    help="How matrices that are not quantized are stored; float16 halves them and casts in the graph, without loss.",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(DTYPES),
    default=FLOAT32,
    show_default=True,
    help="Of the KV cache that graphs of the flavor ort write into; float16 takes half the memory, and more time over "
    "a long history.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle, or an empty directory.")
@click.option("--resume", is_flag=True, help="Go on where a run that was stopped or killed has left off.")
@click.option("--dry-run", is_flag=True, help="Print files, bytes, memory and disk needed; read no tensor.")
@click.option("--verify", "check", is_flag=True, help="Verify the bundle against the reference when it is written.")
@output.quiet_option
def command(
    checkpoint: str,
    bundle: Path,
    revision: str | None,
    opset: int,
    argmax: str,
    dtype: str,
    flavor: str,
    force: bool,
    resume: bool,
    dry_run: bool,
    check: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Export CHECKPOINT, a directory or hub id, as a bundle of separate ONNX graphs.

    The bundle holds embedding.onnx, glm_block_<i>.onnx and lm.onnx with their weights beside them, the tokenizer files
    and manifest.json. One matrix is in memory at a time. Nothing is written into the checkpoint, no code in it is run,
    and the bundle appears only when it is complete.

    With the options of the passes the checkpoint goes straight to its final form, byte for byte what split, slim,
    embed and quantize make one after the other, without float32 files in between.

    A run that is killed, stopped by Ctrl-C or ended by a full disk or the like keeps the graphs that it finished
    beside BUNDLE's place; the same command with --resume goes on from there and ends in the same bytes.

    \b
    Examples:
      glmexport split chatglm-6b/ -o bundle/
      glmexport split chatglm-6b/ -o int4/ --slim --embedding bf16 --quantize int4
      glmexport split chatglm-6b/ -o fast/ --slim --embedding bf16 --quantize int4 --flavor both
      glmexport split chatglm-6b/ -o half/ --dtype float16
      glmexport split chatglm-6b/ -o bundle/ --dry-run
      glmexport split zai-org/chatglm-6b --revision v1.1.0 -o bundle/ --argmax --verify
    """
    from glmexport.bundle import open_bundle
    from glmexport.bundle_writer import check_output
    from glmexport.checkpoint import open_checkpoint
    from glmexport.quantize_report import quantize_report
    from glmexport.splitter import SplitOptions, check_apart, plan_split, split

    if not bundle.name:
        raise click.BadParameter("the name of a directory to make is needed.", param_hint="--output")
    if not dry_run:
        check_output(bundle, force=force)  # before a hub download that might take hours
    with open_checkpoint(checkpoint, revision) as source:
        split_options = SplitOptions(opset, argmax, passes_of_options(options, source.config.num_blocks), dtype, flavor)
        check_apart(source.directory, bundle)
        plan = plan_split(source, split_options)
        if dry_run:
            _print_plan(plan, bundle)
            return
        notice = output.notifier(quiet)
        with output.resumable(), output.progress(quiet, plan.disk, "of the bundle") as advance:
            written_draft = split(
                source, bundle, split_options, force=force, resume=resume, notice=notice, advance=advance
            )
        written = open_bundle(bundle)
        if written.form.quantization is not None:
            show_report(quantize_report(None, written))
        if written.form.embedding.kind != GRAPH:
            click.echo(f"embedding: {embedding_in_words(written_draft)}")
        click.echo(
            f"{bundle}: {len(written.graphs)} graphs, {len(written.files)} files, {size_in_words(written.total_bytes)}"
        )
        if check:
            from glmexport.cli.verify import run_verify

            if not run_verify(written, source, quiet=quiet):
                sys.exit(1)


def _print_plan(plan: SplitPlan, bundle: Path) -> None:
    listing = output.table("file", "bytes", "", right=("bytes", ""))
    for name, count in plan.files.items():
        listing.add_row(name, f"{count:,}", "hard link" if name in plan.shared else size_in_words(count))
    console = output.console()
    console.print(listing)
    place = bundle.absolute().parent
    while not place.exists():
        place = place.parent
    free = size_in_words(shutil.disk_usage(place).free)
    console.print(f"disk needed  {size_in_words(plan.disk)}, free {free} in {place}", markup=False)
    console.print(f"peak memory  about {size_in_words(plan.peak_memory)}")
    console.print("Graph files and the manifest are estimates, external data is exact; nothing was written.")
