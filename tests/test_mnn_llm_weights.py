"""Weights as MNN's engine reads them: held against MNN's own converter, and read back by slow independent code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from glmexport.affine import Affine, dequantize
from glmexport.errors import ExportError, GlmExportError
from glmexport.mnn_llm.converter import mnn_of_json
from glmexport.mnn_llm.net import Net
from glmexport.mnn_llm.stored_weights import CodePacker, StoredMatrix, quantized_parts, read_matrix
from glmexport.quantize_kernels import quantize

CONVERT = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"


def convert(directory: Path, *words: object) -> None:
    command = [sys.executable, "-c", CONVERT, *map(str, words)]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)


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
    source = ("-f", "ONNX", "--modelFile", directory / "linear.onnx", "--MNNModel", made)
    convert(directory, *source, "--bizCode", "test", "--saveExternalData=1", *words)
    convert(directory, "-f", "MNN", "--modelFile", made, "--JsonFile", directory / "linear.json")
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
    stored = StoredMatrix(40, 192, bits, block)
    assert layer["external"] == stored.external(0)
    ours = stored.parameter or {}
    theirs = layer.get("quanParameter", {})
    assert {key: theirs[key] for key in ours} == ours
    if stored.quantized:
        # the converter states other sizes with the same product: rows times blocks, and the block
        rest = len(stored.header) - (1 << bits)
        data = stored.header[:rest] + data[rest:]
    found, found_bias = read_matrix(data, stored)
    steps = {4: 15, 8: 255, 16: 2000, 32: 1e7}[bits]
    assert np.abs(found - weights).max() <= np.ptp(weights) / steps
    assert found_bias.tolist() == bias.tolist()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "block"),
    [(3, 96, 32), (5, 75, 64), (1, 1, "channel"), (7, 300, 128), (2, 128, 128), (6, 33, 32)],
)
def test_a_quantized_matrix_reads_back_as_its_integers(bits, outputs, inputs, block):
    weights = np.random.default_rng(inputs).standard_normal((outputs, inputs)).astype(np.float32)
    weights[0] = 0.0
    stored = StoredMatrix(outputs, inputs, bits, block)
    bands = [quantize(rows, stored.affine) for rows in (weights[:1], weights[1:]) if len(rows)]
    bias = np.arange(outputs, dtype=np.float32)
    data = b"".join(part.tobytes() for part in quantized_parts(stored, iter(bands), bias))
    assert len(data) == stored.total
    found, found_bias = read_matrix(data, stored)
    expected = np.concatenate([dequantize(*band[:3], bits, inputs) for band in bands])
    assert np.allclose(found, expected, atol=1e-6 * max(1.0, np.abs(expected).max()))
    assert found_bias.tolist() == bias.tolist()
    assert stored.blocks == (inputs // block if block != "channel" and inputs % block == 0 else 1)


@given(st.lists(st.lists(st.integers(0, 15), max_size=9), max_size=6))
def test_codes_are_packed_alike_in_any_pieces(pieces):
    packer = CodePacker(4)
    packed = b"".join(packer.push(np.array(piece, np.uint8)).tobytes() for piece in pieces) + packer.finish().tobytes()
    codes = [code for piece in pieces for code in piece]
    codes += [0] * (len(codes) % 2)
    assert packed == bytes(high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True))


def test_more_rows_than_16_bits_count_are_stated_in_32():
    assert StoredMatrix(65535, 4, 8).header[:5] == b"\x02\xff\xff\x04\x00"
    wide = StoredMatrix(65536, 4, 8)
    assert wide.header[:9] == b"\x02\x00\x00\x01\x00\x04\x00\x00\x00"
    assert wide.parameter["shapeInt32"]


def test_other_bytes_are_no_matrix():
    stored = StoredMatrix(2, 4, 8)
    with pytest.raises(GlmExportError, match="expected"):
        read_matrix(b"", stored)
    with pytest.raises(GlmExportError, match="begin"):
        read_matrix(bytes(stored.total), stored)


def test_a_matrix_is_read_with_the_policy_it_was_written_with():
    assert StoredMatrix(4, 96, 4, 64).affine == Affine(4, "channel", symmetric=False)
    assert StoredMatrix(4, 128, 4, 64).affine == Affine(4, 64, symmetric=False)


def test_the_converter_is_not_believed_when_it_says_nothing_of_success():
    with pytest.raises(ExportError, match="made no graph"):
        mnn_of_json(b"no JSON at all")


def test_a_graph_is_the_same_bytes_in_every_run():
    def make(content: bytes) -> bytes:
        net = Net()
        value = net.input("x", "float32", (-1, 3))
        net.name_output(net.binary("MUL", value, net.constant(np.float32(1.3e-4))), "y")
        return mnn_of_json(net.as_json(content))

    assert make(b"a") == make(b"a")
    assert make(b"a") != make(b"b"), "its identifier follows from the weights"
    assert np.float32(1.3e-4).tobytes() in make(b"a"), "every digit of a constant arrives"
