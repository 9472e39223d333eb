"""A bundle about to be written: every step, `split` and each pass, is a function that gives one of these.

A draft is cheap. Weights are tensors that know how to give their bytes, graphs are made when they are written, and what
a pass leaves alone is linked to the file of the bundle it came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx

from glmexport import __version__, names
from glmexport.bundle import MAX_SMALL_BYTES, SCHEMA, Bundle, LinkedFile, demand_onnx
from glmexport.config import ModelConfig
from glmexport.errors import BundleError
from glmexport.form import FLOAT32, RAW_DTYPES, WEIGHTS, Form
from glmexport.graph_lint import operator_inventory
from glmexport.interface import graph_spec
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


def ignore_notice(message: str) -> None:
    """Drop a notice."""


@dataclass(frozen=True)
class GraphDraft:
    """One graph to be written.

    tensors: stored beside the graph, in this order; those in `matrices` excepted, each is a Matrix or a small vector.
    parameters: of the model, in this graph. make_model: the graph with its small constants and without `tensors`.
    matrices: name of each quantized matrix -> what the manifest says of it, asked for when its tensors are written.
    graph_link, data_link: files that hold exactly this already.
    """

    name: str
    tensors: tuple[Tensor, ...]
    parameters: int
    make_model: Callable[[], onnx.ModelProto]
    matrices: Mapping[str, Record] = field(default_factory=dict)
    graph_link: LinkedFile | None = None
    data_link: LinkedFile | None = None

    def changed(self, **changes: Any) -> GraphDraft:
        """A draft with other contents, and so without the links."""
        return dataclasses.replace(self, **{"graph_link": None, "data_link": None, **changes})

    def graph_bytes(self) -> int:
        """Size of the graph file, but for some digits of its offsets; makes the graph."""
        places = [
            ExternalTensor(tensor.name, tensor.dtype, tensor.shape, names.data_file(self.name), 1 << 30, 1 << 30)
            for tensor in self.tensors
        ]
        return len(with_tensors(self.make_model(), places).SerializeToString())

    @property
    def data_bytes(self) -> int:
        """Size of the data file."""
        return aligned_size(stored_bytes(tensor.dtype, tensor.shape) for tensor in self.tensors)


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
        """File name -> bytes; graph files and the manifest are estimates. Files that will be links count too."""
        sizes: dict[str, int] = {}
        for graph in self.graphs:
            sizes[names.graph_file(graph.name)] = GRAPH_FILE_BYTES
            sizes[names.data_file(graph.name)] = graph.data_bytes
        for name, content in self.files.items():
            sizes[name] = _size(content)
        sizes[names.MANIFEST] = 3072 * (len(self.graphs) + 1)
        return sizes

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


def graph_entry(draft: BundleDraft, graph: GraphDraft, model: onnx.ModelProto) -> dict[str, Any]:
    """What the manifest says of a graph."""
    spec = graph_spec(graph.name, draft.config, draft.argmax, draft.form.dtype)
    entry: dict[str, Any] = {"name": graph.name, "kind": spec.kind}
    block_id = names.block_id_of(graph.name)
    if block_id is not None:
        entry["block_id"] = block_id
    matrices = {name: dict(record()) for name, record in graph.matrices.items()}
    return entry | {
        "file": names.graph_file(graph.name),
        "data": names.data_file(graph.name),
        "inputs": [_plain(dataclasses.asdict(tensor)) for tensor in spec.inputs],
        "outputs": [_plain(dataclasses.asdict(tensor)) for tensor in spec.outputs],
        "weights": _weights_in_words(matrices, draft.form),
        "operators": operator_inventory(model),
        "parameters": graph.parameters,
        "transposed": sorted(tensor.name for tensor in graph.tensors if getattr(tensor, "transposed", False)),
        "matrices": matrices,
    }


def draft_of_bundle(bundle: Bundle) -> BundleDraft:
    """The bundle as it is, every file a link.

    Raises BundleError for graphs that cannot be read, point elsewhere, or are not ONNX.
    """
    demand_onnx(bundle)
    graphs = tuple(_graph_of_bundle(bundle, entry) for entry in bundle.graphs)
    owned = {entry[key] for entry in bundle.graphs for key in ("file", "data")}
    files: dict[str, bytes | Tensor | LinkedFile] = {
        name: bundle.link(name) for name in bundle.files if name not in owned
    }
    facts = {key: bundle.manifest[key] for key in FACTS}
    return BundleDraft(facts, bundle.config, bundle.form, graphs, files)


FACTS = ("architecture", "tied", "opset", "argmax", "tokenizer", "checkpoint", "tools", "history")
"""Keys of the manifest that steps carry over, in its order."""


def _graph_of_bundle(bundle: Bundle, entry: Mapping[str, Any]) -> GraphDraft:
    model = load_graph(bundle.whole_path(entry["file"]))
    places = sorted(stored_tensors(bundle, model, entry).values(), key=lambda place: place.offset)
    transposed = set(entry["transposed"])
    return GraphDraft(
        name=entry["name"],
        tensors=tuple(
            FileTensor(bundle.directory, place, place.name in transposed, bundle.beyond_cache) for place in places
        ),
        parameters=entry["parameters"],
        make_model=lambda: _without_weights(model),
        matrices={name: _constant(record) for name, record in entry["matrices"].items()},
        graph_link=bundle.link(entry["file"]),
        data_link=bundle.link(entry["data"]),
    )


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
