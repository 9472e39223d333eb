"""Tensors about to be written give the same bytes however many bands they are read in."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmexport.affine import Affine
from glmexport.errors import BundleError, GlmExportError
from glmexport.onnx_files import ExternalTensor, stored_bytes
from glmexport.quantize_kernels import quantize
from glmexport.quantized import QuantizedMatrix
from glmexport.tensors import (
    SLICE_BYTES,
    ArrayTensor,
    FileTensor,
    SelectedRows,
    matrix_shape,
    rows_per_slice,
)
from glmexport.vocabulary import VocabularyMap


def file_tensor(directory: Path, value: np.ndarray, *, transposed: bool = False, offset: int = 8192) -> FileTensor:
    (directory / "data").write_bytes(bytes(offset) + value.tobytes() + b"after")
    place = ExternalTensor("w", value.dtype.name, value.shape, "data", offset, value.nbytes)
    return FileTensor(directory, place, transposed)


@pytest.mark.parametrize("slice_bytes", [1, 100, 1000, SLICE_BYTES])
@pytest.mark.parametrize("dtype", ["float32", "uint8", "uint16"])
def test_a_file_in_bands(tmp_path, monkeypatch, slice_bytes, dtype):
    monkeypatch.setattr("glmexport.tensors.SLICE_BYTES", slice_bytes)
    value = np.arange(37 * 9).reshape(37, 9).astype(dtype)
    tensor = file_tensor(tmp_path, value)
    bands = list(tensor.slices())
    assert all(len(band) for band in bands)
    assert len(bands) > 1 or slice_bytes > value.nbytes
    assert all(band.nbytes <= max(slice_bytes, value[:1].nbytes) for band in bands)
    np.testing.assert_array_equal(np.concatenate(bands), value)
    assert (tensor.name, tensor.dtype, tensor.shape) == ("w", dtype, (37, 9))


@pytest.mark.parametrize("slice_bytes", [1, 100, SLICE_BYTES])
def test_a_transposed_matrix_comes_in_the_checkpoints_orientation(tmp_path, monkeypatch, slice_bytes):
    monkeypatch.setattr("glmexport.tensors.SLICE_BYTES", slice_bytes)
    stored = np.arange(40, dtype=np.float32).reshape(5, 8)  # [in, out]
    tensor = file_tensor(tmp_path, stored, transposed=True)
    assert matrix_shape(tensor) == (8, 5)
    np.testing.assert_array_equal(np.concatenate(list(tensor.bands())), stored.T)
    np.testing.assert_array_equal(np.concatenate(list(tensor.slices())), stored, "as it is stored")
    assert matrix_shape(file_tensor(tmp_path, stored)) == (5, 8)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1,), (7,)])
def test_4_bit_elements_come_as_bytes(tmp_path, monkeypatch, shape):
    monkeypatch.setattr("glmexport.tensors.SLICE_BYTES", 3)
    data = np.arange(stored_bytes("int4", shape), dtype=np.uint8)
    (tmp_path / "data").write_bytes(data.tobytes())
    tensor = FileTensor(tmp_path, ExternalTensor("w", "int4", shape, "data", 0, data.nbytes))
    assert b"".join(band.tobytes() for band in tensor.slices()) == data.tobytes()


def test_a_file_too_short(tmp_path):
    tensor = file_tensor(tmp_path, np.zeros((100, 8), np.float32))
    with (tmp_path / "data").open("r+b") as file:
        file.truncate(9000)
    with pytest.raises(BundleError, match="data ends inside w"):
        list(tensor.slices())


def test_an_array(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = ArrayTensor("a", value)
    assert (tensor.name, tensor.dtype, tensor.shape) == ("a", "float32", (2, 3))
    np.testing.assert_array_equal(np.concatenate(list(tensor.slices())), value)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(1, 300), st.data())
def test_selected_rows_whatever_the_bands(tmp_path, monkeypatch, rows, slice_bytes, data):
    monkeypatch.setattr("glmexport.tensors.SLICE_BYTES", slice_bytes)
    kept = data.draw(st.sets(st.integers(0, rows - 1), min_size=1))
    table = np.arange(rows * 6, dtype=np.float32).reshape(rows, 6)
    selected = SelectedRows(file_tensor(tmp_path, table), VocabularyMap.from_ids(kept, rows))
    assert selected.shape == (len(kept), 6)
    assert (selected.name, selected.dtype, selected.transposed) == ("w", "float32", False)
    for bands in (selected.slices(), selected.bands()):
        np.testing.assert_array_equal(np.concatenate(list(bands)), table[sorted(kept)])


def test_rows_of_three_axes_are_selected_too(tmp_path):
    codes = np.arange(5 * 2 * 16, dtype=np.uint8).reshape(5, 2, 16)
    selected = SelectedRows(file_tensor(tmp_path, codes), VocabularyMap(5, ((1, 2), (3, 5))))
    assert selected.shape == (3, 2, 16)
    np.testing.assert_array_equal(np.concatenate(list(selected.slices())), codes[[1, 3, 4]])


def test_rows_per_slice():
    assert rows_per_slice(4096) == SLICE_BYTES // (4 * 4096)
    assert rows_per_slice(SLICE_BYTES) == 1, "one row at least"
    assert rows_per_slice(0) == SLICE_BYTES


# A quantized matrix, band by band


class InBands:
    """A matrix that comes in bands of so many rows."""

    def __init__(self, value: np.ndarray, rows: int) -> None:
        self.name, self.dtype, self.transposed, self.shape = "w", "float32", False, value.shape
        self._value, self._rows = value, rows

    def bands(self):
        for start in range(0, len(self._value), self._rows):
            yield self._value[start : start + self._rows]

    slices = bands


def written(value: np.ndarray, rows: int, affine: Affine, layout: str) -> tuple[dict[str, bytes], dict]:
    matrix = QuantizedMatrix(InBands(value, rows), affine, layout)
    parts = {}
    for tensor in matrix.tensors:
        parts[tensor.name] = b"".join(np.ascontiguousarray(part).tobytes() for part in tensor.slices())
        assert len(parts[tensor.name]) == stored_bytes(tensor.dtype, tensor.shape), tensor.name
    return parts, matrix.record()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, "channel"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["matmulnbits", "qdq"])
def test_bands_make_no_difference(monkeypatch, layout, bits, group_size, symmetric):
    """The qdq layout is turned some groups at a time."""
    value = np.random.default_rng(1).standard_normal((37, 300)).astype(np.float32)
    affine = Affine(bits, group_size, symmetric)
    whole = written(value, 37, affine, layout)
    assert list(whole[0]) == ["w.codes", "w.scales", *([] if symmetric else ["w.zero_points"])]
    monkeypatch.setattr("glmexport.quantized.TURN_BYTES", 1)
    for rows in (1, 5, 36):
        assert written(value, rows, affine, layout)[0] == whole[0]
    fit = quantize(value, affine).fit
    assert (whole[1]["relative_error"], whole[1]["cosine"]) == (fit.relative_error, fit.cosine)
    assert whole[1]["bytes"] == sum(map(len, whole[0].values()))


def test_bands_make_no_difference_to_the_record():
    """A slimmed head comes in other bands from a checkpoint than from a bundle, and both manifests must be the same."""
    value = np.random.default_rng(1).standard_normal((60, 300)).astype(np.float32)
    records = [written(value, rows, Affine(4, 32), "matmulnbits")[1] for rows in (1, 5, 7, 36, 59, 60)]
    assert records == records[:1] * len(records)


def test_measuring_is_what_is_recorded():
    value = np.random.default_rng(1).standard_normal((37, 300)).astype(np.float32)
    matrix = QuantizedMatrix(InBands(value, 37), Affine(4, 32), "matmulnbits")
    assert matrix.measure() == quantize(value, Affine(4, 32)).fit


def test_weights_that_cannot_be_quantized_are_named():
    value = np.ones((8, 40), np.float32)
    value[3, 7] = np.nan
    matrix = QuantizedMatrix(InBands(value, 2), Affine(4, 32), "matmulnbits")
    with pytest.raises(GlmExportError, match="w cannot be quantized: 1 of its 80 weights are NaN or infinite"):
        list(matrix.codes())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read ahead")]
    with pytest.raises(GlmExportError, match="w cannot be quantized"):
        matrix.rest("scales")


def test_scales_wait_for_the_codes():
    value = np.random.default_rng(3).normal(size=(64, 64)).astype(np.float32)
    matrix = QuantizedMatrix(InBands(value, 16), Affine(4, 32), "matmulnbits")
    with ThreadPoolExecutor(1) as executor:
        scales = executor.submit(matrix.rest, "scales")
        assert not scales.done()
        list(matrix.codes())
        assert scales.result(10).shape == (64, 2)
