"""The models that were created: one small text each, in a directory of the user's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glmexport import names
from glmexport.bundle import MAX_MANIFEST_BYTES, looks_like_bundle, open_bundle
from glmexport.errors import GlmExportError
from glmexport.serve.defaults import options_of
from glmexport.serve.model_names import split_name
from glmexport.serve.modelfile import Modelfile, modelfile_from_json
from glmexport.untrusted import parse_json, quoted, read_small_file

HOME = "GLMEXPORT_HOME"
MAX_MODELFILE_BYTES = 4 << 20
_MODELS, BUNDLES = "models", "bundles"


@dataclass(frozen=True)
class Entry:
    """A model by name. bundle: its directory. modified: seconds since 1970. created: whether it lies in the store."""

    name: str
    bundle: Path
    modelfile: Modelfile
    modified: float
    created: bool = True

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what it is made from and how it is asked. Raises CheckpointError: no manifest to read."""
        manifest = read_small_file(self.bundle / names.MANIFEST, MAX_MANIFEST_BYTES)
        return hashlib.sha256(manifest + self.modelfile.text().encode()).hexdigest()


def default_home() -> Path:
    """Where models and cached bundles are: `$GLMEXPORT_HOME`, else `~/.glmexport`."""
    return Path(os.environ.get(HOME) or Path.home() / ".glmexport")


class Store:
    """Created models: `<home>/models/<name>/<tag>` says in JSON what a Modelfile says, with the bundle's whole path.

    Bundles stay where they are: a model takes a few hundred bytes, and removing it removes no weights. Made bundles lie
    in `<home>/bundles`. Every method reads the disk anew, so that commands and a running server agree.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.bundles = home / BUNDLES
        self._models = home / _MODELS

    def list(self) -> list[Entry]:
        """Every model, by name; what cannot be read is left out."""
        found = []
        for path in sorted(self._models.glob("*/*")) if self._models.is_dir() else []:
            try:
                found.append(self.get(f"{path.parent.name}:{path.name}"))
            except GlmExportError:
                continue
        return [entry for entry in found if entry is not None]

    def get(self, name: str) -> Entry | None:
        """A model, None where there is none of that name. Raises GlmExportError for no name, or a damaged entry."""
        path = self._path(name)
        if not path.is_file():
            return None
        values = parse_json(read_small_file(path, MAX_MODELFILE_BYTES), str(path))
        modelfile = modelfile_from_json(values, str(path))
        return Entry(":".join(split_name(name)), Path(modelfile.source), modelfile, path.stat().st_mtime)

    def create(self, name: str, modelfile: Modelfile, known: Mapping[str, Entry], *, within: Path | None) -> Entry:
        """Write a model, over one of the same name.

        modelfile: FROM names a model of the store or of `known`, or a bundle's directory. within: that a directory must
        lie in, and that a relative one starts from; None for any, from the working directory.
        Raises GlmExportError: no name, no such bundle, a file system that refuses.
        """
        base = self._base(modelfile.source, known, within)
        options_of(modelfile.parameters)  # values that are none are refused now and not at every question
        return self.copy(dataclasses.replace(base, modelfile=modelfile.over(base.modelfile)), name)

    def copy(self, entry: Entry, name: str) -> Entry:
        """Write a model that is there under another name. Raises GlmExportError as `create` does."""
        path = self._path(name)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        values = entry.modelfile.with_source(str(entry.bundle)).to_json()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(values, ensure_ascii=False), "utf-8")
            draft.replace(path)
        except OSError as error:
            raise GlmExportError(f"{path} could not be written ({error.strerror}); check {self.home}.") from error
        written = self.get(name)
        if written is None:
            raise GlmExportError(f"{path} was removed while it was written; create it again.")
        return written

    def remove(self, name: str) -> bool:
        """Forget a model; whether there was one. Its bundle stays."""
        path = self._path(name)
        try:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise GlmExportError(f"{path} could not be removed ({error.strerror}); check {self.home}.") from error
        return True

    def _base(self, source: str, known: Mapping[str, Entry], within: Path | None) -> Entry:
        """What FROM names: a model, or a directory that is checked to be a bundle."""
        try:
            name = ":".join(split_name(source))
            entry = known.get(name) or self.get(name)
            if entry is not None:
                return entry
        except GlmExportError:
            pass  # no name; a path then
        directory = Path(source).expanduser() if within is None else within / source
        directory = directory.resolve()
        if within is not None and not directory.is_relative_to(within.resolve()):
            raise GlmExportError(
                f"FROM {quoted(source)} is neither a model here nor a bundle in the model store; over HTTP nothing "
                "else is read (`glmexport create` takes any bundle)."
            )
        if not looks_like_bundle(directory):
            where = "the model store" if within is not None else str(directory)
            raise GlmExportError(
                f"FROM {quoted(source)} is neither a model here nor a bundle in {where}; see `glmexport list`."
            )
        open_bundle(directory)  # a damaged one is refused now and not at the first question
        return Entry(source, directory, Modelfile(str(directory)), 0.0)

    def _path(self, name: str) -> Path:
        return self._models.joinpath(*split_name(name))
