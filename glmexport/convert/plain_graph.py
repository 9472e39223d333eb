"""A bundle's graph as other converters know it: plain float products, with small stand-ins for the matrices.

Whatever a bundle stores (float32, float16 with a Cast, `MatMulNBits`, `DequantizeLinear`, products on activations of
16 bits), its graph is that of the float32 model with other products in it. Here they are put back, so that a converter
sees the same operators for every form, and never a weight: each matrix stands there with a few outputs only, a number
of them that occurs nowhere else in the graph, so that what the converter made of it can be told by that number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.errors import ExportError
from glmexport.interface import graph_spec, value_info
from glmexport.onnx_files import Array, ExternalTensor, load_graph, read_band
from glmexport.stored import stored_tensors

FIRST_STAND_IN = 17
"""The smallest number of outputs of a stand-in."""

_BOTH, _HALVES = ".both_products", ".sum"


@dataclass(frozen=True)
class Product:
    """One product of a graph with a matrix of the model.

    matrix, bias: their names in the checkpoint; bias None where nothing is added. inputs, outputs: of the matrix.
    stand_in: outputs of what stands for it.
    """

    matrix: str
    bias: str | None
    inputs: int
    outputs: int
    stand_in: int


@dataclass(frozen=True)
class PlainGraph:
    """nodes multiply with initializers called `matrix` and add those called `bias`, which `model` lacks.

    model: holds every other tensor itself. products: in the order of the graph. vectors: biases, float32 [outputs].
    places: of what the bundle stores beside the graph.
    """

    model: onnx.ModelProto
    products: tuple[Product, ...]
    vectors: Mapping[str, Array]
    places: Mapping[str, ExternalTensor]

    def with_stand_ins(self) -> onnx.ModelProto:
        """The model with small tensors in the place of matrices and biases; a bias counts from its stand-in up."""
        whole = _copy(self.model)
        for product in self.products:
            matrix = np.full((product.inputs, product.stand_in), 1 / product.inputs, np.float32)
            whole.graph.initializer.append(onnx.numpy_helper.from_array(matrix, product.matrix))
            if product.bias is not None:
                whole.graph.initializer.append(onnx.numpy_helper.from_array(stand_in_bias(product), product.bias))
        return whole

    def with_inputs(self) -> onnx.ModelProto:
        """The model with the matrices [inputs, outputs] and biases as further inputs, to be run with any weights.

        The head gives `logits` alone then, as many as its matrix has outputs.
        """
        whole = _copy(self.model)
        if self.model.graph.name == names.HEAD:
            del whole.graph.output[:]
            logits = onnx.helper.make_tensor_value_info(names.LOGITS, onnx.TensorProto.FLOAT, (names.BATCH, "outputs"))
            whole.graph.output.append(logits)
        for product in self.products:
            shapes: dict[str, list[int | str]] = {product.matrix: [product.inputs, f"{product.matrix}.outputs"]}
            if product.bias is not None:
                shapes[product.bias] = [f"{product.matrix}.outputs"]
            for name, shape in shapes.items():
                value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, tuple(shape))
                whole.graph.input.append(value)
        return whole


def stand_in_bias(product: Product) -> Array:
    """What stands for a product's bias: float32 [stand_in]."""
    return np.arange(product.stand_in, dtype=np.float32) + np.float32(product.stand_in)


def plain_graph(bundle: Bundle, graph: str, argmax: str) -> PlainGraph:
    """The plain form of a block or the LM head.

    argmax: what the head is to give, whatever the bundle's does. Raises BundleError for unreadable files, ExportError
    for graphs that are not ours.
    """
    entry = bundle.graph(graph)
    model = load_graph(bundle.whole_path(entry["file"]))
    places = stored_tensors(bundle, model, entry)
    spec = graph_spec(graph, bundle.config, argmax)
    nodes, found = _plain_nodes(model, places, graph)
    if graph == names.HEAD:
        nodes, found = _head_nodes(nodes, found, [tensor.name for tensor in spec.outputs])
    biases = _biases(nodes, places)
    vectors = {name: read_band(bundle.directory, places[name], 0, places[name].shape[0]) for name in biases.values()}
    taken = {size for place in places.values() for size in place.shape} | set(_integers(model))
    free = (number for number in range(FIRST_STAND_IN, 1 << 20) if number not in taken)
    products = tuple(
        Product(matrix, biases.get(output), inputs, outputs, next(free))
        for output, (matrix, inputs, outputs) in found.items()
    )
    kept = {name for node in nodes for name in node.input} - {matrix for matrix, _, _ in found.values()} - {*vectors}
    initializers = [
        tensor
        if tensor.data_location != onnx.TensorProto.EXTERNAL
        else onnx.numpy_helper.from_array(_whole(bundle, places[tensor.name]), tensor.name)
        for tensor in model.graph.initializer
        if tensor.name in kept
    ]
    inputs, outputs = ([value_info(tensor) for tensor in tensors] for tensors in (spec.inputs, spec.outputs))
    plain = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, graph, inputs, outputs, initializers),
        ir_version=model.ir_version,
        opset_imports=[one for one in model.opset_import if one.domain in ("", "ai.onnx")],
    )
    return PlainGraph(plain, products, vectors, places)


def _plain_nodes(
    model: onnx.ModelProto, places: Mapping[str, ExternalTensor], graph: str
) -> tuple[list[onnx.NodeProto], dict[str, tuple[str, int, int]]]:
    """Nodes with float products, and output of each product -> (matrix, inputs, outputs)."""
    origin = {name: name for name in places}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in places:
            origin[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear":
            origin[node.output[0]] = node.output[0].removesuffix(".dequantized")
    dropped = set(_nodes_of_wide_products(model))
    nodes: list[onnx.NodeProto] = []
    products: dict[str, tuple[str, int, int]] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" or (node.op_type == "Cast" and node.input[0] in places):
            continue
        matrix = _matrix_of(node, origin, places)
        if matrix is None:
            if node.name not in dropped:
                nodes.append(node)
            continue
        activations, output = node.input[0], node.output[0]
        if output.endswith(_BOTH):
            name = output.removesuffix(_BOTH)
            activations = next(one.input[0] for one in model.graph.node if one.output[0].startswith(f"{name}.sub_"))
            output = next(one.output[0] for one in model.graph.node if one.name == f"{name}{_HALVES}")
        nodes.append(onnx.helper.make_node("MatMul", [activations, matrix[0]], [output], name=f"MatMul {matrix[0]}"))
        products[output] = matrix
    if not products:
        raise ExportError(f"{graph} has no product with a matrix, which is no graph of ours; split the bundle again.")
    return nodes, products


def _head_nodes(
    nodes: list[onnx.NodeProto], products: dict[str, tuple[str, int, int]], outputs: list[str]
) -> tuple[list[onnx.NodeProto], dict[str, tuple[str, int, int]]]:
    """The head up to its one product, whose output is `logits`, and the likeliest id of these where it is asked for."""
    if len(products) != 1:
        raise ExportError(f"{names.HEAD} has {len(products)} products, expected one; split the bundle again.")
    ((output, matrix),) = products.items()
    last = next(place for place, node in enumerate(nodes) if node.output[0] == output)
    product = onnx.NodeProto.FromString(nodes[last].SerializeToString())
    product.output[0] = names.LOGITS
    kept = [*nodes[:last], product]
    if names.TOKEN_ID in outputs:
        kept.append(onnx.helper.make_node("ArgMax", [names.LOGITS], [names.TOKEN_ID], axis=-1, keepdims=0))
    return kept, {names.LOGITS: matrix}


def _matrix_of(
    node: onnx.NodeProto, origin: Mapping[str, str], places: Mapping[str, ExternalTensor]
) -> tuple[str, int, int] | None:
    """(matrix, inputs, outputs) of a product with one, None for any other node."""
    if node.op_type == "MatMulNBits":
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        return node.input[1].removesuffix(".codes"), sizes["K"], sizes["N"]
    if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in origin:
        return None
    name = origin[node.input[1]]
    shape = places[name].shape if name in places else places[f"{name}.codes"].shape
    if len(shape) != 2 or len(node.input) != 2:
        return None
    return (name, shape[1], shape[0]) if node.op_type == "Gemm" else (name, shape[0], shape[1])


def _nodes_of_wide_products(model: onnx.ModelProto) -> Iterator[str]:
    """Names of the nodes around a product on activations of 16 bits (`passes.wide_activations`), but for itself."""
    wide = [node.output[0].removesuffix(_BOTH) for node in model.graph.node if node.output[0].endswith(_BOTH)]
    for node in model.graph.node:
        if any(node.name.startswith(f"{name}.") for name in wide):
            yield node.name


def _biases(nodes: list[onnx.NodeProto], places: Mapping[str, ExternalTensor]) -> dict[str, str]:
    """Output of a product -> the stored vector that is added to it and to nothing else."""
    products = {node.output[0] for node in nodes if node.name.startswith("MatMul ")}
    found = {
        output: bias
        for node in nodes
        if node.op_type == "Add"
        for output, bias in (tuple(node.input), tuple(reversed(node.input)))
        if output in products and bias in places and len(places[bias].shape) == 1
    }
    readers = [name for node in nodes for name in node.input]
    return {output: bias for output, bias in found.items() if readers.count(bias) == readers.count(output) == 1}


def _integers(model: onnx.ModelProto) -> Iterator[int]:
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.data_type == onnx.TensorProto.INT64:
            yield from onnx.numpy_helper.to_array(tensor).reshape(-1).tolist()
    for value in (*model.graph.input, *model.graph.output):
        yield from (axis.dim_value for axis in value.type.tensor_type.shape.dim)


def _whole(bundle: Bundle, place: ExternalTensor) -> Array:
    return read_band(bundle.directory, place, 0, place.shape[0])


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
