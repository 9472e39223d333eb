"""External data: alignment, exact bytes, bands read back, and everything that must be refused."""

from __future__ import annotations

import io

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from glmexport.errors import BundleError
from glmexport.onnx_files import (
    ALIGNMENT,
    ExternalDataWriter,
    ExternalTensor,
    aligned_size,
    external_initializer,
    external_tensors,
    load_graph,
    read_band,
    stamp,
)

DTYPES = ("float32", "float16", "int64", "uint8")


def written(arrays: dict[str, list[np.ndarray]], dtype: str = "float32") -> tuple[bytes, list[ExternalTensor]]:
    """Write each tensor given as slices along its first axis."""
    sink = io.BytesIO()
    writer = ExternalDataWriter(sink, "x.data")
    for name, slices in arrays.items():
        shape = (sum(len(part) for part in slices), *slices[0].shape[1:])
        writer.add(name, dtype, shape, slices)
    return sink.getvalue(), writer.tensors


def test_bytes_are_exact_and_aligned():
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.full(5, -1.5, np.float32)
    data, tensors = written({"a": [first], "b": [second]})
    assert ALIGNMENT == 4096
    assert data == first.tobytes() + bytes(4096 - 24) + second.tobytes()
    assert tensors == [
        ExternalTensor("a", "float32", (2, 3), "x.data", 0, 24),
        ExternalTensor("b", "float32", (5,), "x.data", 4096, 20),
    ]


def test_slices_need_not_be_contiguous():
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    data, _ = written({"a": [whole.T[:2], whole.T[2:]]})
    assert data == np.ascontiguousarray(whole.T).tobytes()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_wrong_number_of_bytes_is_refused(rows):
    writer = ExternalDataWriter(io.BytesIO(), "x.data")
    with pytest.raises(BundleError, match=rf"w: {12 * rows} bytes of weights were produced, 24 expected for \[2, 3\]"):
        writer.add("w", "float32", (2, 3), [np.zeros((rows, 3), np.float32)])
    assert writer.tensors == []


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_every_band_reads_back(tmp_path_factory, shapes, dtype, data):
    generator = np.random.default_rng(len(shapes))
    arrays = {f"t{i}": generator.integers(0, 200, shape).astype(dtype) for i, shape in enumerate(shapes)}
    slices = {}
    for name, array in arrays.items():
        cut = data.draw(st.integers(0, len(array) - 1))
        slices[name] = [array[:cut], array[cut:]] if cut else [array]
    content, tensors = written(slices, dtype)
    assert len(content) == aligned_size(array.nbytes for array in arrays.values())
    directory = tmp_path_factory.mktemp("bands")
    (directory / "x.data").write_bytes(content)
    previous = 0
    for tensor in tensors:
        array = arrays[tensor.name]
        assert tensor.offset % ALIGNMENT == 0
        assert previous <= tensor.offset < previous + ALIGNMENT
        previous = tensor.offset + tensor.length
        start = data.draw(st.integers(0, len(array) - 1))
        stop = data.draw(st.integers(start, len(array)))
        band = read_band(directory, tensor, start, stop)
        np.testing.assert_array_equal(band, array[start:stop])
        assert band.dtype == array.dtype


def test_a_band_is_no_view_of_the_file(tmp_path):
    (tmp_path / "x.data").write_bytes(np.ones(4, np.float32).tobytes())
    band = read_band(tmp_path, ExternalTensor("a", "float32", (4,), "x.data", 0, 16), 0, 4)
    band[:] = 5
    assert np.fromfile(tmp_path / "x.data", np.float32).tolist() == [1.0] * 4


def test_a_file_that_ends_early_is_named(tmp_path):
    (tmp_path / "x.data").write_bytes(bytes(30))
    with pytest.raises(BundleError, match=r"x\.data ends inside a"):
        read_band(tmp_path, ExternalTensor("a", "float32", (2, 4), "x.data", 0, 32), 0, 2)


def small_model(*tensors: TensorProto) -> onnx.ModelProto:
    node = onnx.helper.make_node("Add", ["x", "slot"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    return onnx.helper.make_model(onnx.helper.make_graph([node], "skeleton", values[:1], values[1:], list(tensors)))


def test_onnx_reads_what_is_written(tmp_path):
    value = np.linspace(-1, 1, 3, dtype=np.float32)
    data, tensors = written({"padding": [np.zeros(5, np.float32)], "weight": [value]})
    (tmp_path / "x.data").write_bytes(data)
    model = stamp(small_model(), "graph", {"slot": "weight"}, {"scalar": np.float32([2])})
    model.graph.initializer.extend(map(external_initializer, tensors))
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    loaded = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "x.onnx").graph.initializer}
    np.testing.assert_array_equal(loaded["weight"], value)
    np.testing.assert_array_equal(loaded["scalar"], [2.0])
    assert external_tensors(load_graph(tmp_path / "x.onnx"), "x") == tensors


def test_stamp_leaves_the_skeleton_alone():
    skeleton = small_model()
    before = skeleton.SerializeToString()
    model = stamp(skeleton, "graph", {"slot": "w"}, {"c": np.float32([1])})
    assert skeleton.SerializeToString() == before
    assert model.graph.name == "graph"
    assert list(model.graph.node[0].input) == ["x", "w"]
    assert [tensor.name for tensor in model.graph.initializer] == ["c"]


@pytest.mark.parametrize(("key", "value"), [("offset", "-1"), ("offset", "x"), ("length", ""), ("length", "1e3")])
def test_external_entries_that_are_no_numbers_are_refused(key, value):
    proto = external_initializer(ExternalTensor("w", "float32", (3,), "g.data", 0, 12))
    next(entry for entry in proto.external_data if entry.key == key).value = value
    with pytest.raises(BundleError, match=r"lm\.onnx: the external data of w has offset .* expected whole numbers"):
        external_tensors(small_model(proto), "lm.onnx")


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\xff" * 40])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"x\.onnx (is not a readable ONNX model|holds no ONNX graph)"):
        load_graph(tmp_path / "x.onnx")


def test_an_absent_graph_is_named(tmp_path):
    with pytest.raises(BundleError, match=r"absent\.onnx could not be read \(No such file or directory\)"):
        load_graph(tmp_path / "absent.onnx")


def test_aligned_size():
    assert aligned_size([]) == 0
    assert aligned_size([1]) == 1
    assert aligned_size([1, 1]) == 4097
    assert aligned_size([4096, 1]) == 4097
