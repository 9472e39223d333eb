"""Rules that every graph of a bundle keeps, checked on the file as it lies on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from glmexport import names
from glmexport.errors import printable, reason_of
from glmexport.interface import OPSETS, GraphSpec, TensorSpec
from glmexport.onnx_files import ALIGNMENT, external_tensors, hidden_data, load_graph, stored_bytes

CONTROL_FLOW = ("If", "Loop", "Scan")
CONTRIB_DOMAIN = "com.microsoft"
CONTRIB_OPERATORS = ("MatMulNBits",)
"""What of onnxruntime's own operators a graph may use."""
MAX_INLINE_ELEMENTS = 16
"""Larger tensors are weights, and weights are external; shapes, axes and scalars are smaller."""


def operator_inventory(model: onnx.ModelProto) -> dict[str, int]:
    """Operator -> number of nodes, by name; operators outside the standard domain carry theirs (`com.microsoft.X`)."""
    counts = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return dict(sorted(counts.items()))


def lint_graph(path: Path, spec: GraphSpec, opset: int) -> list[str]:
    """Complaints about the graph at `path`, each a sentence that names it; empty when it keeps every rule.

    spec: the signature it must have. opset: what the manifest says. Raises BundleError for what cannot be parsed.
    """
    model = load_graph(path)
    complaints: list[str] = []
    try:
        complaints.extend(_operators(model))
        complaints.extend(_versions(model, opset))
        complaints.extend(_signature(model, spec))
        complaints.extend(_initializers(model, path))
        complaints.extend(_baked_lengths(model, spec))
        complaints.extend(_checker(model))
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
    ) as error:  # onnx's own, over senseless fields
        complaints.append(f"cannot be checked ({reason_of(error)}); the file is damaged, split again.")
    return [f"{names.shown(path)}: {printable(complaint)}" for complaint in complaints]


def foreign_parts(model: onnx.ModelProto, spec: GraphSpec) -> list[str]:
    """Of these complaints those that are quick to find: operators that no graph of ours has, another signature."""
    try:
        return [*_operators(model), *_signature(model, spec)]
    except KeyError as error:
        return [f"has a type {reason_of(error)} that onnx does not know"]


def _operators(model: onnx.ModelProto) -> Iterator[str]:
    for node in model.graph.node:
        if node.op_type in CONTROL_FLOW:
            yield f"holds the control-flow operator {node.op_type}, expected straight-line operators only."
        if node.domain and (node.domain != CONTRIB_DOMAIN or node.op_type not in CONTRIB_OPERATORS):
            yield f"holds the operator {node.domain}.{node.op_type}, expected standard ones and MatMulNBits only."


def _versions(model: onnx.ModelProto, opset: int) -> Iterator[str]:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    found = versions.get("", versions.get("ai.onnx"))
    if found != opset:
        yield f"has opset {found}, expected {opset}."
    elif found not in OPSETS:
        yield f"has opset {found}, expected {OPSETS.start} to {OPSETS.stop - 1}."
    else:
        # contrib operators have no part in the IR version
        fitting = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", found)])
        if model.ir_version != fitting:
            yield f"has IR version {model.ir_version}, expected {fitting}, which is what opset {opset} came with."


def _signature(model: onnx.ModelProto, spec: GraphSpec) -> Iterator[str]:
    for what, found, expected in (
        ("inputs", model.graph.input, spec.inputs),
        ("outputs", model.graph.output, spec.outputs),
    ):
        signature = tuple(_tensor_spec(value) for value in found)
        if signature != expected:
            yield f"has the {what} {_words(signature)}, expected {_words(expected)}."


def _initializers(model: onnx.ModelProto, path: Path) -> Iterator[str]:
    tensors = [*model.graph.initializer, *_constants(model)]
    for name, count in Counter(tensor.name for tensor in model.graph.initializer).items():
        if count > 1:
            yield f"holds {count} initializers named {name}."
    read = {name for node in model.graph.node for name in node.input}
    for name in sorted({tensor.name for tensor in model.graph.initializer} - read):
        yield f"holds the initializer {name}, which no node reads."
    inline = [tensor for tensor in tensors if tensor.data_location != TensorProto.EXTERNAL]
    same: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    for tensor in inline:
        value = onnx.numpy_helper.to_array(tensor)
        if value.size > MAX_INLINE_ELEMENTS:
            yield f"keeps {tensor.name} {list(value.shape)} inside the graph file, expected external data."
        twin = same.setdefault((tensor.data_type, value.shape, value.tobytes()), tensor.name)
        if twin != tensor.name:
            yield f"holds the same constant twice, as {twin} and {tensor.name}."
    hidden = hidden_data(model)
    if hidden is not None:
        yield f"has {hidden}, expected data in initializers alone."
    end = 0
    for external in sorted(external_tensors(model, path.name), key=lambda tensor: tensor.offset):
        file = path.with_name(f"{path.name}.data")
        if external.location != file.name or file.is_symlink():
            yield f"{external.name} points to {external.location!r}, expected {path.name}.data beside the graph."
            continue
        size = file.stat().st_size if file.is_file() else 0
        if external.length != stored_bytes(external.dtype, external.shape):
            yield f"{external.name} has {external.length} bytes for {list(external.shape)} {external.dtype}."
        if external.offset + external.length > size:
            yield f"{external.name} ends at byte {external.offset + external.length} of {size} in {external.location}."
        if external.offset % ALIGNMENT or external.offset < end:
            yield f"{external.name} starts at byte {external.offset}, expected a multiple of {ALIGNMENT} after {end}."
        end = external.offset + external.length


def _baked_lengths(model: onnx.ModelProto, spec: GraphSpec) -> Iterator[str]:
    """Infer the output shapes anew from the inputs alone: a baked length surfaces as a number, swapped axes by name."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    _as_products(bare)
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        yield f"fails shape inference ({reason_of(error)})."
        return
    known = {name for tensor in spec.inputs for name in tensor.dynamic_axes.values()}
    for value, expected in zip(inferred.graph.output, spec.outputs, strict=False):
        dims = value.type.tensor_type.shape.dim
        for axis, name in expected.dynamic_axes.items():
            if axis < len(dims) and dims[axis].HasField("dim_value"):
                yield f"output {value.name} always has {dims[axis].dim_value} on axis {axis}, expected {name!r}."
            elif axis < len(dims) and dims[axis].dim_param in known - {name}:
                yield f"output {value.name} has {dims[axis].dim_param!r} on axis {axis}, expected {name!r}."


def _as_products(model: onnx.ModelProto) -> None:
    """Make every MatMulNBits the MatMul of its shape, in place: onnx knows how shapes go through that."""
    for number, node in enumerate(model.graph.node):
        if node.domain != CONTRIB_DOMAIN:
            continue
        values = {attribute.name: attribute.i for attribute in node.attribute}
        weight = onnx.helper.make_tensor_value_info(f"weight_{number}", TensorProto.FLOAT, [values["K"], values["N"]])
        model.graph.input.append(weight)
        node.CopyFrom(onnx.helper.make_node("MatMul", [node.input[0], weight.name], list(node.output)))


def _checker(model: onnx.ModelProto) -> Iterator[str]:
    """onnx.checker in full, with external weights as inputs: `_initializers` has looked after their files.

    Given a path it refuses data files with several hard links, which bundles that share files have.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            bare.graph.initializer.append(tensor)
    try:
        onnx.checker.check_model(bare, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield f"fails onnx.checker ({reason_of(error)})."


def _constants(model: onnx.ModelProto) -> Iterator[TensorProto]:
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    tensor = TensorProto()
                    tensor.CopyFrom(attribute.t)
                    tensor.name = node.output[0]
                    yield tensor


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else "undefined"
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim)
    return TensorSpec(value.name, dtype, shape)


def _words(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs) or "none"
