"""Products that round activations to 16 bits, by integer products that round them to 8.

At accuracy level 4 MatMulNBits rounds each group of a row of activations to 127 steps of its largest magnitude: x is
taken for hi. The graph computes that hi itself, by the same rule, and feeds the product twice the rows, hi and x - hi.
The first are on the grid already and lose nothing; of the second the product loses a 250th again. One pass over the
weights serves both, so a single row costs little more than before.
"""

from __future__ import annotations

import numpy as np
import onnx

from glmexport.onnx_files import Array

STEPS = 127
"""Of the largest magnitude of a group; a code of 8 bits has as many on each side of zero."""

SMALLEST = np.float32(2.0**-100)
"""Scale of a group of zeros, which must not be divided by zero."""


def with_wide_activations(
    model: onnx.ModelProto, product: list[onnx.NodeProto], width: int, block: int, name: str
) -> list[onnx.NodeProto]:
    """Nodes that compute what `product` does, on activations of 16 bits.

    product: nodes whose last one multiplies its first input […, width] by a weight; its output keeps its name.
    block: inputs that share a scale. name: what the new nodes are called after. Constants go into `model`.
    """
    *before, last = product
    activations, output = last.input[0], last.output[0]
    parts = _Nodes(model, name)
    rows = parts.add("Reshape", [activations, parts.constant(np.array([-1, width]))])
    padding = -width % block
    if padding:
        rows = parts.add("Pad", [rows, parts.constant(np.array([0, 0, 0, padding]))])
    groups = parts.add("Reshape", [rows, parts.constant(np.array([-1, block]))])
    largest = parts.largest_of_rows(parts.add("Abs", [groups]))
    step = parts.add("Mul", [largest, parts.constant(np.array(1 / STEPS, np.float32))])
    scale = parts.add("Max", [step, parts.constant(np.array(SMALLEST))])
    codes = parts.add("Round", [parts.add("Div", [groups, scale])])
    rounded = parts.add("Mul", [codes, scale])
    if padding:
        padded = parts.add("Reshape", [rounded, parts.constant(np.array([-1, width + padding]))])
        ends = [parts.constant(np.array([value])) for value in (0, width, 1)]
        rounded = parts.add("Slice", [padded, ends[0], ends[1], ends[2]])
    high = parts.add("Reshape", [rounded, parts.add("Shape", [activations])])
    low = parts.add("Sub", [activations, high])
    both = parts.add("Concat", [high, low], axis=0)
    last.input[0] = both
    last.output[0] = f"{name}.both_products"
    halves = parts.halves(last.output[0])
    total = onnx.helper.make_node("Add", halves, [output], name=f"{name}.sum")
    split = parts.nodes.pop()
    return [*before, *parts.nodes, last, split, total]


class _Nodes:
    """Nodes in the order in which they are made, and their constants, each value once in the graph."""

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        self._model, self._name = model, name
        self._opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        self.nodes: list[onnx.NodeProto] = []

    def add(self, operator: str, inputs: list[str], **attributes: int) -> str:
        """Append a node with one output and return the output's name."""
        output = f"{self._name}.{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(operator, inputs, [output], name=output, **attributes))  # type: ignore[arg-type]  # attributes, of any type
        return output

    def largest_of_rows(self, values: str) -> str:
        """ReduceMax over the last axis, which is an input from opset 18 on and an attribute before."""
        if self._opset >= 18:
            return self.add("ReduceMax", [values, self.constant(np.array([-1]))], keepdims=1)
        output = self.add("ReduceMax", [values], keepdims=1)
        self.nodes[-1].attribute.append(onnx.helper.make_attribute("axes", [-1]))
        return output

    def halves(self, values: str) -> list[str]:
        """Split in two along the first axis; the number of parts must be said from opset 18 on."""
        outputs = [f"{self._name}.high_product", f"{self._name}.low_product"]
        node = onnx.helper.make_node("Split", [values], outputs, name=f"{self._name}.split", axis=0)
        if self._opset >= 18:
            node.attribute.append(onnx.helper.make_attribute("num_outputs", 2))
        self.nodes.append(node)
        return outputs

    def constant(self, value: Array) -> str:
        """Name of a small initializer with this value."""
        graph = self._model.graph
        proto = onnx.numpy_helper.from_array(value)
        for tensor in graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.dims == proto.dims:
                same_type = tensor.data_type == proto.data_type
                if same_type and onnx.numpy_helper.to_array(tensor).tobytes() == value.tobytes():
                    return str(tensor.name)
        proto.name = f"activations.constant_{len(graph.initializer)}"
        graph.initializer.append(proto)
        return str(proto.name)
