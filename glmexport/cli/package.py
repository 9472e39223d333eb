"""`glmexport package`."""

from __future__ import annotations

from pathlib import Path

import click

from glmexport.cli import output
from glmexport.errors import GlmExportError
from glmexport.sizes import size_in_words


@click.group(name="package")
def command() -> None:
    """Make the folder that another program's engine runs.

    \b
    Example:
      glmexport package mnn-llm chatglm-6b/ -o phone/
    """


@command.command(name="mnn-llm")
@click.argument("source", metavar="CHECKPOINT|BUNDLE")
@click.option("-o", "--output", "target", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@output.revision_option
@click.option(
    "--bits",
    type=click.Choice(["4", "8", "16", "32", "none"]),
    help="Bits of the blocks' matrices: integers, float16 (only without loss) or float32 (none).  [default: 4]",
)
@click.option("--lm-bits", type=click.Choice(["4", "8", "16", "32"]), help="Of the LM head.  [default: 8 with 4 bits]")
@click.option(
    "--block",
    type=click.Choice(["32", "64", "128", "channel"]),
    default="64",
    show_default=True,
    help="Inputs that share a scale.",
)
@click.option(
    "--method", type=click.Choice(["rtn", "mse", "hqq"]), default="mse", show_default=True, help="How to round."
)
@click.option(
    "--check/--no-check",
    default=None,
    help="Compare the engine's tokens with the reference's.  [default: where the engine takes less than 1 GB]",
)
@click.option("--force", is_flag=True, help="Replace an existing package, or an empty directory.")
@click.option("--json", "json_file", metavar="FILE", help="Also write the report as JSON; - is stdout.")
@output.quiet_option
def mnn_llm(
    source: str,
    target: Path,
    revision: str | None,
    bits: str | None,
    lm_bits: str | None,
    block: str,
    method: str,
    check: bool | None,
    force: bool,
    json_file: str | None,
    quiet: bool,
) -> None:
    """Make the folder that MNN's LLM engine runs, the engine in its Android and iOS apps.

    From a checkpoint (a directory or hub id) or a bundle; a quantized bundle keeps its integers. The folder holds
    llm.mnn, llm.mnn.weight, the embedding, tokenizer.mtok, config.json, llm_config.json and a manifest. A part of one
    matrix is in memory at a time. Before the folder appears, MNN loads it and continues 20 prompts, which must be what
    the reference says.

    \b
    Examples:
      glmexport package mnn-llm chatglm-6b/ -o phone/
      glmexport package mnn-llm chatglm-6b/ -o exact/ --bits 16 --check
      glmexport package mnn-llm int4/ -o phone/ --json report.json
    """
    from glmexport.mnn.converter import mnn_version
    from glmexport.mnn_llm.inputs import open_input
    from glmexport.mnn_llm.package import ALWAYS, AUTO, NEVER, PackageOptions, expected_bytes, write_package

    mnn_version()  # before anything is fetched or opened
    if not target.name:
        raise click.BadParameter("the name of a directory to make is needed.", param_hint="--output")
    if json_file not in (None, "-"):
        output.demand_writable(Path(str(json_file)), apart_from=target)
    notice = output.notifier(quiet)
    options = PackageOptions(
        bits=32 if bits == "none" else int(bits or 4),
        head_bits=None if lm_bits is None else int(lm_bits),
        block=block if block == "channel" else int(block),
        method=method,
        check=AUTO if check is None else ALWAYS if check else NEVER,
    )
    with open_input(source, revision, target, notice) as found:
        if found.source.integers and (bits or lm_bits):
            raise GlmExportError(
                f"{source} is quantized already and keeps its integers; leave out --bits and --lm-bits."
            )
        with output.progress(quiet, expected_bytes(found.source, options), "of the package") as advance:
            written = write_package(
                found.source,
                found.reference,
                target,
                options,
                force=force,
                check=found.check,
                notice=notice,
                advance=advance,
            )
    if json_file is not None:
        output.write_json(json_file, written.as_json())
    if json_file != "-":
        result = written.result
        compared = "not compared" if result is None else f"{result.same} of {result.count} tokens the reference's"
        click.echo(f"MNN {written.mnn}, {written.form}: {compared}")
        total = sum(written.files.values())
        click.echo(f"{target}: {len(written.files)} files, {size_in_words(total)}")
