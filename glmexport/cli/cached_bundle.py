"""From what `glmexport run` is given to a bundle: a model, a bundle, or what is made of a checkpoint once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from glmexport import names
from glmexport.cli import model_options, output
from glmexport.errors import GlmExportError
from glmexport.serve.modelfile import Modelfile

FORM = "slim-bf16-int4-ort"
"""What is made of a checkpoint: the smallest form, which answers as well as the others (see the README), and the
quickest graphs."""


def model_of(given: str, revision: str | None, *, quiet: bool) -> tuple[Path, Modelfile]:
    """(bundle, how it is asked) of a name, a bundle's directory, a checkpoint's, or a hub id.

    Raises GlmExportError where it is none of them, or a checkpoint that no bundle can be made of.
    """
    from glmexport.bundle import looks_like_bundle
    from glmexport.hub import is_hub_id

    path = Path(given)
    if looks_like_bundle(path):
        return path, Modelfile(given)
    if path.is_dir():
        return _made_once(path, f"{path.resolve().name}-{_key(path)}", None, quiet=quiet), Modelfile(given)
    try:
        entry = model_options.store().get(given)
    except GlmExportError:
        entry = None
    if entry is not None:
        return entry.bundle, entry.modelfile
    if is_hub_id(given):
        name = given.replace("/", "--") + (f"@{revision.replace('/', '--')}" if revision else "")
        return _made_once(given, name, revision, quiet=quiet), Modelfile(given)
    raise GlmExportError(
        f"{given!r:.80} is no model, no directory and no hub id such as zai-org/chatglm-6b; `glmexport list` shows the "
        "models."
    )


def _made_once(checkpoint: str | Path, name: str, revision: str | None, *, quiet: bool) -> Path:
    """The int4 bundle of a checkpoint, made where it is not there yet. A hub id's is not made anew when it changes."""
    from glmexport.bundle import looks_like_bundle

    directory = model_options.store().bundles / f"{name}-{FORM}"
    if looks_like_bundle(directory):
        return directory
    # here: it takes torch, and a second run does not need it
    from glmexport.api import passes_of
    from glmexport.checkpoint import open_checkpoint
    from glmexport.form import FLOAT32
    from glmexport.recipe import DEFAULT_GROUP_SIZE
    from glmexport.splitter import SplitOptions, plan_split, split

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GlmExportError(f"{directory.parent} cannot be made ({error.strerror}); set GLMEXPORT_HOME.") from error
    notice = output.notifier(quiet)
    notice(f"The int4 bundle of {checkpoint} is made once, in {directory}.")
    with open_checkpoint(checkpoint, revision) as source:
        passes = passes_of(True, "bf16", "int4", DEFAULT_GROUP_SIZE, FLOAT32, source.config.num_blocks)
        options = SplitOptions(passes=passes, flavor=names.ORT)
        with output.progress(quiet, plan_split(source, options).disk, "of the bundle") as advance:
            split(source, directory, options, notice=notice, advance=advance)
    return directory


def _key(directory: Path) -> str:
    """8 hex digits that change with a checkpoint's place and files."""
    facts = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in directory.iterdir())
    return hashlib.sha256(repr((str(directory.resolve()), facts)).encode()).hexdigest()[:8]
