"""Skeletons: no weights, the fixed interface, every opset, the same bytes every time; stamped equals traced."""

from __future__ import annotations

import copy
import dataclasses
import functools
import resource
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn

from glmexport import interface, names
from glmexport.builtins_lock import BUILTINS_LOCK
from glmexport.checkpoint import open_checkpoint
from glmexport.config import ModelConfig, SpecialIds
from glmexport.errors import ExportError, GlmExportError
from glmexport.graph_lint import lint_graph
from glmexport.graphs import GraphPart, block_part, graph_parts, stored_transposed
from glmexport.interface import DEFAULT_OPSET, OPSETS
from glmexport.onnx_files import ExternalDataWriter, external_initializer, stamp
from glmexport.patches.chatglm_6b import CHATGLM_6B
from glmexport.trace import TRACED_LENGTHS, Skeleton, trace

CONFIG = ModelConfig("chatglm-6b", 64, 48, 2, 3, 80, 2048, 1e-5, 0, SpecialIds(50, 51, 54, 55, 3, 5))
FULL_SIZE = ModelConfig(
    "chatglm-6b", 130528, 4096, 28, 32, 16384, 2048, 1e-5, 0, SpecialIds(130000, 130001, 130004, 130005, 3, 5)
)
KINDS = {names.KIND_EMBEDDING: 0, names.KIND_BLOCK: 1, names.KIND_HEAD: -1}
QUICK_OPSETS = (14, 17, DEFAULT_OPSET, 24)
ALL_OPSETS = [pytest.param(opset, marks=() if opset in QUICK_OPSETS else pytest.mark.slow) for opset in OPSETS]


def weightless_parts(config: ModelConfig, argmax: str = "none") -> tuple[GraphPart, ...]:
    with torch.device("meta"):
        patched = CHATGLM_6B.apply(CHATGLM_6B.build_reference(config))
    return graph_parts(CHATGLM_6B, config, patched, argmax)


@functools.cache
def traced(kind: str, opset: int, argmax: str = "none") -> Skeleton:
    part = weightless_parts(CONFIG, argmax)[KINDS[kind]]
    return trace(part.module, part.spec, opset)


def spec_of(kind: str, argmax: str = "none"):
    return weightless_parts(CONFIG, argmax)[KINDS[kind]].spec


def filled(part: GraphPart, skeleton: Skeleton, directory: Path, module: nn.Module | None = None) -> Path:
    """Write the skeleton with weights (seeded ones without `module`) into `directory`, as a graph of a bundle."""
    tensors = dict((module or part.module).named_parameters()) | dict((module or part.module).named_buffers())
    generator = np.random.default_rng(0)
    location = names.data_file(part.name)
    renames = {slot: part.checkpoint_name(slot) for slot in skeleton.slots}
    inline = {}
    with (directory / location).open("wb") as file:
        data = ExternalDataWriter(file, location)
        for slot, name in renames.items():
            tensor = tensors[slot]
            if tensor.numel() == 1:
                inline[name] = tensor.numpy()
                continue
            shape = tuple(tensor.shape)
            value = generator.standard_normal(shape, np.float32) if tensor.is_meta else tensor.detach().numpy()
            data.add(name, "float32", shape, [value])
    model = stamp(skeleton.model, part.name, renames, inline)
    model.graph.initializer.extend(map(external_initializer, data.tensors))
    path = directory / names.graph_file(part.name)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opset", ALL_OPSETS)
def test_skeletons_hold_no_weights_and_keep_the_interface(kind, opset):
    skeleton, spec = traced(kind, opset), spec_of(kind)
    model = skeleton.model
    for values, expected in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        found = [
            interface.TensorSpec(
                value.name,
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
                tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        ]
        assert tuple(found) == expected
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset}
    held = {tensor.name for tensor in model.graph.initializer}
    assert held.isdisjoint(skeleton.slots)
    assert sum(np.prod(tensor.dims) for tensor in model.graph.initializer) < 100, "axes, shapes and scalars only"
    read = Counter(name for node in model.graph.node for name in node.input)
    assert all(read[slot] for slot in skeleton.slots), "every weight is read by its own name"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opset", ALL_OPSETS)
def test_skeletons_hold_nothing_of_the_exporting_machine(kind, opset):
    model = traced(kind, opset).model
    assert not [node.name for node in model.graph.node if node.doc_string or node.metadata_props]
    assert not model.metadata_props
    assert not model.graph.metadata_props
    assert not model.doc_string
    assert not model.graph.doc_string
    assert not model.graph.value_info
    assert not model.functions
    for name in ("site-packages", str(Path.home()), str(Path.cwd())):
        assert name.encode() not in model.SerializeToString()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opset", ALL_OPSETS)
def test_filled_skeletons_pass_the_lint_at_every_opset(kind, opset, tmp_path):
    part = weightless_parts(CONFIG)[KINDS[kind]]
    path = filled(part, traced(kind, opset), tmp_path)
    assert lint_graph(path, part.spec, opset) == []
    operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert operators.isdisjoint({"If", "Loop", "Scan", "Shape", "Constant", "Identity"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opset", ALL_OPSETS)
def test_every_opset_computes_the_same(kind, opset, tmp_path):
    """Run at lengths other than the traced ones and against the default opset, from the same seeded weights."""
    part = weightless_parts(CONFIG)[KINDS[kind]]
    lengths = {"batch": 1, "seq": 6, "past": 9, "total": 15}
    assert all(lengths[axis] != TRACED_LENGTHS[axis] for axis in lengths)
    generator = np.random.default_rng(1)
    feeds = {}
    for tensor in part.spec.inputs:
        shape = [lengths.get(size, size) for size in tensor.shape]
        feeds[tensor.name] = {
            "int64": generator.integers(0, 60, shape),
            "float32": generator.standard_normal(shape, np.float32),
            "bool": generator.random(shape) < 0.3,
        }[tensor.dtype]
    results = []
    for index, number in enumerate((opset, DEFAULT_OPSET)):
        directory = tmp_path / str(index)
        directory.mkdir()
        path = filled(part, traced(kind, number), directory)
        results.append(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds))
    for found, expected, tensor in zip(*results, part.spec.outputs, strict=True):
        assert list(found.shape) == [lengths.get(size, size) for size in tensor.shape]
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opset", [14, DEFAULT_OPSET])
def test_a_second_trace_gives_the_same_bytes(kind, opset):
    part = weightless_parts(CONFIG)[KINDS[kind]]
    again = trace(part.module, part.spec, opset)
    assert again.slots == traced(kind, opset).slots
    first = traced(kind, opset).model.SerializeToString(deterministic=True)
    assert again.model.SerializeToString(deterministic=True) == first


@pytest.mark.parametrize("opset", QUICK_OPSETS)
@pytest.mark.parametrize(("argmax", "outputs"), [("also", ["logits", "token_id"]), ("only", ["token_id"])])
def test_argmax_modes(argmax, outputs, opset, tmp_path):
    part = weightless_parts(CONFIG, argmax)[-1]
    path = filled(part, traced(names.KIND_HEAD, opset, argmax), tmp_path)
    assert lint_graph(path, part.spec, opset) == []
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == outputs
    hidden = np.random.default_rng(2).standard_normal((5, 3, CONFIG.hidden_size), np.float32)
    found = dict(zip(outputs, session.run(None, {"hidden_states": hidden}), strict=True))
    plain = filled(weightless_parts(CONFIG)[-1], traced(names.KIND_HEAD, opset), tmp_path)
    logits = onnxruntime.InferenceSession(plain).run(["logits"], {"hidden_states": hidden})[0]
    assert found["token_id"].dtype == np.int64
    assert found["token_id"].tolist() == logits.argmax(-1).tolist()
    if argmax == "also":
        np.testing.assert_array_equal(found["logits"], logits)


def test_an_unknown_argmax_mode_is_refused():
    with pytest.raises(GlmExportError, match="argmax must be one of none, also, only, found 'maybe'"):
        interface.head_spec(CONFIG, "maybe")


@pytest.mark.parametrize("opset", [0, 13, 25])
def test_other_opsets_are_refused(opset):
    part = weightless_parts(CONFIG)[0]
    with pytest.raises(ExportError, match=rf"Opset {opset} cannot be exported, expected 14 to 24\."):
        trace(part.module, part.spec, opset)


def test_traced_lengths_are_unlike_each_other():
    values = list(TRACED_LENGTHS.values())
    assert len(set(values)) == len(values)
    assert TRACED_LENGTHS["total"] == TRACED_LENGTHS["past"] + TRACED_LENGTHS["seq"]


@pytest.mark.parametrize(
    ("opset", "hidden_size", "heads"),
    [
        *((14, *sizes) for sizes in ((4, 1), (8, 2), (12, 3), (16, 4), (28, 7), (48, 2), (56, 7))),
        *((DEFAULT_OPSET, *sizes) for sizes in ((8, 2),)),
    ],
)
def test_sizes_that_meet_the_traced_lengths(hidden_size, heads, opset, tmp_path):
    """A model size equal to a traced length must not be taken for it."""
    config = dataclasses.replace(CONFIG, hidden_size=hidden_size, num_heads=heads, inner_size=7, vocab_size=59)
    part = weightless_parts(config)[KINDS[names.KIND_BLOCK]]
    path = filled(part, trace(part.module, part.spec, opset), tmp_path)
    assert lint_graph(path, part.spec, opset) == []


@pytest.mark.parametrize("opset", [14, DEFAULT_OPSET])
def test_the_full_size_model_is_traced_without_its_memory(opset):
    parts = weightless_parts(FULL_SIZE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in KINDS.values():
        part = parts[index]
        skeleton = trace(part.module, part.spec, opset)
        assert skeleton.model.ByteSize() < 20_000
        assert all(parameter.is_meta for parameter in part.module.parameters()), "the module is left as it was"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 300 << 20, "a block has 805 MB, the embedding and the head 2.1 GB each"


# A stamped block against a block that was traced with its own weights.


def real_block(checkpoint_directory: Path, block_id: int) -> GraphPart:
    """The graph of one block of the patched model with the checkpoint's weights in it."""
    with open_checkpoint(checkpoint_directory) as checkpoint:
        model = CHATGLM_6B.build_reference(checkpoint.config)
        model.load_state_dict({name: checkpoint.read(name).float() for name in model.state_dict()})
        return block_part(CHATGLM_6B, checkpoint.config, CHATGLM_6B.apply(model), block_id)


def attributes(node: onnx.NodeProto) -> list[bytes]:
    return sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)


def values_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("block_id", [1, 2])
def test_a_stamped_block_equals_a_directly_traced_one(golden_bundle, golden_checkpoint, tmp_path, block_id):
    part = real_block(golden_checkpoint, block_id)
    assert not any(parameter.is_meta for parameter in part.module.parameters())
    directly = filled(part, trace(part.module, part.spec), tmp_path, part.module)
    stamped = golden_bundle / names.graph_file(part.name)

    ours, theirs = (onnx.load(path, load_external_data=False) for path in (stamped, directly))
    assert len(ours.graph.node) == len(theirs.graph.node) > 50
    for found, expected in zip(ours.graph.node, theirs.graph.node, strict=True):
        assert (found.op_type, found.domain, found.name) == (expected.op_type, expected.domain, expected.name)
        assert (list(found.input), list(found.output)) == (list(expected.input), list(expected.output))
        assert attributes(found) == attributes(expected)
    assert ours.graph.name == theirs.graph.name == f"glm_block_{block_id}"
    assert [tensor.name for tensor in ours.graph.initializer] == [tensor.name for tensor in theirs.graph.initializer]
    for name, value in values_of(directly).items():
        found = values_of(stamped)[name]
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert found.tobytes() == value.tobytes(), name
    assert stamped.read_bytes() == directly.read_bytes(), "the whole file, too"
    data = names.data_file(part.name)
    assert (golden_bundle / data).read_bytes() == (tmp_path / data).read_bytes()


def test_initializers_carry_their_checkpoint_names(golden_bundle, golden_checkpoint):
    with open_checkpoint(golden_checkpoint) as checkpoint:
        for block_id in range(checkpoint.config.num_blocks):
            graph = onnx.load(
                golden_bundle / names.graph_file(names.block_name(block_id)), load_external_data=False
            ).graph
            prefix = f"transformer.layers.{block_id}."
            wanted = {name for name in checkpoint.weights.names() if name.startswith(prefix)}
            external = {t.name for t in graph.initializer if t.data_location == TensorProto.EXTERNAL}
            assert external == wanted, "inv_freq included"


def test_blocks_differ_in_weights_and_one_scalar_only(golden_bundle):
    models = [
        onnx.load(golden_bundle / names.graph_file(names.block_name(i)), load_external_data=False) for i in range(3)
    ]
    scales = []
    for block_id, model in enumerate(models):
        text = onnx.ModelProto()
        text.ParseFromString(
            model.SerializeToString()
            .replace(f"layers.{block_id}.".encode(), b"layers.N.")
            .replace(f"glm_block_{block_id}".encode(), b"glm_block_N")
        )
        scalar = next(t for t in text.graph.initializer if t.name.endswith("layer_scale"))
        scales.append(onnx.numpy_helper.to_array(scalar).copy())
        scalar.CopyFrom(onnx.numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), scalar.name))
        models[block_id] = text
    assert [scale.ravel().tolist() for scale in scales] == [[1.0], [2.0], [3.0]]
    assert models[0] == models[1] == models[2]


def test_stored_transposed_names_exactly_the_block_matrices():
    block = weightless_parts(CONFIG)[KINDS[names.KIND_BLOCK]].module
    matrices = {name for name, parameter in block.named_parameters() if parameter.dim() == 2}
    assert stored_transposed(block) == matrices
    assert len(matrices) == 4
    head = weightless_parts(CONFIG)[-1].module
    assert stored_transposed(head) == frozenset()


def test_tracing_leaves_the_module_alone():
    part = weightless_parts(CONFIG)[KINDS[names.KIND_BLOCK]]
    before = copy.deepcopy([(name, type(module)) for name, module in part.module.named_modules()])
    trace(part.module, part.spec, 14)
    assert [(name, type(module)) for name, module in part.module.named_modules()] == before
    assert {name for name, _ in part.module.named_buffers()} == {
        "block.attention.core_attention.layer_scale",
        "block.attention.rotary_emb.inv_freq",
    }


def test_nothing_is_compiled_while_builtins_are_replaced(monkeypatch):
    """torch.export replaces `min` and `max`, which numba cannot compile."""
    taken = []

    def tracing(*_: object) -> None:
        with ThreadPoolExecutor(1) as other:
            taken.append(other.submit(BUILTINS_LOCK.acquire, timeout=0.01).result())
        raise ExportError("that was all")

    monkeypatch.setattr("glmexport.trace._trace_dynamo", tracing)
    with pytest.raises(ExportError, match="that was all"):
        trace(nn.Identity(), interface.embedding_spec(CONFIG), 18)
    assert taken == [False]
