"""Trace one skeleton per kind of graph: the ONNX graph of a module, without its weights.

Nothing of the weights' size is ever allocated, whatever the model's size: parameters are meta tensors for the
torch.export-based exporter and zero-stride tensors for the TorchScript one, and they become graph inputs before the
graph is simplified, so that no optimizer can fold, copy or rename them.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import nn

from glmexport import __version__, export_ops
from glmexport.builtins_lock import BUILTINS_LOCK
from glmexport.errors import ExportError
from glmexport.interface import DEFAULT_OPSET, OPSETS, GraphSpec, TensorSpec, value_info

FIRST_DYNAMO_OPSET = 18
"""Asked for less, torch's torch.export-based exporter silently gives 18; below it the TorchScript exporter is used."""

FIRST_NORM_OPSET = 17
"""LayerNormalization is one operator from here on, which computes in float32 inside; below, it is several."""

TRACED_LENGTHS = {"batch": 2, "seq": 3, "past": 4, "total": 7, "capacity": 11}
"""Sizes of the dynamic axes while tracing: distinct, so that no two axes are taken for one."""


@dataclass(frozen=True)
class Skeleton:
    """A simplified graph whose weights are named but absent.

    model: its nodes read the slots, which it neither declares as inputs nor as initializers.
    slots: names of parameters and buffers, as in the traced module.
    """

    model: onnx.ModelProto
    slots: tuple[str, ...]


def trace(module: nn.Module, spec: GraphSpec, opset: int = DEFAULT_OPSET) -> Skeleton:
    """The skeleton of `module` with the signature `spec` at `opset`.

    Raises ExportError for an opset out of range, and where the exporter or simplifier does not give what was asked for.
    """
    if opset not in OPSETS:
        raise ExportError(f"Opset {opset} cannot be exported, expected {OPSETS.start} to {OPSETS.stop - 1}.")
    slots = tuple(name for name, _ in (*module.named_parameters(), *module.named_buffers()))
    with _quiet(), BUILTINS_LOCK:
        exported = (_trace_dynamo if opset >= FIRST_DYNAMO_OPSET else _trace_torchscript)(module, spec, opset)
        return Skeleton(_tidy(exported, spec, slots, opset), slots)


def _trace_dynamo(module: nn.Module, spec: GraphSpec, opset: int) -> onnx.ModelProto:
    import onnx_ir
    import onnxscript.optimizer

    program = torch.onnx.export(
        copy.deepcopy(module).to("meta"),
        tuple(_example(tensor) for tensor in spec.inputs),
        dynamo=True,
        optimize=False,  # the optimizer runs below, once the weights are inputs
        verbose=False,
        opset_version=opset,
        input_names=[tensor.name for tensor in spec.inputs],
        output_names=[tensor.name for tensor in spec.outputs],
        dynamic_shapes=tuple(tensor.dynamic_axes for tensor in spec.inputs),
        custom_translation_table=export_ops.dynamo_translations(),
    )
    if program is None:
        raise ExportError("torch.onnx.export gave no program; report this together with the torch version.")
    model = program.model
    for name in list(model.graph.initializers):
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    onnxscript.optimizer.optimize(model)
    return onnx_ir.to_proto(model)


def _trace_torchscript(module: nn.Module, spec: GraphSpec, opset: int) -> onnx.ModelProto:
    export_ops.register_torchscript_translations(opset)
    file = io.BytesIO()
    copied = copy.deepcopy(module).to("meta")
    if opset < FIRST_NORM_OPSET:
        _widen_norms(copied)
    functional = _WeightsAsInputs(copied, len(spec.inputs))
    torch.onnx.export(
        functional,
        (*(_example(tensor) for tensor in spec.inputs), *functional.weights.values()),
        file,  # type: ignore[arg-type]  # a file object is documented for this exporter
        dynamo=False,
        opset_version=opset,
        do_constant_folding=False,
        input_names=[*(tensor.name for tensor in spec.inputs), *functional.weights],
        output_names=[tensor.name for tensor in spec.outputs],
        dynamic_axes={tensor.name: tensor.dynamic_axes for tensor in (*spec.inputs, *spec.outputs)},
    )
    return onnx.load_from_string(file.getvalue())


class _WideNorm(nn.Module):
    """A layer norm in float32 whatever its input is, as torch computes it: squares of float16 numbers overflow."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self._shape, self._epsilon = norm.normalized_shape, norm.eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """As of the norm, of the input's dtype."""
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(states.float(), self._shape, weight, bias, self._epsilon).to(states.dtype)


def _widen_norms(module: nn.Module) -> None:
    """Replace every layer norm with float16 parameters below `module`, in place."""
    for name, child in [*module.named_modules()]:
        if isinstance(child, nn.LayerNorm) and child.weight.dtype == torch.float16:
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, _WideNorm(child))


class _WeightsAsInputs(nn.Module):
    """A module whose parameters and buffers are arguments after its own: the exporter copies parameters, never inputs.

    weights: name -> meta tensor, in the order of the arguments.
    """

    def __init__(self, module: nn.Module, own_inputs: int) -> None:
        super().__init__()
        self._own_inputs = own_inputs
        self._module = (module,)  # in a tuple, so that it is no submodule and adds nothing to the names of its parts
        for name, child in module.named_children():
            self.add_module(name, child)
        named = [*module.named_parameters(), *module.named_buffers()]
        self.weights = {name: tensor.detach() for name, tensor in named}
        self._places: list[tuple[dict[str, Any], str]] = []  # where each weight belongs while the module runs
        for slot in self.weights:
            path, _, name = slot.rpartition(".")
            child = module.get_submodule(path)
            self._places.append((child._parameters if name in child._parameters else child._buffers, name))
        self._put([None] * len(self._places))

    def forward(self, *tensors: torch.Tensor) -> Any:
        self._put(tensors[self._own_inputs :])
        try:
            return self._module[0](*tensors[: self._own_inputs])
        finally:
            self._put([None] * len(self._places))

    def _put(self, tensors: Sequence[torch.Tensor | None]) -> None:
        for (held, name), tensor in zip(self._places, tensors, strict=True):
            held[name] = tensor


def _tidy(exported: onnx.ModelProto, spec: GraphSpec, slots: tuple[str, ...], opset: int) -> onnx.ModelProto:
    """Simplify, then leave nothing in the file that differs from run to run or from machine to machine."""
    import onnxsim  # type: ignore[import-untyped]

    simplified, valid = onnxsim.simplify(exported)
    if not valid:
        raise ExportError(
            f"onnxsim changed what the {spec.kind} graph computes; report this with the versions installed."
        )
    graph = simplified.graph
    found = tuple(value.name for value in graph.input)
    expected = {*(tensor.name for tensor in spec.inputs), *slots}
    if set(found) != expected:
        raise ExportError(
            f"The exported {spec.kind} graph reads {sorted(set(found) ^ expected)} differently from the traced module; "
            f"every input and weight must be read by its own name."
        )
    _constants_to_initializers(graph)
    tidy = onnx.helper.make_graph(
        nodes=graph.node,
        name=spec.kind,
        inputs=[value_info(tensor) for tensor in spec.inputs],
        outputs=[value_info(tensor) for tensor in spec.outputs],
        initializer=graph.initializer,
    )
    for index, node in enumerate(tidy.node):
        node.name = f"{node.op_type}_{index}"
        node.ClearField("doc_string")
        node.ClearField("metadata_props")  # source paths of the machine that exported
    imports = [onnx.helper.make_opsetid(entry.domain, entry.version) for entry in simplified.opset_import]
    versions = {entry.domain: entry.version for entry in imports}
    if versions.get("") != opset:
        raise ExportError(f"The exporter gave opset {versions.get('')} when asked for {opset}; choose another opset.")
    used = {node.domain for node in tidy.node} | {""}
    model = onnx.helper.make_model(
        tidy,
        opset_imports=[entry for entry in imports if entry.domain in used],
        producer_name="glmexport",
        producer_version=__version__,
    )
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))
    return model


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes into initializers, and equal constants into one."""
    nodes = []
    for node in graph.node:
        value = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            value.name = node.output[0]
            graph.initializer.append(value)
        else:
            nodes.append(node)
    kept: dict[tuple[int, tuple[int, ...], bytes], onnx.TensorProto] = {}
    renames: dict[str, str] = {}
    for tensor in graph.initializer:
        tensor.ClearField("doc_string")
        array = onnx.numpy_helper.to_array(tensor)
        twin = kept.setdefault((tensor.data_type, array.shape, array.tobytes()), tensor)
        renames[tensor.name] = twin.name
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renames.get(name, name)
    constants = list(kept.values())
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def _example(tensor: TensorSpec) -> torch.Tensor:
    shape = [TRACED_LENGTHS[size] if isinstance(size, str) else size for size in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype), device="meta")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' deprecation and progress notices off the terminal; errors are raised, not logged."""
    loggers: list[tuple[logging.Logger, Any]] = [
        (logger, logger.level) for logger in map(logging.getLogger, ("torch.onnx", "torch.export", "onnxscript"))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger, _ in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in loggers:
                logger.setLevel(level)
