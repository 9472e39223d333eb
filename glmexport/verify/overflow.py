"""How near a float16 graph comes to the largest float16: every value it holds so, computed in float32.

Float32 numbers show what float16 would lose: a runtime may compute a float16 graph in float32 itself, where nothing
overflows, while another one overflows on the same graph. So the graph is turned into its float32 twin, which gives the
largest magnitude of each value that is float16 in the graph. Rounding is left out, which moves such a value by some
0.1 %.

Prompts are the only stress: the twin begins, as a block does, with a norm, after which larger inputs are no larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto
from torch import nn

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.checkpoint import Checkpoint
from glmexport.config import ModelConfig
from glmexport.errors import BundleError
from glmexport.onnx_files import load_graph
from glmexport.passes.half_weights import casting
from glmexport.verify.cases import longest_case
from glmexport.verify.reference import StreamedReference
from glmexport.verify.report import Row
from glmexport.verify.runs import BlockInputs, Run

Array = npt.NDArray[Any]

LARGEST = 65504.0
"""The largest float16."""

LITTLE = 4.0
"""Headroom below this is pointed out: other prompts than those of a verification reach further."""

_MOVES = (
    *("Concat", "Gather", "Identity", "Neg", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    "Where",
)
"""Operators that give their inputs' own magnitudes; `Where` fills in a constant, which measures nothing."""
_ABSORBED_THROUGH = ("Add", "Mul")


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of a graph's float16 values, and where it is; or the first that does not fit."""

    largest: float = 0.0
    place: str = "nothing"

    @property
    def headroom(self) -> float:
        """How many times larger the values might be."""
        return LARGEST / self.largest if self.largest else float("inf")

    @property
    def fits(self) -> bool:
        """Whether nothing overflows; NaN does not fit."""
        return self.largest <= LARGEST

    def then(self, other: Peak) -> Peak:
        """The same, or what is met after it and is larger; the first that does not fit stays: it is the cause."""
        return other if self.fits and not other.largest <= self.largest else self

    def __str__(self) -> str:
        if not self.fits:
            return f"float16 overflows in {self.place}: {self.largest:.3g} is reached, {LARGEST:.0f} is the largest"
        little = f", which is little (less than {LITTLE:g})" if self.headroom < LITTLE else ""
        headroom = f"{self.headroom:{'.0f' if self.headroom >= 100 else '.3g'}}"
        return f"headroom {headroom}{little}: at most {self.largest:.3g}, in {self.place}"


def peak_row(graph: str, peak: Peak) -> Row:
    """The row of a report about a graph's peak."""
    return Row(graph, "overflow", peak.fits, detail=str(peak), headroom=peak.headroom)


class Stress:
    """A prompt longer than those that are compared, for the unpatched reference alone, block by block."""

    def __init__(self, checkpoint: Checkpoint, reference: StreamedReference, config: ModelConfig) -> None:
        """config: of the bundle, whose ids are those of a slimmed vocabulary."""
        self._run_block = checkpoint.patch.run_reference_block
        self._run = Run(longest_case(config))
        self._hidden = reference.embed(self._run.input_ids(0))
        self._past = torch.zeros(2, 0, self._run.case.batch, config.num_heads, config.head_dim)

    def through(self, block_id: int, block: nn.Module) -> BlockInputs:
        """Go on through a block, which must be the next one; returns what it took."""
        inputs = self._run.inputs(0, self._hidden, self._past)
        self._hidden, _ = self._run_block(block, block_id, *inputs)
        return inputs


class OverflowProbe:
    """The float32 twin of one graph of a float16 bundle; `peak` is over all that it was run on."""

    def __init__(self, bundle: Bundle, graph: str) -> None:
        """Raises BundleError where the graph cannot be read or run."""
        import onnxruntime  # type: ignore[import-untyped]

        model = load_graph(bundle.path(names.graph_file(graph)))
        self._places = float32_twin(model)
        self.peak = Peak()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it would log is raised too
        options.add_session_config_entry("session.disable_prepacking", "1")  # as of any float32 graph here
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.directory))
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own errors share no public base class
            reason = str(error).splitlines()[0]
            raise BundleError(f"{names.graph_file(graph)} has no float32 twin ({reason}); split again.") from error

    def run(self, feeds: Mapping[str, Array]) -> None:
        """Run the graph's inputs, floats as float32, and take the largest values in."""
        found = self._session.run([*self._places], dict(feeds))
        for place, largest in zip(self._places.values(), found, strict=True):
            self.peak = self.peak.then(Peak(float(largest), place))


def float32_twin(model: onnx.ModelProto) -> dict[str, str]:
    """Turn a float16 graph (without external data) into its float32 twin, in place.

    Its outputs are the largest magnitudes of the values that the graph holds in float16; returns name -> place.
    """
    graph, halves = model.graph, _float16_values(model)
    places = {value: place for value, place in _places(graph) if value in halves}
    outputs = {output.name for output in graph.output}
    watched = [value for value in places if not _is_absorbed(graph, value, outputs)]
    external = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT16:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            external.append(tensor.name)
        else:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    casting(model, external)
    del graph.value_info[:], graph.output[:]
    results = {}
    for number, value in enumerate(watched):
        magnitude, largest = f"magnitude {number}", f"largest {number}"
        graph.node.append(onnx.helper.make_node("Abs", [value], [magnitude]))
        graph.node.append(onnx.helper.make_node("ReduceMax", [magnitude], [largest], keepdims=0))
        graph.output.append(onnx.helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
        results[largest] = places[value]
    return results


def _float16_values(model: onnx.ModelProto) -> set[str]:
    """Names of the values that are float16: outputs of nodes, as onnx infers their types."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:], bare.graph.value_info[:]
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            bare.graph.initializer.append(tensor)
    inferred = onnx.shape_inference.infer_shapes(bare).graph
    values = (*inferred.value_info, *inferred.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT16}


def _places(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    """(value, where it is in a reader's words) of every value that is computed and not only moved."""
    weights = [tensor.name for tensor in graph.initializer if "." in tensor.name]  # named as in the checkpoint
    parts = [name.split(".") for name in weights]
    common = len([*takewhile(lambda level: len({*level}) == 1, zip(*parts, strict=False))])
    module_of = {name: ".".join(part[common:-1]) for name, part in zip(weights, parts, strict=True)}
    order = {name: number for number, node in enumerate(graph.node) for name in node.output}
    after: dict[str, str] = {}  # value -> the module or operator that it comes from
    softmax_seen = False
    for node in graph.node:
        modules = [module_of[name] for name in node.input if name in module_of]
        if modules and node.op_type == "Cast":
            module_of[node.output[0]] = modules[0]
            continue
        latest = max((name for name in node.input if name in order), key=lambda name: order[name], default="")
        origin = modules[-1] if modules else after.get(latest, "the inputs")
        place = origin if modules else f"{node.op_type} after {origin}"
        if node.op_type == "MatMul" and not modules:
            origin = place = "attention context" if softmax_seen else "attention scores"
        softmax_seen |= node.op_type == "Softmax"
        after.update(dict.fromkeys(node.output, origin))
        if node.op_type not in _MOVES:
            yield from ((value, place) for value in node.output)


def _is_absorbed(graph: onnx.GraphProto, value: str, outputs: set[str]) -> bool:
    """Whether a value goes nowhere but into a Tanh, which gives 1 for infinity: torch lets it overflow there too."""
    readers = [node for node in graph.node if value in node.input]
    if value in outputs or not readers:
        return False
    return all(
        node.op_type == "Tanh" or (node.op_type in _ABSORBED_THROUGH and _is_absorbed(graph, node.output[0], outputs))
        for node in readers
    )
