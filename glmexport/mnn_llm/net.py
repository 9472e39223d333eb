"""MNN's graph as the JSON that its converter takes (`-f JSON`): operators, tensors, constants; weights lie elsewhere.

The graph is written as JSON from the start and not converted from ONNX: the converter prints floats with six decimals
when it dumps JSON, which turns the slowest rotary frequency (1.3e-4) by one part in a thousand.

Source of the names and numbers: MNN's flatbuffers schema, 3.6.1.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from glmexport.mnn.matrix import MnnMatrix

Node: TypeAlias = int
"""Index of a tensor of the graph."""

Record: TypeAlias = dict[str, Any]


class Net:
    """A graph being built: each method adds an operator and returns the tensor that it gives.

    Everything but the input and output of `convolution` is in the plain order of axes, NCHW to MNN.
    """

    def __init__(self) -> None:
        self._operators: list[Record] = []
        self._tensors: list[str] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Node] = {}

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> Node:
        """An input of the graph, `float32` or `int32`; -1 in the shape is any size."""
        main = {"dims": list(shape), "dtype": _dtype(dtype), "dformat": "NCHW"}
        return self.add("Input", (), "Input", main, name)

    def constant(self, value: npt.ArrayLike, dtype: str = "float32") -> Node:
        """A constant of `float32` or `int32`; equal ones are one."""
        array = np.asarray(value, dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            field = "float32s" if dtype == "float32" else "int32s"
            main = {
                "dims": list(array.shape),
                "dataFormat": "NCHW",
                "dataType": _dtype(dtype),
                field: array.reshape(-1).tolist(),
            }
            self._constants[key] = self.add("Const", (), "Blob", main)
        return self._constants[key]

    def binary(self, kind: str, left: Node, right: Node) -> Node:
        """ADD, MUL, SUB, MINIMUM, … of two tensors, which are broadcast."""
        return self.add("BinaryOp", (left, right), "BinaryOp", {"opType": kind, "T": "DT_FLOAT", "activationType": 0})

    def unary(self, kind: str, value: Node) -> Node:
        """NEG, COS, SIN, GELU, …"""
        return self.add("UnaryOp", (value,), "UnaryOp", {"opType": kind, "T": "DT_FLOAT"})

    def to_float(self, value: Node) -> Node:
        """An int32 tensor as float32."""
        return self.add("Cast", (value,), "CastParam", {"srcT": "DT_INT32", "dstT": "DT_FLOAT"})

    def reshape(self, value: Node, shape: Sequence[int]) -> Node:
        """Another shape; one axis may be -1."""
        return self.add("Reshape", (value, self.constant(shape, "int32")), "Reshape", {"dimType": "NCHW"})

    def slice(self, value: Node, begin: Sequence[int] | Node, size: Sequence[int]) -> Node:
        """A part of every axis; -1 in size is all that follows, a negative begin counts from the end."""
        first = begin if isinstance(begin, int) else self.constant(begin, "int32")
        return self.add("SliceTf", (value, first, self.constant(size, "int32")))

    def concat(self, values: Sequence[Node], axis: int) -> Node:
        """Tensors behind each other along an axis."""
        return self.add("Concat", tuple(values), "Axis", {"axis": axis})

    def layer_norm(self, value: Node, epsilon: float, external: Sequence[int]) -> Node:
        """Over the last axis; external: offset, bytes of gamma, bytes of beta, both float32."""
        main = {"axis": [-1], "epsilon": epsilon, "group": 1, "external": list(external), "useRMSNorm": False}
        return self.add("LayerNorm", (value,), "LayerNorm", main)

    def linear(self, value: Node, matrix: MnnMatrix, offset: int) -> Node:
        """[rows, inputs] -> [rows, outputs]: a convolution of one pixel, as MNN has products with weights.

        matrix: how it is stored beside the graph. offset: where it begins there.
        """
        outputs, inputs = matrix.outputs, matrix.inputs
        common = {
            **dict.fromkeys(("padX", "padY"), 0),
            **dict.fromkeys(("kernelX", "kernelY", "strideX", "strideY", "dilateX", "dilateY", "group"), 1),
            "padMode": "CAFFE",
            "outputCount": outputs,
            "inputCount": inputs,
            "relu": False,
            "relu6": False,
        }
        main: Record = {"common": common, "external": list(matrix.external(offset))}
        if matrix.kind is not None:
            main["quanParameter"] = quantization_record(matrix)
        pixels = self._convert(self.reshape(value, (-1, inputs, 1, 1)), "NCHW", "NC4HW4")
        return self.reshape(
            self._convert(self.add("Convolution", (pixels,), "Convolution2D", main), "NC4HW4", "NCHW"), (-1, outputs)
        )

    def attention(self, query: Node, key: Node, value: Node, mask: Node) -> Node:
        """[1, seq, heads, head_dim] each, a mask to add to the scores -> [1, seq, hidden]; keeps keys and values."""
        return self.add("Attention", (query, key, value, mask), "AttentionParam", {"kv_cache": True})

    def add(
        self, kind: str, inputs: Sequence[Node], main_type: str = "NONE", main: Record | None = None, name: str = ""
    ) -> Node:
        """Any operator with one output."""
        node = len(self._tensors)
        self._tensors.append(name or f"{kind}{node}")
        operator: Record = {"type": kind, "name": self._tensors[node], "main_type": main_type, "outputIndexes": [node]}
        if inputs:
            operator["inputIndexes"] = list(inputs)
        if main is not None:
            operator["main"] = main
        self._operators.append({**operator, "defaultDimentionFormat": "NCHW"})
        return node

    def name_output(self, node: Node, name: str) -> None:
        """Make a tensor the output of that name."""
        self._tensors[node] = name
        self._outputs = [name]

    def as_json(self, content: bytes) -> bytes:
        """The graph as the converter reads it; `content` is what its identifier is made from, beside the graph itself.

        The converter makes up an identifier where there is none, which would be the one thing that differs between two
        runs.
        """
        document: Record = {
            "bizCode": "glmexport",
            "oplists": self._operators,
            "outputName": self._outputs,
            "preferForwardType": "CPU",
            "sourceType": "ONNX",
            "tensorName": self._tensors,
            "usage": "INFERENCE",
        }
        digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode() + content).digest()
        document["mnn_uuid"] = str(uuid.UUID(bytes=digest[:16], version=4))
        return json.dumps(document).encode()

    def _convert(self, value: Node, source: str, target: str) -> Node:
        return self.add("ConvertTensor", (value,), "TensorConvertInfo", {"source": source, "dest": target})


def quantization_record(matrix: MnnMatrix) -> Record:
    """What an operator says of a matrix that is not float32."""
    if not matrix.is_integers:
        return {"type": matrix.kind}
    return {
        "type": matrix.kind,
        "quantScale": 1.0,
        "aMaxOrBits": matrix.stored_bits,
        "aMin": matrix.lowest,
        "readType": matrix.scale_rows,
        "shapeInt32": matrix.wide_header,
    }


def _dtype(name: str) -> str:
    return {"float32": "DT_FLOAT", "int32": "DT_INT32"}[name]
