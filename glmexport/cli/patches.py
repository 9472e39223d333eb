"""`glmexport patches`."""

from __future__ import annotations

import click

from glmexport.cli import output


@click.command(name="patches")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@output.quiet_option
def command(as_json: bool, quiet: bool) -> None:
    """List the supported architectures and the transforms that make each export-friendly, in order.

    \b
    Example:
      glmexport patches
    """
    from glmexport.patch import all_patches

    patches = all_patches()
    if as_json:
        document = [
            {
                "name": patch.name,
                "title": patch.title,
                "transforms": [
                    {"name": transform.name, "summary": transform.summary} for transform in patch.transforms
                ],
            }
            for patch in patches
        ]
        output.write_json("-", document)
        return
    console = output.console()
    for patch in patches:
        console.print(f"[bold]{patch.name}[/]  {patch.title}", markup=True)
        listing = output.table("transform", "what it replaces")
        for transform in patch.transforms:
            listing.add_row(f"  {transform.name}", transform.summary.replace("[", r"\["))
        console.print(listing)
