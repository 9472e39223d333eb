"""`glmexport show`."""

from __future__ import annotations

import click

from glmexport.cli import model_options, output


@click.command(name="show")
@click.argument("name")
@click.option("--modelfile", is_flag=True, help="As a Modelfile.")
@model_options.server_options
def command(name: str, modelfile: bool, host: str | None, api_key: str | None, quiet: bool) -> None:
    """Show what the model NAME is made of and how it is asked.

    \b
    Examples:
      glmexport show mario
      glmexport show mario --modelfile > Modelfile
    """
    server = model_options.running(host, api_key)
    if server is not None:
        facts = server.ask("POST", "/api/show", {"model": name})
        click.echo(output.printable(facts["modelfile"]), nl=False)
        if not modelfile:
            details = facts["details"]
            click.echo(f"# {details['parameter_size']} parameters, {output.printable(details['quantization_level'])}")
        return
    entry = model_options.store().get(name)
    if entry is None:
        raise model_options.no_model(name)
    click.echo(output.printable(entry.modelfile.text()), nl=False)
    if not modelfile:
        from glmexport.bundle import open_bundle
        from glmexport.inventory import form_in_words

        click.echo(f"# {output.printable(form_in_words(open_bundle(entry.bundle)))}")
