"""Weights as MNN's engine reads them: held against MNN's own converter, and read back by slow independent code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from mnn_layout import slowly_read
from onnx import TensorProto, helper

from glmexport.affine import Affine, dequantize
from glmexport.mnn.converter import TO_JSON, mnn_of_json, run_converter
from glmexport.mnn.matrix import FLOAT16, MnnMatrix, integer_parts
from glmexport.mnn_llm.net import Net, quantization_record
from glmexport.mnn_llm.weight_writer import as_mnn_has_them
from glmexport.quantize_kernels import quantize

pytest.importorskip("MNN")


def converted(directory: Path, weights: np.ndarray, bias: np.ndarray, *words: object) -> tuple[dict, bytes]:
    """(what MNN's own converter says of a linear layer, the bytes of its weight file)."""
    width = weights.shape[1]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["seq", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["seq", len(weights)])],
        [onnx.numpy_helper.from_array(weights.T.copy(), "w"), onnx.numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "linear.onnx")
    made = directory / "linear.mnn"
    source = ["-f", "ONNX", "--modelFile", str(directory / "linear.onnx"), "--MNNModel", "{linear.mnn}"]
    weight = {"linear.mnn": made, "linear.mnn.weight": directory / "linear.mnn.weight"}
    run_converter([*source, "--bizCode", "test", "--saveExternalData=1", *map(str, words)], weight)
    dump = ["-f", "MNN", "--modelFile", str(made), "--JsonFile", "{linear.json}"]
    run_converter(dump, {"linear.json": directory / "linear.json"}, success=TO_JSON)
    operators = json.loads((directory / "linear.json").read_text("utf-8"))["oplists"]
    layer = next(operator["main"] for operator in operators if operator["type"] == "Convolution")
    return layer, (directory / "linear.mnn.weight").read_bytes()


@pytest.mark.parametrize(
    ("bits", "block"), [(4, 32), (8, 32), (4, "channel"), (8, 64), (16, "channel"), (32, "channel")]
)
def test_mnns_own_converter_writes_the_same_layout(tmp_path, bits, block):
    random = np.random.default_rng(bits)
    weights = random.standard_normal((40, 192)).astype(np.float32)
    bias = random.standard_normal(40).astype(np.float32)
    words = {32: (), 16: ("--fp16",)}.get(
        bits, ("--weightQuantBits", bits, "--weightQuantBlock", 0 if block == "channel" else block)
    )
    layer, data = converted(tmp_path, weights, bias, *words)
    size = 0 if bits >= FLOAT16 else 192 if block == "channel" else block
    matrix = MnnMatrix(40, 192, bits, size)
    assert layer["external"] == [*matrix.external(0)]
    ours, theirs = {} if bits == 32 else quantization_record(matrix), layer.get("quanParameter", {})
    assert {key: theirs[key] for key in ours} == ours
    assert data.startswith(matrix.header), "bit for bit, sizes and all"
    found, found_bias = slowly_read(data, 40, 192, bits, size)
    steps = {4: 15, 8: 255, 16: 2000, 32: 1e7}[bits]
    assert np.abs(found - weights).max() <= np.ptp(weights) / steps
    assert found_bias.tolist() == bias.tolist()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "block"),
    [(3, 96, 32), (5, 75, "channel"), (1, 1, "channel"), (7, 300, "channel"), (2, 128, 128), (6, 33, 64)],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_matrix_reads_back_as_its_integers(bits, outputs, inputs, block, symmetric):
    weights = np.random.default_rng(inputs).standard_normal((outputs, inputs)).astype(np.float32)
    weights[0] = 0.0
    affine = Affine(bits, block, symmetric=symmetric)
    size = inputs if block == "channel" or block > inputs else block
    matrix = MnnMatrix(outputs, inputs, bits, size)
    bands = [quantize(rows, affine) for rows in (weights[:1], weights[1:]) if len(rows)]
    bias = np.arange(outputs, dtype=np.float32)
    parts = integer_parts(matrix, (as_mnn_has_them(band, matrix) for band in bands), bias)
    data = b"".join(part.tobytes() for part in parts)
    assert len(data) == matrix.total_bytes
    found, found_bias = slowly_read(data, outputs, inputs, bits, size)
    expected = np.concatenate([dequantize(*band[:3], bits, inputs) for band in bands])
    assert np.allclose(found, expected, atol=1e-6 * max(1.0, np.abs(expected).max()))
    assert found_bias.tolist() == bias.tolist()


def test_a_graph_is_the_same_bytes_in_every_run():
    def make(content: bytes) -> bytes:
        net = Net()
        value = net.input("x", "float32", (-1, 3))
        net.name_output(net.binary("MUL", value, net.constant(np.float32(1.3e-4))), "y")
        return mnn_of_json(net.as_json(content))

    assert make(b"a") == make(b"a")
    assert make(b"a") != make(b"b"), "its identifier follows from the weights"
    assert np.float32(1.3e-4).tobytes() in make(b"a"), "every digit of a constant arrives"
