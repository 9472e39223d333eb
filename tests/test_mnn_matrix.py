"""Matrices in MNN's layout, against a slow decoder of its own; no MNN is needed."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmexport.convert.mnn_matrix import (
    Integers,
    MnnMatrix,
    StoredMatrix,
    block_for,
    dequantized,
    is_nearest,
    pack_codes,
    quantized,
    unpack_codes,
)
from glmexport.errors import ExportError

RANDOM = np.random.default_rng(5)


def stored_bytes(matrix: MnnMatrix, rows: np.ndarray, bias: np.ndarray) -> np.ndarray:
    if matrix.is_integers:
        codes, scales = quantized(rows, matrix)
        parts = [matrix.header, pack_codes(codes, matrix.bits).tobytes(), scales.tobytes(), bias.tobytes()]
    else:
        parts = [rows.astype(np.float32 if matrix.bits == 32 else np.float16).tobytes(), bias.tobytes()]
    return np.frombuffer(b"".join(parts), np.uint8)


def slowly_decoded(data: bytes, matrix: MnnMatrix) -> np.ndarray:
    """By the layout as MNN's converter writes it: one number after the other."""
    wide = matrix.outputs * matrix.blocks > 65535 or matrix.block > 65535
    dims, rows, width, levels = struct.unpack_from("<B2IB" if wide else "<B2HB", data)
    assert (dims, rows, width) == (2, matrix.outputs * matrix.blocks, matrix.block)
    levels = levels or 256
    at = struct.calcsize("<B2IB" if wide else "<B2HB")
    table = np.frombuffer(data, np.int8, levels, at).astype(int)
    at += levels
    count = matrix.outputs * matrix.inputs
    if levels == 16:
        numbers = [data[at + i // 2] >> 4 if i % 2 == 0 else data[at + i // 2] & 15 for i in range(count)]
        at += -(-count // 2)
    else:
        numbers = [data[at + i] for i in range(count)]
        at += count
    pairs = np.frombuffer(data, np.float32, rows * 2, at).reshape(rows, 2)
    values = [
        (table[number] + levels // 2) * pairs[i // width, 1] + pairs[i // width, 0] for i, number in enumerate(numbers)
    ]
    return np.array(values, np.float32).reshape(matrix.outputs, matrix.inputs)


@pytest.mark.parametrize(("bits", "inputs", "block"), [(4, 64, 16), (8, 64, 64), (4, 48, 48), (8, 17, 17), (4, 7, 7)])
def test_integers_lie_as_the_layout_says(bits, inputs, block):
    matrix, rows = MnnMatrix(5, inputs, bits, block), RANDOM.standard_normal((5, inputs), np.float32)
    bias = RANDOM.standard_normal(5, np.float32)
    data = stored_bytes(matrix, rows, bias)
    assert len(data) == matrix.total_bytes
    stored = StoredMatrix(data, matrix)
    assert np.array_equal(stored.bias, bias)
    slow = slowly_decoded(data.tobytes(), matrix)
    np.testing.assert_allclose(stored.rows(0, 5), slow, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([stored.rows(0, 2), stored.rows(2, 3)]), stored.rows(0, 5))
    step = (rows.reshape(5, -1, block).max(-1) - rows.reshape(5, -1, block).min(-1)) / ((1 << bits) - 1)
    assert (np.abs(slow - rows).reshape(5, -1, block).max(-1) <= step * 0.5001).all()


def test_a_header_has_wide_sizes_where_narrow_ones_do_not_do():
    assert not MnnMatrix(65535, 32, 4, 32).wide_header
    wide = MnnMatrix(65536, 16, 8, 16)
    assert wide.wide_header
    rows = RANDOM.standard_normal((65536, 16), np.float32)
    assert (
        np.abs(
            StoredMatrix(stored_bytes(wide, rows, np.zeros(65536, np.float32)), wide).rows(65000, 9) - rows[65000:65009]
        ).max()
        < 0.02
    )


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 8]), st.data())
@settings(max_examples=40, deadline=None)
def test_packing_is_undone(rows, inputs, bits, data):
    codes = np.array(
        data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=rows * inputs, max_size=rows * inputs)), np.uint8
    )
    packed = pack_codes(codes.reshape(rows, inputs), bits)
    first = data.draw(st.integers(0, codes.size - 1))
    found = unpack_codes(packed[first * bits // 8 :], bits, first * bits % 8 > 0, codes.size - first)
    np.testing.assert_array_equal(found, codes[first:])


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_are_odd(bits):
    rows = np.zeros((4, 32), np.float32)
    rows[1] = 3.25  # one value
    rows[2, 5] = -1e4  # one outlier
    rows[3] = np.linspace(1e-20, 2e-20, 32)
    matrix = MnnMatrix(4, 32, bits, 32)
    found = dequantized(quantized(rows, matrix), matrix)
    np.testing.assert_array_equal(found[:2], rows[:2])
    assert found[2, 5] == -1e4
    assert is_nearest(found, rows, matrix, rounded=True)
    found[3, 0] *= 1.5
    assert not is_nearest(found, rows, matrix, rounded=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(value):
    rows = np.ones((1, 16), np.float32)
    rows[0, 3] = value
    with pytest.raises(ExportError, match="no finite number"):
        quantized(rows, MnnMatrix(1, 16, 4, 16))


def test_symmetric_integers_are_exact():
    matrix = MnnMatrix(2, 32, 4, 16, symmetric=True)
    codes = RANDOM.integers(0, 16, (2, 32)).astype(np.uint8)
    scales = RANDOM.random((2, 2, 1), np.float32)
    expected = (codes.reshape(2, 2, 16).astype(np.float32) - 8) * scales
    np.testing.assert_array_equal(dequantized(Integers(codes, scales), matrix), expected.reshape(2, 32))


@pytest.mark.parametrize(
    ("inputs", "at_most", "block"),
    [
        ({4096, 16384}, 128, 128),
        ({64, 256}, 128, 64),
        ({96, 256}, 128, 32),
        ({40, 300}, 128, None),
        ({64, 256}, 47, 32),
        ({48}, 128, 48),
        ({64}, 15, None),
    ],
)
def test_the_block_divides_every_matrix(inputs, at_most, block):
    assert block_for(inputs, at_most) == block


def test_another_form_s_header_is_found():
    rows = RANDOM.standard_normal((4, 32), np.float32)
    data = stored_bytes(MnnMatrix(4, 32, 4, 16), rows, np.zeros(4, np.float32))
    with pytest.raises(ExportError, match="header"):
        StoredMatrix(data, MnnMatrix(4, 32, 4, 32))
    with pytest.raises(ExportError, match="cut off"):
        StoredMatrix(data[:-1], MnnMatrix(4, 32, 4, 16))
    with pytest.raises(ExportError, match="do not divide"):
        MnnMatrix(4, 40, 4, 32)


@pytest.mark.parametrize("bits", [32, 16])
def test_floats_are_held_to_their_own_rounding(bits):
    matrix, rows = MnnMatrix(3, 5, bits), RANDOM.standard_normal((3, 5), np.float32)
    stored = StoredMatrix(stored_bytes(matrix, rows, np.zeros(3, np.float32)), matrix)
    assert is_nearest(stored.rows(0, 3), rows, matrix, rounded=True)
    assert not is_nearest(stored.rows(0, 3) * np.float32(1.001), rows, matrix, rounded=True)
