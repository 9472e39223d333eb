"""`glmexport patches`."""

from __future__ import annotations

import click

from glmexport import names
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
                **{
                    key: [{"name": transform.name, "summary": transform.summary} for transform in transforms]
                    for key, transforms in (
                        ("transforms", patch.transforms),
                        ("in_place_transforms", patch.in_place_transforms),
                    )
                },
            }
            for patch in patches
        ]
        output.write_json("-", document)
        return
    console = output.console()
    for patch in patches:
        console.print(f"[bold]{patch.name}[/]  {patch.title}", markup=True)
        for flavor, transforms in ((names.PORTABLE, patch.transforms), (names.ORT, patch.in_place_transforms)):
            listing = output.table(f"transform for {flavor} graphs", "what it replaces")
            for transform in transforms:
                listing.add_row(f"  {transform.name}", transform.summary.replace("[", r"\["))
            if transforms:
                console.print(listing)
