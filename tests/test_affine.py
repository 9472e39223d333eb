"""Affine quantization, bit by bit against slow loops and number by number against onnxruntime."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from glmexport import affine, quantize_kernels
from glmexport.affine import BITS, GROUP_SIZES, METHODS, Affine, Fit, Quantized, dequantize, dequantize_qdq, to_qdq
from glmexport.compiled import Kernel
from glmexport.errors import GlmExportError
from glmexport.quantize_kernels import quantize

SPECS = [Affine(bits, size, even, "mse") for bits in BITS for size in GROUP_SIZES for even in (True, False)]
EXACT = 2e-6  # relative to the product's norm: float32 sums in another order, over 300 inputs (measured: up to 4e-7)
LEVEL_4 = 0.015  # the operator rounds its input to 8 bits a group: 0.4 to 0.7 %, up to 1.1 % for a single row
WRONG = 0.1  # what a reversed nibble order or a doubled scale exceeds by far
F = np.float32


def weights(out: int, width: int, seed: int = 0, kind: str = "normal") -> np.ndarray:
    random = np.random.default_rng(seed)
    drawn = {
        "normal": random.standard_normal,
        "laplace": lambda size: random.laplace(size=size),
        "heavy": lambda size: random.standard_t(3, size),
    }[kind]((out, width))
    return (drawn * 0.02).astype(np.float32)


# The layouts once more, from the operators' schemas, with loops.


def slow_code(packed: bytes, bits: int, index: int) -> int:
    """MatMulNBits: the first 4 bits are the lower 4 of a byte, the second 4 the higher; ONNX int4 likewise."""
    if bits == 8:
        return packed[index]
    return packed[index // 2] >> 4 if index % 2 else packed[index // 2] & 15


def slow_matmulnbits(q: Quantized, bits: int, width: int) -> np.ndarray:
    out, groups, block_bytes = q.codes.shape
    block = block_bytes * 8 // bits
    weight = np.zeros((out, groups * block), np.float32)
    for n in range(out):
        for g in range(groups):
            point = (8 if bits == 4 else 128) if q.zero_points is None else slow_code(bytes(q.zero_points[n]), bits, g)
            for k in range(block):
                weight[n, g * block + k] = F(slow_code(bytes(q.codes[n, g]), bits, k) - point) * q.scales[n, g]
    assert not weight[:, width:].any(), "padding must be zero"
    return weight[:, :width]


def slow_qdq(matrix: affine.QdqMatrix, spec: Affine, out: int, width: int) -> np.ndarray:
    def value(packed: np.ndarray, index: int) -> int:
        code = slow_code(bytes(packed), spec.bits, index)
        half = 1 << (spec.bits - 1)
        return code - 2 * half if spec.qdq_type.startswith("int") and code >= half else code

    block = spec.qdq_attributes(width).get("block_size", width)
    weight = np.zeros((out, width), np.float32)
    for k in range(width):
        for n in range(out):
            at = k // block * out + n
            point = 0 if matrix.zero_points is None else value(matrix.zero_points, at)
            weight[n, k] = F(value(matrix.codes, k * out + n) - point) * matrix.scales.reshape(-1)[at]
    return weight


def slow_rtn(group: list[np.float32], bits: int, symmetric: bool) -> tuple[list[int], np.float32, int]:
    """Codes, scale and zero point of one group by the definition in `quantize_kernels`."""
    top = (1 << bits) - 1
    lowest, highest = min([F(0), *group]), max([F(0), *group])
    if max(-lowest, highest) < 2.0**-100:
        return [(top + 1) // 2 if symmetric else 0] * len(group), F(1), (top + 1) // 2 if symmetric else 0
    if symmetric:
        scale, point = max(-lowest, highest) / F(top // 2), (top + 1) // 2
    else:
        scale = (highest - lowest) / F(top)
        point = min(max(round(float(-lowest / scale)), 0), top)
    inverse = F(1) / scale
    return [min(max(round(float(w * inverse)) + point, 0), top) for w in group], scale, point


values = st.floats(-1e3, 1e3, width=32) | st.sampled_from([0.0, -0.0, 1e-40, -1e-45, 1.0, -1.0, 1e30, -1e30, 2.0**126])
matrices = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 12, 31, 32, 33, 65, 80, 257, 300])).flatmap(
    lambda shape: arrays.arrays(np.float32, shape, elements=values, fill=values)
)


@settings(max_examples=40, deadline=None)
@given(matrices, st.sampled_from(SPECS), st.sampled_from(METHODS))
def test_every_byte_against_loops(matrix, spec, method):
    spec = Affine(spec.bits, spec.group_size, spec.symmetric, method)
    out, width = matrix.shape
    q = quantize(matrix, spec, 1)
    slow = slow_matmulnbits(q, spec.bits, width)
    np.testing.assert_array_equal(dequantize(*q[:3], spec.bits, width), slow)
    sizes = spec.sizes(out, width)
    assert sizes == (q.codes.nbytes, q.scales.nbytes, 0 if q.zero_points is None else q.zero_points.nbytes)

    qdq = to_qdq(*q[:3], spec, width)
    np.testing.assert_array_equal(slow_qdq(qdq, spec, out, width), slow)
    np.testing.assert_array_equal(dequantize_qdq(qdq, spec, out, width), slow)
    sizes = spec.sizes(out, width, "qdq")
    assert sizes == (qdq.codes.nbytes, qdq.scales.nbytes, 0 if qdq.zero_points is None else qdq.zero_points.nbytes)

    w, v = matrix.astype(float), slow.astype(float)
    errors = (matrix - slow).astype(float)
    sums = ((errors**2).sum(), (w**2).sum(), (w * v).sum(), (v**2).sum())
    np.testing.assert_allclose([*vars(q.fit).values()], sums, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(matrices, st.sampled_from(BITS), st.booleans())
def test_plain_rounding_against_loops(matrix, bits, symmetric):
    spec = Affine(bits, 32, symmetric, "rtn")
    q = quantize(matrix, spec, 1)
    block = spec.block_size(matrix.shape[1])
    for n, row in enumerate(matrix):
        for g in range(q.codes.shape[1]):
            group = list(row[g * block : (g + 1) * block])
            codes, scale, point = slow_rtn(group, bits, symmetric)
            assert q.scales[n, g] == scale
            assert [slow_code(bytes(q.codes[n, g]), bits, k) for k in range(len(group))] == codes
            assert q.zero_points is None or slow_code(bytes(q.zero_points[n]), bits, g) == point


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_special_groups(spec, method):
    spec = Affine(spec.bits, spec.group_size, spec.symmetric, method)
    matrix = np.zeros((7, 64), np.float32)
    matrix[1] = -0.0
    matrix[2], matrix[3] = 0.75, -3e4
    matrix[4, 5] = 12.5
    matrix[5, ::2], matrix[5, 1::2] = 1e-40, -3e-45
    matrix[6, 9] = -1e-33
    q = quantize(matrix, spec)
    read = dequantize(*q[:3], spec.bits, 64)
    for row in (0, 1, 5):
        assert not read[row].any()
        assert not np.signbit(read[row]).any()
        assert (q.scales[row] == 1).all()
    np.testing.assert_allclose(read[2:5], matrix[2:5], rtol=2e-7, atol=0)
    np.testing.assert_allclose(read[6], 0, atol=1e-33)
    assert np.isfinite(q.scales).all()


def test_fit_of_parts_is_the_fit_of_the_whole():
    matrix = weights(96, 64)
    spec = Affine(4, 32)
    parts = Fit.of_rows(np.concatenate([quantize(rows, spec).sums for rows in np.split(matrix, 3)]))
    whole = quantize(matrix, spec).fit
    np.testing.assert_allclose([*vars(parts).values()], [*vars(whole).values()], rtol=1e-14)
    read = dequantize(*quantize(matrix, spec)[:3], 4, 64)
    assert whole.relative_error == pytest.approx(np.linalg.norm(matrix - read) / np.linalg.norm(matrix), rel=1e-6)
    cosine = (matrix * read).sum() / np.linalg.norm(matrix) / np.linalg.norm(read)
    assert whole.cosine == pytest.approx(cosine, rel=1e-6)
    zeros = quantize(np.zeros((2, 32), np.float32), spec).fit
    assert (zeros.relative_error, zeros.cosine) == (0, 1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_strides_threads_and_bands_change_no_byte(spec):
    matrix = weights(300, 130)
    expected = quantize(matrix, spec, 1)
    wide = np.repeat(matrix, 2, axis=1)
    read_only = matrix.copy()
    read_only.flags.writeable = False
    odd = np.frombuffer(b"-" + matrix.tobytes(), np.uint8)[1:].view(np.float32).reshape(matrix.shape)
    same = {
        "transposed": np.ascontiguousarray(matrix.T).T,
        "stepped": wide[:, ::2],
        "backwards": matrix[::-1, ::-1].copy()[::-1, ::-1],
        "read only": read_only,
        "misaligned": odd,
        "fortran band": np.asfortranarray(np.vstack([matrix[:50], matrix]))[50:],
    }
    for name, view in same.items():
        for mine, theirs in zip(quantize(view, spec, 3), expected, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
    bands = [quantize(matrix[at : at + 70], spec, 2) for at in range(0, 300, 70)]
    for place in range(3 - spec.symmetric):
        np.testing.assert_array_equal(np.concatenate([band[place] for band in bands]), expected[place])


@pytest.mark.parametrize("kind", ["normal", "laplace", "heavy"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_search_is_never_worse_in_any_group(spec, kind):
    matrix = weights(64, 272, 1, kind)

    def errors(q: Quantized) -> np.ndarray:
        squares = (matrix - dequantize(*q[:3], spec.bits, 272)).astype(float) ** 2
        span = 272 if spec.per_channel else spec.block_size(272)
        return np.add.reduceat(squares, range(0, 272, span), axis=1)

    mse = quantize(matrix, spec)
    searched, plain = errors(mse), errors(quantize(matrix, Affine(spec.bits, spec.group_size, spec.symmetric, "rtn")))
    assert (searched <= plain * (1 + 1e-12)).all()
    assert searched.sum() < plain.sum()
    if spec.symmetric:  # onnxruntime's quantizer: the largest magnitude, with its sign, becomes the most negative code
        span = 272 if spec.per_channel else spec.block_size(272)
        padded = np.pad(matrix, ((0, 0), (0, -272 % span))).reshape(64, -1, span)
        peak = np.take_along_axis(padded, np.abs(padded).argmax(2)[..., None], 2)
        scale = peak / F(-spec.middle)
        codes = np.clip(np.rint(padded * (F(1) / scale)), -spec.middle, spec.middle - 1)
        theirs = ((padded - codes.astype(np.float32) * scale).astype(float) ** 2).sum(2)
        assert (searched <= theirs * (1 + 1e-12)).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_half_quadratic_splitting_lowers_the_mean_error(spec):
    matrix = weights(64, 256, 2, "laplace")
    by_method = {}
    for method in ("rtn", "hqq"):
        q = quantize(matrix, Affine(spec.bits, spec.group_size, spec.symmetric, method))
        by_method[method] = np.abs(matrix - dequantize(*q[:3], spec.bits, 256)).sum()
    assert by_method["hqq"] < by_method["rtn"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((3, 32, True, "mse"), "bits 3"),
        ((8.0, 32, True, "mse"), "bits 8.0"),
        ((4, 33, True, "mse"), "group size 33"),
        ((4, "row", True, "mse"), "group size 'row'"),
        ((4, 32, 1, "mse"), "symmetric 1"),
        ((4, 32, True, "gptq"), "method 'gptq'"),
    ],
)
def test_unknown_choices_are_refused_in_a_sentence(arguments, found):
    with pytest.raises(GlmExportError, match=f"knows no {found}: choose one of"):
        Affine(*arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_no_number_is_refused(bad):
    matrix = weights(40, 70)
    matrix[37, 69] = bad
    for view in (matrix, np.asfortranarray(matrix)):
        with pytest.raises(GlmExportError, match="1 of its 2800 weights are NaN or infinite"):
            quantize(view, Affine(4, 32))


def test_shapes_that_do_not_fit_are_refused():
    spec = Affine(4, 32)
    with pytest.raises(GlmExportError, match="float16"):
        quantize(weights(4, 32).astype(np.float16), spec)
    with pytest.raises(GlmExportError, match="0 inputs"):
        quantize(np.zeros((3, 0), np.float32), spec)
    q = quantize(weights(4, 64), spec)
    with pytest.raises(GlmExportError, match="do not fit together"):
        dequantize(q.codes, q.scales[:, :1], None, 4, 64)
    with pytest.raises(GlmExportError, match="do not fit together"):
        dequantize(*q[:3], 4, 31)
    with pytest.raises(GlmExportError, match="were not quantized as"):
        to_qdq(*q[:3], Affine(8, 32), 64)
    assert quantize(np.zeros((0, 32), np.float32), spec).codes.shape == (0, 1, 16)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gathered_rows_are_those_of_the_matrix(spec):
    q = quantize(weights(50, 100), spec)
    whole = dequantize(*q[:3], spec.bits, 100)
    ids = np.array([[7, 0, 49], [7, 3, 3]])
    points = None if q.zero_points is None else q.zero_points[ids]
    np.testing.assert_array_equal(dequantize(q.codes[ids], q.scales[ids], points, spec.bits, 100), whole[ids])


# onnxruntime reads the same numbers.


def tensor(name: str, kind: int, shape: tuple[int, ...], data: np.ndarray) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=kind, dims=shape, raw_data=np.ascontiguousarray(data).tobytes())


def model_of(nodes: list, initializers: list, width: int, out: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, x: np.ndarray, level: int, saved: str = "") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = saved
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def matmulnbits(x: np.ndarray, q: Quantized, spec: Affine, level: int) -> np.ndarray:
    """The scales are [out, groups], as the schema has it; onnxruntime takes them flat as well."""
    names, tensors = ["x", "b", "s"], [tensor("b", TensorProto.UINT8, q.codes.shape, q.codes)]
    tensors.append(tensor("s", TensorProto.FLOAT, q.scales.shape, q.scales))
    if q.zero_points is not None:
        names.append("z")
        tensors.append(tensor("z", TensorProto.UINT8, q.zero_points.shape, q.zero_points))
    out, width = len(q.codes), x.shape[1]
    shape = {"K": width, "N": out, "bits": spec.bits, "block_size": spec.block_size(width)}
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", accuracy_level=level, **shape)
    return run(model_of([node], tensors, width, out), x, level)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("level", [0, 1, 4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_matmulnbits_computes_with_these_numbers(spec, level):
    for out, width in ((37, 300), (3, 12), (5, 33), (8, 1), (16, 80)):
        x = np.random.default_rng(3).standard_normal((7, width)).astype(np.float32)
        q = quantize(weights(out, width), spec)
        expected = x @ dequantize(*q[:3], spec.bits, width).T
        assert distance(matmulnbits(x, q, spec, level), expected) < (LEVEL_4 if level == 4 else EXACT)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_standard_form_is_the_same_product_and_onnxruntime_fuses_it(spec, tmp_path):
    kind = TensorProto.DataType.Value(spec.qdq_type.upper())
    for out, width in ((37, 300), (3, 12), (5, 33), (8, 1), (16, 80)):
        x = np.random.default_rng(3).standard_normal((7, width)).astype(np.float32)
        q = quantize(weights(out, width), spec)
        qdq = to_qdq(*q[:3], spec, width)
        names, tensors = ["b", "s"], [tensor("b", kind, (width, out), qdq.codes)]
        tensors.append(tensor("s", TensorProto.FLOAT, qdq.scales.shape, qdq.scales))
        if qdq.zero_points is not None:
            names.append("z")
            tensors.append(tensor("z", kind, qdq.scales.shape, qdq.zero_points))
        nodes = [helper.make_node("DequantizeLinear", names, ["w"], **spec.qdq_attributes(width))]
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
        saved = str(tmp_path / "optimized.onnx")
        model = model_of(nodes, tensors, width, out)
        expected = x @ dequantize(*q[:3], spec.bits, width).T
        assert distance(run(model, x, 0, saved), expected) < EXACT
        assert distance(ReferenceEvaluator(model).run(None, {"x": x})[0], expected) < EXACT
        assert [node.op_type for node in onnx.load(saved).graph.node] == ["MatMulNBits"]


def test_what_is_broken_is_seen():
    spec = Affine(4, 32)
    x = np.random.default_rng(3).standard_normal((7, 96)).astype(np.float32)
    q = quantize(weights(16, 96), spec)
    expected = x @ dequantize(*q[:3], 4, 96).T
    reversed_nibbles = q._replace(codes=(q.codes << 4) | (q.codes >> 4))
    doubled = q._replace(scales=np.where(np.arange(16)[:, None] == 5, 2, 1).astype(np.float32) * q.scales)
    for broken in (reversed_nibbles, doubled):
        assert distance(matmulnbits(x, broken, spec, 0), expected) > WRONG
        assert distance(matmulnbits(x, broken, spec, 4), expected) > WRONG
        assert distance(slow_matmulnbits(broken, 4, 96), dequantize(*q[:3], 4, 96)) > WRONG
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(dequantize(*reversed_nibbles[:3], 4, 96), slow_matmulnbits(q, 4, 96))


def test_one_kernel_is_compiled_for_everything():
    quantize(weights(4, 32), Affine(4, 32))
    quantize(weights(4, 64)[::2, ::2], Affine(8, 32, symmetric=False))
    assert len(quantize_kernels._KERNEL._compiled.signatures) == 1


def test_without_a_place_for_its_cache_the_kernel_still_compiles(monkeypatch):
    class Refusing:
        def __call__(self, *signatures, cache=False, **options):
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return lambda function: lambda: "compiled"

    monkeypatch.setattr("glmexport.compiled.numba.njit", Refusing())
    assert Kernel(quantize_kernels._quantize_rows, "")() == "compiled"


@pytest.mark.slow
def test_threads_that_need_a_kernel_at_once_have_it_compiled_once(tmp_path):
    """On a computer that has none in its cache."""
    code = (
        "import threading, numpy as np; from glmexport.affine import Affine;"
        "from glmexport.quantize_kernels import quantize;"
        "failed = []; threading.excepthook = lambda what: failed.append(what.exc_value);"
        "matrix = np.ones((8, 64), np.float32);"
        "threads = [threading.Thread(target=quantize, args=(matrix, Affine(4, 32))) for _ in range(4)];"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]; assert not failed, failed"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_processor(tmp_path):
    code = (
        "import hashlib, numpy as np; from glmexport.affine import *; from glmexport.quantize_kernels import quantize\n"
        "w = np.random.default_rng(0).standard_normal((70, 300)).astype('f4')\n"
        "specs = [Affine(b, g, s, m) for b in BITS for g in GROUP_SIZES for s in (True, False) for m in METHODS]\n"
        "print(hashlib.sha256(repr([[getattr(p, 'tolist', lambda: p)() for p in quantize(w, s)] for s in specs])"
        ".encode()).hexdigest())"
    )
    digests = set()
    for processor in ("", "generic", "x86-64-v3")[: 3 if os.uname().machine == "x86_64" else 2]:
        chosen = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""} if processor else {}
        settings = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), **chosen}
        done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1
