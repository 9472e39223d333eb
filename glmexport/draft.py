"""A bundle about to be written: every step, `split` and each pass, is a function that gives one of these.

A draft is cheap. Weights are tensors that know how to give their bytes, graphs are made when they are written, and what
a pass leaves alone is linked to the file of the bundle it came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import onnx

from glmexport import __version__, names
from glmexport.bundle import MAX_SMALL_BYTES, SCHEMA, Bundle, LinkedFile, demand_onnx
from glmexport.config import ModelConfig
from glmexport.errors import BundleError
from glmexport.form import FLOAT32, RAW_DTYPES, WEIGHTS, Form
from glmexport.graph_lint import operator_inventory
from glmexport.onnx_files import (
    ExternalTensor,
    aligned_size,
    external_initializer,
    load_graph,
    stored_bytes,
)
from glmexport.stored import stored_tensors
from glmexport.tensors import FileTensor, Matrix, Tensor
from glmexport.untrusted import read_small_file

GRAPH_FILE_BYTES = 32 << 10
"""More than one graph file has without its weights (a quantized block at opset 14 has 23 kB), for estimates."""

Record = Callable[[], Mapping[str, Any]]
Notice = Callable[[str], None]
MakeModel = Callable[[], onnx.ModelProto]


def ignore_notice(message: str) -> None:
    """Drop a notice."""


@dataclass(frozen=True)
class GraphDraft:
    """One graph to be written.

    tensors: stored beside the graph, in this order; those in `matrices` excepted, each is a Matrix or a small vector.
    parameters: of the model, in this graph. models: flavor -> what makes its graph, with small constants and without
    `tensors`, which all flavors read. matrices: name of each quantized matrix -> what the manifest says of it, asked
    for when its tensors are written. graph_links: flavor -> file that holds exactly that already; data_link: likewise.
    """

    name: str
    tensors: tuple[Tensor, ...]
    parameters: int
    models: Mapping[str, MakeModel]
    matrices: Mapping[str, Record] = field(default_factory=dict)
    graph_links: Mapping[str, LinkedFile] = field(default_factory=dict)
    data_link: LinkedFile | None = None

    def changed(self, change: Callable[[onnx.ModelProto], onnx.ModelProto], **changes: Any) -> GraphDraft:
        """A draft with other contents, and so without the links. change: made to the graph of every flavor."""
        models = {flavor: _then(make, change) for flavor, make in self.models.items()}
        return dataclasses.replace(self, **{"models": models, "graph_links": {}, "data_link": None, **changes})

    def with_model(self, flavor: str, make: MakeModel) -> GraphDraft:
        """A draft with another graph in one flavor; its data stays."""
        links = {other: link for other, link in self.graph_links.items() if other != flavor}
        return dataclasses.replace(self, models={**self.models, flavor: make}, graph_links=links)

    def graph_bytes(self) -> int:
        """Size of the graph files, but for some digits of their offsets; makes the graphs."""
        places = [
            ExternalTensor(tensor.name, tensor.dtype, tensor.shape, names.data_file(self.name), 1 << 30, 1 << 30)
            for tensor in self.tensors
        ]
        return sum(len(with_tensors(make(), places).SerializeToString()) for make in self.models.values())

    @property
    def data_bytes(self) -> int:
        """Size of the data file."""
        return aligned_size(stored_bytes(tensor.dtype, tensor.shape) for tensor in self.tensors)


def _then(make: MakeModel, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> MakeModel:
    return lambda: change(make())


def with_tensors(model: onnx.ModelProto, places: Iterable[ExternalTensor]) -> onnx.ModelProto:
    """`model` made whole by tensors that lie at `places`, in place; returns it."""
    model.graph.initializer.extend(external_initializer(place) for place in places)
    return model


@dataclass(frozen=True)
class BundleDraft:
    """A bundle to be written.

    facts: what the manifest says beside config, form, graphs and files. files: everything that is no graph: name ->
    bytes, a tensor whose slices are the file, or a file that holds exactly this already.
    """

    facts: Mapping[str, Any]
    config: ModelConfig
    form: Form
    graphs: tuple[GraphDraft, ...]
    files: Mapping[str, bytes | Tensor | LinkedFile]

    def graph(self, name: str) -> GraphDraft | None:
        """The graph of that name."""
        return next((graph for graph in self.graphs if graph.name == name), None)

    def with_graph(self, changed: GraphDraft) -> BundleDraft:
        """The draft with one graph replaced by another of its name."""
        graphs = tuple(changed if graph.name == changed.name else graph for graph in self.graphs)
        return dataclasses.replace(self, graphs=graphs)

    def read_file(self, name: str) -> bytes:
        """The content of a small file. Raises CheckpointError where it cannot be read."""
        content = self.files[name]
        if isinstance(content, bytes):
            return content
        if not isinstance(content, LinkedFile):
            raise TypeError(f"{name} is a tensor")
        return read_small_file(content.path, MAX_SMALL_BYTES)

    def table(self) -> Tensor:
        """The raw embedding [vocab, hidden] as it is stored: uint16 for bfloat16. Raises KeyError without one."""
        name = self.form.embedding_file or ""
        content = self.files[name]
        if not isinstance(content, LinkedFile):
            return content  # type: ignore[return-value]  # a table is never given as bytes
        dtype = RAW_DTYPES[self.form.embedding.dtype].numpy
        shape = (self.config.vocab_size, self.config.hidden_size)
        place = ExternalTensor(name, dtype, shape, content.path.name, 0, content.record.bytes)
        return FileTensor(content.path.parent, place)

    def with_step(self, step: str, **options: Any) -> BundleDraft:
        """The draft with one more step in its history."""
        history = [*self.facts["history"], {"step": step, **options}]
        return dataclasses.replace(self, facts={**self.facts, "history": history})

    @property
    def argmax(self) -> str:
        """What the LM head gives."""
        return str(self.facts["argmax"])

    @property
    def opset(self) -> int:
        """Of every graph."""
        return int(self.facts["opset"])

    def sizes(self) -> dict[str, int]:
        """File name -> bytes; graph files and the manifest are estimates. Files that will be links count too.

        Data that flavors share is there under each of its names; see `shared_data`.
        """
        sizes: dict[str, int] = {}
        for graph in self.graphs:
            for flavor in graph.models:
                sizes[names.in_flavor(names.graph_file(graph.name), flavor)] = GRAPH_FILE_BYTES
                sizes[names.in_flavor(names.data_file(graph.name), flavor)] = graph.data_bytes
        for name, content in self.files.items():
            sizes[name] = _size(content)
        sizes[names.MANIFEST] = 3072 * (len(self.graphs) + 1)
        return sizes

    def shared_data(self) -> set[str]:
        """Names of data files that are another flavor's as well, under the name that comes first."""
        return {
            names.in_flavor(names.data_file(graph.name), flavor)
            for graph in self.graphs
            for flavor in [*graph.models][1:]
        }

    def manifest(self, graphs: list[dict[str, Any]]) -> dict[str, Any]:
        """The manifest but for its record of files."""
        return {
            "schema": SCHEMA,
            "glmexport": __version__,
            "architecture": self.facts["architecture"],
            "model": dataclasses.asdict(self.config),
            **self.form.as_json(),
            **{key: value for key, value in self.facts.items() if key != "architecture"},
            "graphs": graphs,
        }


def graph_entry(draft: BundleDraft, graph: GraphDraft, models: Mapping[str, onnx.ModelProto]) -> dict[str, Any]:
    """What the manifest says of a graph. models: flavor -> graph; of the second, what differs is under its name."""
    entry: dict[str, Any] = {"name": graph.name, "kind": names.graph_kind(graph.name)}
    block_id = names.block_id_of(graph.name)
    if block_id is not None:
        entry["block_id"] = block_id
    matrices = {name: dict(record()) for name, record in graph.matrices.items()}
    first, *others = (_flavor_entry(draft, graph.name, flavor, model) for flavor, model in models.items())
    return {
        **entry,
        **first,
        "weights": _weights_in_words(matrices, draft.form),
        "parameters": graph.parameters,
        "transposed": sorted(tensor.name for tensor in graph.tensors if getattr(tensor, "transposed", False)),
        "matrices": matrices,
        **dict(zip(list(models)[1:], others, strict=True)),
    }


def _flavor_entry(draft: BundleDraft, graph: str, flavor: str, model: onnx.ModelProto) -> dict[str, Any]:
    spec = draft.form.spec_of(graph, draft.config, draft.argmax, flavor)
    return {
        "file": names.in_flavor(names.graph_file(graph), flavor),
        "data": names.in_flavor(names.data_file(graph), flavor),
        "inputs": [_plain(dataclasses.asdict(tensor)) for tensor in spec.inputs],
        "outputs": [_plain(dataclasses.asdict(tensor)) for tensor in spec.outputs],
        "operators": operator_inventory(model),
    }


def draft_of_bundle(bundle: Bundle) -> BundleDraft:
    """The bundle as it is, every file a link.

    Raises BundleError for graphs that cannot be read, point elsewhere, or are not ONNX.
    """
    demand_onnx(bundle)
    graphs = tuple(_graph_of_bundle(bundle, entry) for entry in bundle.graphs)
    owned = {one[key] for entry in bundle.graphs for one in bundle.flavored(entry).values() for key in ("file", "data")}
    files: dict[str, bytes | Tensor | LinkedFile] = {
        name: bundle.link(name) for name in bundle.files if name not in owned
    }
    facts = {key: bundle.manifest[key] for key in FACTS}
    return BundleDraft(facts, bundle.config, bundle.form, graphs, files)


FACTS = ("architecture", "tied", "opset", "argmax", "tokenizer", "checkpoint", "tools", "history")
"""Keys of the manifest that steps carry over, in its order."""


def _graph_of_bundle(bundle: Bundle, entry: Mapping[str, Any]) -> GraphDraft:
    flavored = bundle.flavored(entry)
    models = {flavor: load_graph(bundle.whole_path(one["file"])) for flavor, one in flavored.items()}
    stored = [stored_tensors(bundle, models[flavor], one) for flavor, one in flavored.items()]
    if any(_without_location(others) != _without_location(stored[0]) for others in stored[1:]):
        raise BundleError(f"The flavors of {entry['name']} do not read the same weights; split the bundle again.")
    transposed = set(entry["transposed"])
    return GraphDraft(
        name=entry["name"],
        tensors=tuple(
            FileTensor(bundle.directory, place, place.name in transposed, bundle.beyond_cache)
            for place in sorted(stored[0].values(), key=lambda place: place.offset)
        ),
        parameters=entry["parameters"],
        models={flavor: partial(_without_weights, model) for flavor, model in models.items()},
        matrices={name: _constant(record) for name, record in entry["matrices"].items()},
        graph_links={flavor: bundle.link(one["file"]) for flavor, one in flavored.items()},
        data_link=bundle.link(entry["data"]),
    )


def _without_location(places: Mapping[str, ExternalTensor]) -> dict[str, ExternalTensor]:
    return {name: dataclasses.replace(place, location="") for name, place in places.items()}


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    inline = [tensor for tensor in model.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(inline)
    return bare


def _constant(record: Mapping[str, Any]) -> Record:
    return lambda: record


def _weights_in_words(matrices: Mapping[str, Mapping[str, Any]], form: Form) -> str:
    kinds = sorted({f"int{record['bits']}" for record in matrices.values()})
    return ", ".join(dict.fromkeys([*kinds, form.weights, "float32"] if form.dtype == FLOAT32 else [form.dtype]))


def _size(content: bytes | Tensor | LinkedFile) -> int:
    if isinstance(content, bytes):
        return len(content)
    return content.record.bytes if isinstance(content, LinkedFile) else stored_bytes(content.dtype, content.shape)


def _plain(tensor: dict[str, Any]) -> dict[str, Any]:
    return {**tensor, "shape": list(tensor["shape"])}  # as JSON gives it back


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor is a float32 or float16 matrix of the model, which passes may round or quantize."""
    return len(tensor.shape) == 2 and tensor.dtype in WEIGHTS and hasattr(tensor, "bands")


def as_matrix(tensor: Tensor) -> Matrix:
    """The tensor as a Matrix. Raises BundleError where it is none."""
    if not is_matrix(tensor):
        raise BundleError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected a matrix of floats.")
    return tensor  # type: ignore[return-value]  # what is_matrix says
