"""The bundle as it is read: a directory with `manifest.json`, whose every claim is checked before it is believed."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from glmexport import names
from glmexport.ahead import read_ahead
from glmexport.config import ModelConfig, SpecialIds, implausible_sizes
from glmexport.direct_file import OffsetFile, beyond_cache
from glmexport.errors import BundleError, GlmExportError, reason_of
from glmexport.form import GRAPH, RAW_DTYPES, Form, form_from_json
from glmexport.interface import ARGMAX_MODES
from glmexport.recipe import affine_of_record
from glmexport.untrusted import load_json, read_small_file

SCHEMA = 2
MAX_COUNT = 1 << 62
MAX_MANIFEST_BYTES = 16 << 20
MAX_SMALL_BYTES = 64 << 20
MAX_NAME = 200
HASH_CHUNK = 1 << 22
DIGEST = "digest"
_NOTHING = "no such file"
_DIGESTED = re.compile(rb'(.*),\n "digest": "([0-9a-f]{64})"\n}\n', re.DOTALL)

DataT = TypeVar("DataT")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class LinkedFile:
    """A file of an existing bundle, which another bundle may share."""

    path: Path
    record: FileRecord


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and the parsed manifest.

    config: of the model in the bundle: sizes and ids are those of a slimmed vocabulary. form: what passes made of it.
    graphs: one entry a graph, in the order in which data flows (see README, "The manifest").
    files: every file but the manifest itself.
    """

    directory: Path
    manifest: Mapping[str, Any]
    config: ModelConfig
    form: Form
    graphs: tuple[Mapping[str, Any], ...]
    files: Mapping[str, FileRecord]

    @property
    def runtime(self) -> str:
        """What its graphs are for (`names.RUNTIMES`)."""
        return _runtime_of(self.manifest)

    @property
    def opset(self) -> int:
        """Opset of every graph; for MNN, of those that they were converted from."""
        return int(self.manifest["opset"])

    @property
    def argmax(self) -> str:
        """What the LM head gives: `none` (logits), `also` or `only`."""
        return str(self.manifest["argmax"])

    @property
    def flavors(self) -> tuple[str, ...]:
        """Of its graphs, of `names.FLAVORS` and in their order."""
        return self.form.flavors

    def flavored(self, entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """Flavor -> what an entry of `graphs` says of the graph in it: file, data, inputs, outputs, operators."""
        return _flavored(entry, self.form)

    @property
    def graph_sizes(self) -> dict[str, int]:
        """Bytes of every graph of the first flavor with its data, in the order of the data."""
        return self.sizes_of(self.flavors[0])

    def sizes_of(self, flavor: str) -> dict[str, int]:
        """The same of another flavor."""
        entries = {entry["name"]: self.flavored(entry)[flavor] for entry in self.graphs}
        return {name: self.files[one["file"]].bytes + self.files[one["data"]].bytes for name, one in entries.items()}

    @property
    def total_bytes(self) -> int:
        """Bytes of all files but the manifest; what two flavors share counts once."""
        return sum(self.distinct_sizes.values())

    @property
    def distinct_sizes(self) -> dict[str, int]:
        """File -> bytes, without the data of a flavor that another one has too: on disk they are one file."""
        data = names.data_file("")
        shared = {name for name in self.files if "/" in name and name.endswith(data) and Path(name).name in self.files}
        return {name: record.bytes for name, record in self.files.items() if name not in shared}

    @property
    def beyond_cache(self) -> bool:
        """Whether its files are to be read past the page cache."""
        return beyond_cache(self.total_bytes)

    def path(self, name: str) -> Path:
        """Path of one of the bundle's files."""
        return self.directory / name

    def whole_path(self, name: str) -> Path:
        """Path of one of the bundle's files, for whoever reads it without hashing it.

        Raises BundleError unless it is a file of the bundle's own, no link, and of the size in the manifest.
        """
        path = self.path(name)
        try:
            found = _kind_or_size(path)
        except OSError as error:
            raise BundleError(f"{path} could not be read ({error.strerror}); copy the bundle again.") from error
        if found != f"{self.files[name].bytes} bytes":
            raise BundleError(
                f"{path}: found {found}, expected {self.files[name].bytes} bytes; copy the bundle or split again "
                "(`glmexport inspect --check` looks at every file)."
            )
        return path

    def read_small(self, name: str) -> bytes:
        """The content of a file that is no graph's and no table. Raises BundleError or CheckpointError."""
        return read_small_file(self.whole_path(name), MAX_SMALL_BYTES)

    def link(self, name: str) -> LinkedFile:
        """One of the bundle's files, for another bundle to share. Raises BundleError as `whole_path` does."""
        return LinkedFile(self.whole_path(name), self.files[name])

    def graph(self, name: str, flavor: str | None = None) -> Mapping[str, Any]:
        """The manifest's entry of a graph. Raises KeyError where the bundle has no such graph.

        flavor: whose file, data, inputs, outputs and operators it has; None for the first that there is.
        """
        entry = next(entry for entry in self.graphs if entry["name"] == name)
        return entry if flavor is None else {**entry, **self.flavored(entry)[flavor]}


def looks_like_bundle(directory: Path) -> bool:
    """Whether a directory holds a manifest of ours."""
    return (directory / names.MANIFEST).is_file()


def open_bundle(directory: Path) -> Bundle:
    """Read and check the manifest. Raises BundleError where it is absent, damaged, or names files outside."""
    path = directory / names.MANIFEST
    try:
        if not _kind_or_size(path).endswith(" bytes"):
            raise BundleError(f"{directory} is not a bundle (no {names.MANIFEST}); make one with `glmexport split`.")
        size = path.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} has {size} bytes, expected at most {MAX_MANIFEST_BYTES}; copy or split again.")
        manifest = load_json(path.read_text("utf-8"))
        if "kind" in manifest:
            raise BundleError(
                f"{directory} is a package of the kind {manifest['kind']!r:.80}, no bundle; give what it was made from."
            )
        if manifest["schema"] != SCHEMA:
            raise BundleError(
                f"{path} has schema {manifest['schema']!r:.80}, expected {SCHEMA}; it was written by another version "
                f"of glmexport ({manifest.get('glmexport')!r:.80}): use that version or split again."
            )
        config, form, graphs, files = _parts_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{path} is not a manifest that glmexport wrote ({type(error).__name__}: {reason_of(error)}); copy or "
            "split again."
        ) from error
    except OSError as error:
        raise BundleError(f"{path} could not be read ({error.strerror}); copy the bundle again.") from error
    for name in files:
        plain = name.removeprefix(f"{names.ORT}/")
        taken = plain in ("", ".", "..", names.MANIFEST, names.ORT)
        if Path(plain).name != plain or taken or not name.isprintable() or not 0 < len(name) < MAX_NAME:
            raise BundleError(f"{path} lists the file {name!r:.80}, expected plain names of files beside the manifest.")
    flavored = [one for graph in graphs for one in _flavored(graph, form).values()]
    unlisted = sorted({one[key] for one in flavored for key in ("file", "data")} - set(files))
    if unlisted:
        raise BundleError(f"{path} has graphs in files that it does not list: {', '.join(unlisted)}; split again.")
    has_embedding = form.embedding.kind == GRAPH
    # the number is compared first: a damaged one could ask for a list of any length
    expected = config.num_blocks + 1 + has_embedding
    expected_names = names.graph_names(config.num_blocks, has_embedding) if len(graphs) == expected else ()
    runtime = _runtime_of(manifest)
    if not expected_names or not all(
        _is_graph(entry, name, runtime, form) for entry, name in zip(graphs, expected_names, strict=True)
    ):
        raise BundleError(
            f"{path} lists {len(graphs)} graphs, expected {f'{names.EMBEDDING}, ' * has_embedding}{config.num_blocks} "
            f"blocks and {names.HEAD} in this order, each with files of its name; split again."
        )
    if form.embedding_file is not None:
        _demand_table(path, form.embedding_file, files, config, form)
    _demand_room(path, graphs, files, config)
    return Bundle(directory, manifest, config, form, graphs, files)


def _demand_room(
    path: Path, graphs: Sequence[Mapping[str, Any]], files: Mapping[str, FileRecord], config: ModelConfig
) -> None:
    """Refuse sizes of a model that the graphs' files cannot hold, at four bits a weight, before they are believed."""
    least = {names.HEAD: config.vocab_size * config.hidden_size}
    block = config.hidden_size * (config.hidden_size + config.inner_size)
    for graph in graphs:
        needed = least.get(graph["name"], 0 if graph["name"] == names.EMBEDDING else block) // 2
        found = files[graph["data"]].bytes
        if found < needed:
            raise BundleError(
                f"{path} lists {found} bytes for {graph['data']}, expected at least {needed} for the sizes of the "
                "model that it states; copy or split again."
            )


def _demand_table(path: Path, name: str, files: Mapping[str, FileRecord], config: ModelConfig, form: Form) -> None:
    expected = config.vocab_size * config.hidden_size * RAW_DTYPES[form.embedding.dtype].bytes
    if name not in files or files[name].bytes != expected:
        found = f"{files[name].bytes} bytes" if name in files else "no such file"
        raise BundleError(f"{path} lists {found} for {name}, expected {expected} bytes; embed the bundle again.")


def _parts_of(manifest: Any) -> tuple[ModelConfig, Form, tuple[dict[str, Any], ...], dict[str, FileRecord]]:
    """Config, form, graphs and files, each of the type that it must have. Raises ValueError, KeyError or TypeError."""
    _demand(manifest, architecture=str, opset=int, argmax=str, tied=bool, model=dict, graphs=list, files=dict)
    _demand(manifest, tokenizer=list, checkpoint=dict, tools=dict, history=list)
    model = manifest["model"]
    config = _typed(ModelConfig, {**model, "special_ids": _typed(SpecialIds, model["special_ids"])})
    runtime = _runtime_of(manifest)
    if runtime not in names.RUNTIMES:
        raise ValueError(f"runtime is {runtime!r:.80}, expected one of {', '.join(names.RUNTIMES)}")
    if runtime == names.MNN:
        _demand(manifest["mnn"], version=str, memory=str, source=dict)
    if manifest["argmax"] not in ARGMAX_MODES:
        raise ValueError(f"argmax is {manifest['argmax']!r:.80}, expected one of {', '.join(ARGMAX_MODES)}")
    complaints = implausible_sizes(config)
    if complaints:
        raise ValueError(f"the model has {', '.join(complaints)}")
    form = form_from_json(manifest)
    if runtime == names.MNN and form.flavors != (names.PORTABLE,):
        raise ValueError("a bundle for MNN has no other flavors")
    for graph in manifest["graphs"]:
        _demand(graph, name=str, kind=str, weights=str, parameters=int, transposed=list, matrices=dict)
        for record in graph["matrices"].values():
            _demand_matrix(record) if runtime == names.ONNX else _demand_mnn_matrix(record)
        if not all(isinstance(name, str) for name in graph["transposed"]):
            raise TypeError("transposed holds something else than names")
        if not 0 <= graph["parameters"] < MAX_COUNT or not graph["weights"].isprintable():
            raise ValueError(f"{graph['name']!r:.80} has parameters or weights that no graph has")
        for one in _flavored(graph, form).values():
            _demand(one, file=str, data=str, inputs=list, outputs=list)
            for tensor in (*one["inputs"], *one["outputs"]):
                _demand(tensor, name=str, dtype=str, shape=list)
    for entry in manifest["files"].values():
        _demand(entry, bytes=int, sha256=str)
        if not 0 <= entry["bytes"] < MAX_COUNT:
            raise ValueError("a file has a size that no file has")
    if not manifest["architecture"].isprintable() or not 0 < config.layernorm_epsilon < 1:
        raise ValueError("the architecture or the layernorm epsilon is none")
    files = {name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    if form.slim is not None and form.slim.vocabulary.size != config.vocab_size:
        raise ValueError(f"the vocabulary keeps {form.slim.vocabulary.size} rows and the model has {config.vocab_size}")
    return config, form, tuple(manifest["graphs"]), files


def _demand_mnn_matrix(record: Any) -> None:
    _demand(record, bits=int, block=int, symmetric=bool, rounded=bool, bytes=int, offset=int)
    sizes = (record["block"], record["bytes"], record["offset"])
    if record["bits"] not in (4, 8, 16, 32) or not all(0 <= size < MAX_COUNT for size in sizes):
        raise ValueError(f"a matrix is stored as {record!r:.80}")


def _demand_matrix(record: Any) -> None:
    _demand(record, bytes=int)
    try:
        affine_of_record(record)
    except GlmExportError as error:
        raise ValueError(str(error)) from error


def _flavored(entry: Mapping[str, Any], form: Form) -> dict[str, Mapping[str, Any]]:
    """What the first flavor has is the entry's own; of another it is under its name."""
    first, *others = form.flavors
    return {first: entry, **{flavor: entry[flavor] for flavor in others}}


def _is_graph(entry: Mapping[str, Any], name: str, runtime: str, form: Form) -> bool:
    files = names.graph_file(name, runtime), names.data_file(name, runtime)
    return entry["name"] == name and all(
        (one["file"], one["data"]) == tuple(names.in_flavor(file, flavor) for file in files)
        for flavor, one in _flavored(entry, form).items()
    )


def _runtime_of(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("runtime", names.ONNX))  # bundles of ONNX graphs do not say


def demand_onnx(bundle: Bundle) -> None:
    """Raise BundleError for a bundle that holds no ONNX graphs."""
    if bundle.runtime != names.ONNX:
        raise BundleError(
            f"{bundle.directory} is for {bundle.runtime.upper()} and holds no ONNX graphs, which this needs; give the "
            "bundle that it was converted from."
        )


def demand_portable(bundle: Bundle) -> None:
    """Raise BundleError for a bundle without ONNX graphs that any runtime runs."""
    demand_onnx(bundle)
    if names.PORTABLE not in bundle.flavors:
        raise BundleError(
            f"{bundle.directory} has graphs of the flavor {' and '.join(bundle.flavors)} alone, and this needs "
            f"{names.PORTABLE} ones; split with --flavor both."
        )


def _demand(entry: Any, **kinds: type) -> None:
    for key, kind in kinds.items():
        if type(entry[key]) is not kind:
            raise TypeError(f"{key} is {entry[key]!r:.80}, expected {kind.__name__}")


def _typed(kind: type[DataT], values: dict[str, Any]) -> DataT:
    """A dataclass from JSON values; each must be of exactly the type of its field."""
    _demand(values, **get_type_hints(kind))
    return kind(**values)


def manifest_text(document: Mapping[str, Any]) -> str:
    """The text of `manifest.json`: the document, and last the SHA-256 of all that stands before it."""
    rest = {key: value for key, value in document.items() if key != DIGEST}
    head = json.dumps(rest, ensure_ascii=False, indent=1).removesuffix("\n}")
    return f'{head},\n "{DIGEST}": "{hashlib.sha256(head.encode()).hexdigest()}"\n}}\n'


def _is_whole_manifest(path: Path) -> bool:
    """Whether every byte is as `manifest_text` wrote it. Raises OSError."""
    match = _DIGESTED.fullmatch(path.read_bytes())
    return match is not None and hashlib.sha256(match[1]).hexdigest().encode() == match[2]


def check_files(bundle: Bundle) -> Iterator[tuple[str, str | None]]:
    """Compare every file with the manifest; yields (name, complaint or None) as each is done, surplus files last.

    The manifest is the first, held against the digest at its own end.
    """
    try:
        whole = _is_whole_manifest(bundle.path(names.MANIFEST))
        yield names.MANIFEST, None if whole else f"{names.MANIFEST} was changed: it does not have its own digest."
    except OSError as error:
        yield names.MANIFEST, f"{names.MANIFEST} could not be read: {error.strerror}."
    whole_files: set[tuple[int, int, FileRecord]] = set()  # flavors share their data, which is read once
    for name, record in bundle.files.items():
        try:
            path = bundle.path(name)
            identity = (*_place_of(path), record)
            complaint = None if identity in whole_files else _complaint(path, record, bundle.beyond_cache)
            if complaint is None:
                whole_files.add(identity)
            yield name, complaint
        except (OSError, BundleError) as error:
            yield name, f"{name} could not be read: {error}"
    try:
        found = sorted(files_below(bundle.directory))
    except OSError as error:
        raise BundleError(f"{bundle.directory} could not be listed ({error.strerror}); copy it again.") from error
    for name in found:
        if name not in bundle.files and name != names.MANIFEST:
            yield name, f"{name} is not in the manifest."


def files_below(directory: Path) -> Iterator[str]:
    """Names of all that lies in a directory, and in folders that a bundle has, as a manifest lists them.

    Raises OSError.
    """
    for entry in directory.iterdir():
        if entry.name == names.ORT and entry.is_dir() and not entry.is_symlink():
            yield from (names.in_flavor(inner.name, names.ORT) for inner in entry.iterdir())
        else:
            yield entry.name


def _place_of(path: Path) -> tuple[int, int]:
    """What tells a file from any other, whatever its names; (0, 0) where there is none. Raises OSError."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    return status.st_dev, status.st_ino


def _complaint(path: Path, record: FileRecord, direct: bool) -> str | None:
    """What is wrong with a file. Raises OSError and BundleError where it cannot be read."""
    found = _kind_or_size(path)
    if not found.endswith(" bytes"):
        return f"{names.shown(path)} is {'missing' if found == _NOTHING else found}."
    if found != f"{record.bytes} bytes":
        return f"{names.shown(path)} has {found}, the manifest says {record.bytes}."
    if sha256_of(path, direct) != record.sha256:
        return f"{names.shown(path)} was changed: its SHA-256 is not the manifest's."
    return None


def _kind_or_size(path: Path) -> str:
    """`123 bytes` of a regular file; what else is there, which nobody must open: a pipe would be waited for."""
    if path.parent.name == names.ORT and path.parent.is_symlink():
        return "a link"
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return _NOTHING
    if stat.S_ISREG(status.st_mode):
        return f"{status.st_size} bytes"
    return "a link" if stat.S_ISLNK(status.st_mode) else "no file"


def sha256_of(path: Path, direct: bool = False) -> str:
    """SHA-256 (hex) of a file, read in slices ahead of the hash. direct: past the page cache.

    Raises BundleError where reading fails.
    """
    digest = hashlib.sha256()
    try:
        with closing(OffsetFile(path, direct)) as file:
            slices = (file.read(start, HASH_CHUNK) for start in range(0, file.size(), HASH_CHUNK))
            with closing(read_ahead(slices)) as taken:
                for data in taken:
                    digest.update(data.data)
    except OSError as error:
        raise BundleError(f"{path} could not be read: {error.strerror}.") from error
    return digest.hexdigest()
