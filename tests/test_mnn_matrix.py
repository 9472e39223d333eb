"""Matrices in MNN's layout, against a slow decoder of its own; no MNN is needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnn_layout import slowly_read

from glmexport.affine import Affine
from glmexport.errors import ExportError
from glmexport.mnn.matrix import CodePacker, Integers, MnnMatrix, StoredMatrix, dequantized, integer_parts, unpack_codes
from glmexport.mnn.rounding import block_for, block_that_holds, is_nearest, quantized

RANDOM = np.random.default_rng(5)


def stored_bytes(matrix: MnnMatrix, rows: np.ndarray, bias: np.ndarray) -> np.ndarray:
    if matrix.is_integers:
        parts = [part.tobytes() for part in integer_parts(matrix, iter([quantized(rows, matrix)]), bias)]
    else:
        parts = [rows.astype(np.float32 if matrix.bits == 32 else np.float16).tobytes(), bias.tobytes()]
    return np.frombuffer(b"".join(parts), np.uint8)


@pytest.mark.parametrize(("bits", "inputs", "block"), [(4, 64, 16), (8, 64, 64), (4, 48, 48), (8, 17, 17), (4, 7, 7)])
def test_integers_lie_as_the_layout_says(bits, inputs, block):
    matrix, rows = MnnMatrix(5, inputs, bits, block), RANDOM.standard_normal((5, inputs), np.float32)
    bias = RANDOM.standard_normal(5, np.float32)
    data = stored_bytes(matrix, rows, bias)
    assert len(data) == matrix.total_bytes
    stored = StoredMatrix(data, matrix)
    assert np.array_equal(stored.bias, bias)
    slow, slow_bias = slowly_read(data.tobytes(), 5, inputs, bits, block)
    assert np.array_equal(slow_bias, bias)
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


@given(st.lists(st.lists(st.integers(0, 15), max_size=9), max_size=6), st.sampled_from([4, 8]), st.data())
@settings(max_examples=60, deadline=None)
def test_codes_are_packed_alike_in_any_pieces_and_come_back(pieces, bits, data):
    packer = CodePacker(bits)
    parts = [packer.push(np.array(piece, np.uint8)) for piece in pieces]
    packed = np.concatenate([*parts, packer.finish()])
    codes = [code for piece in pieces for code in piece]
    even = [*codes, *[0] * (len(codes) % 2)]
    assert packed.tolist() == (
        codes if bits == 8 else [high << 4 | low for high, low in zip(even[::2], even[1::2], strict=True)]
    )
    if codes:
        first = data.draw(st.integers(0, len(codes) - 1))
        found = unpack_codes(packed[first * bits // 8 :], bits, first * bits % 8 > 0, len(codes) - first)
        assert found.tolist() == codes[first:]


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


@pytest.mark.parametrize(
    ("group", "inputs", "block"),
    [
        (32, 64, 32),
        (64, 64, 64),
        (128, 64, 64),  # one group, narrower than it may be
        (128, 40, 40),
        ("channel", 300, 300),
        (32, 48, 16),  # the second group has 16
        (64, 272, 16),
        (128, 192, 64),
        (32, 40, None),
        (64, 300, None),
    ],
)
def test_equal_blocks_hold_the_groups_of_a_bundle(group, inputs, block):
    assert block_that_holds(Affine(4, group), inputs) == block
