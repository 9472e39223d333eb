"""One graph broken on purpose for every rule; the graphs of a bundle break none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from glmexport.bundle import open_bundle
from glmexport.errors import BundleError
from glmexport.graph_lint import lint_graph, operator_inventory
from glmexport.interface import block_spec, embedding_spec, head_spec

BLOCK = "glm_block_0.onnx"
Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def config(small_bundle):
    return open_bundle(small_bundle).config


@pytest.fixture
def lint(small_copy, config):
    """Lint a block's graph after a change to it."""

    def run(change: Change | None = None, opset: int = 18, spec=None) -> list[str]:
        path = small_copy / BLOCK
        if change:
            model = onnx.load(path, load_external_data=False)
            change(model)
            path.write_bytes(model.SerializeToString())
        return lint_graph(path, spec or block_spec(config), opset)

    return run


def initializer(model: onnx.ModelProto, ending: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name.endswith(ending))


def set_external(tensor: TensorProto, key: str, value: object) -> None:
    next(entry for entry in tensor.external_data if entry.key == key).value = str(value)


def external(tensor: TensorProto, key: str) -> int:
    return int(next(entry.value for entry in tensor.external_data if entry.key == key))


def producer(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if output in node.output)


def test_the_graphs_of_a_bundle_pass(small_bundle, config):
    assert lint_graph(small_bundle / "embedding.onnx", embedding_spec(config), 18) == []
    assert lint_graph(small_bundle / "lm.onnx", head_spec(config), 18) == []
    for block_id in range(config.num_blocks):
        assert lint_graph(small_bundle / f"glm_block_{block_id}.onnx", block_spec(config), 18) == []


def branch(op_type: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        identity = onnx.helper.make_node("Identity", ["inputs_embeds"], ["inner"])
        inner = onnx.helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
        body = onnx.helper.make_graph([identity], "branch", [], [inner])
        condition = onnx.numpy_helper.from_array(np.array(True), "condition")
        model.graph.initializer.append(condition)
        node = onnx.helper.make_node("If", ["condition"], ["chosen"], then_branch=body, else_branch=body)
        node.op_type = op_type
        model.graph.node.insert(0, node)

    return change


@pytest.mark.parametrize("op_type", ["If", "Loop", "Scan"])
def test_control_flow(lint, op_type):
    assert f"{BLOCK}: holds the control-flow operator {op_type}, expected straight-line operators only." in lint(
        branch(op_type)
    )


def test_control_flow_passes_the_checker_so_that_only_our_rule_finds_it(lint):
    assert [complaint for complaint in lint(branch("If")) if "checker" in complaint] == []


@pytest.mark.parametrize(
    ("shape", "axis", "length"), [([3, 0, -1], "axis 0", 3), ([0, 2, -1], "axis 1", 2)], ids=["seq", "batch"]
)
def test_a_baked_length(lint, shape, axis, length):
    """What an exporter does to `view(seq, batch, -1)`: the traced length becomes a constant of a Reshape."""

    def change(model: onnx.ModelProto) -> None:
        node = producer(model, "hidden_states")
        node.output[0] = "unshaped"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape), "traced_shape"))
        model.graph.node.append(onnx.helper.make_node("Reshape", ["unshaped", "traced_shape"], ["hidden_states"]))

    expected = f"{BLOCK}: output hidden_states always has {length} on {axis}, expected"
    assert any(complaint.startswith(expected) for complaint in lint(change))


def test_a_length_baked_inside_the_attention(lint):
    def change(model: onnx.ModelProto) -> None:
        shapes = {
            t.name: onnx.numpy_helper.to_array(t).tolist() for t in model.graph.initializer if not t.external_data
        }
        (merge,) = (n for n in model.graph.node if n.op_type == "Reshape" and shapes[n.input[1]] == [0, 0, -1])
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([3, 0, -1]), "traced_shape"))
        merge.input[1] = "traced_shape"

    assert any("always has 3 on axis 0" in complaint for complaint in lint(change))


def test_a_baked_length_in_the_cache(lint):
    def change(model: onnx.ModelProto) -> None:
        producer(model, "presents").output[0] = "all_presents"
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name == "presents":
                    node.input[i] = "all_presents"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "seven"))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 7, 2, 2, 16]), "wide"))
        model.graph.node.append(onnx.helper.make_node("Expand", ["seven", "wide"], ["presents"]))

    assert any("output presents always has 7 on axis 1" in complaint for complaint in lint(change))


def test_an_inlined_weight(lint, small_copy):
    def change(model: onnx.ModelProto) -> None:
        full = onnx.load(small_copy / BLOCK)
        held = initializer(full, "attention.dense.bias")
        initializer(model, "attention.dense.bias").CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(held), held.name)
        )

    (complaint,) = lint(change)
    assert complaint.endswith("attention.dense.bias [32] inside the graph file, expected external data.")


def test_a_weight_in_a_constant_node(lint):
    def change(model: onnx.ModelProto) -> None:
        value = onnx.numpy_helper.from_array(np.arange(99, dtype=np.float32), "ignored")
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["hidden_weight"], value=value))

    assert lint(change) == [f"{BLOCK}: keeps hidden_weight [99] inside the graph file, expected external data."]


def test_a_weight_past_the_end_of_its_file(lint, small_copy):
    data = small_copy / f"{BLOCK}.data"
    size = data.stat().st_size
    os.truncate(data, size - 1)
    complaints = lint()
    assert any(f"ends at byte {size} of {size - 1} in {BLOCK}.data." in complaint for complaint in complaints)


def test_an_absent_data_file(lint, small_copy):
    (small_copy / f"{BLOCK}.data").unlink()
    assert any(f"of 0 in {BLOCK}.data." in complaint for complaint in lint())


@pytest.mark.parametrize(
    "location", ["../secret.data", "/etc/hostname", "sub/x.data", "", "lm.onnx.data", ".", "a\x00b"]
)
def test_a_weight_elsewhere(lint, location):
    def change(model: onnx.ModelProto) -> None:
        set_external(initializer(model, "attention.dense.bias"), "location", location)

    assert any(f"attention.dense.bias points to {location!r}" in complaint for complaint in lint(change))


def test_a_data_file_that_is_a_link(lint, small_copy, tmp_path):
    data = small_copy / f"{BLOCK}.data"
    shutil.move(data, tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    assert any(f"points to '{BLOCK}.data'" in complaint for complaint in lint())


@pytest.mark.parametrize("shift", [4, 2048])
def test_an_unaligned_weight(lint, shift):
    def change(model: onnx.ModelProto) -> None:
        tensor = initializer(model, "input_layernorm.weight")
        set_external(tensor, "offset", external(tensor, "offset") + shift)

    assert any("expected a multiple of 4096" in complaint for complaint in lint(change))


def test_weights_that_overlap(lint):
    def change(model: onnx.ModelProto) -> None:
        first, second = initializer(model, "mlp.dense_h_to_4h.weight"), initializer(model, "mlp.dense_4h_to_h.weight")
        set_external(second, "offset", external(first, "offset"))

    assert any("expected a multiple of 4096 after" in complaint for complaint in lint(change))


def test_two_initializers_of_one_name(lint):
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(initializer(model, "attention.dense.bias"))

    assert any("holds 2 initializers named" in complaint for complaint in lint(change))


def test_the_same_constant_twice(lint):
    def change(model: onnx.ModelProto) -> None:
        copy = model.graph.initializer.add()
        copy.CopyFrom(initializer(model, "layer_scale"))
        copy.name = "layer_scale_again"

    unread, complaint = lint(change)
    assert unread == f"{BLOCK}: holds the initializer layer_scale_again, which no node reads."
    assert complaint.startswith(f"{BLOCK}: holds the same constant twice, as ")
    assert complaint.endswith("layer_scale and layer_scale_again.")


def test_another_opset_than_the_manifests(lint):
    assert lint(opset=17) == [f"{BLOCK}: has opset 18, expected 17."]


@pytest.mark.parametrize("opset", [13, 25])
def test_an_opset_out_of_range(lint, opset):
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = opset

    assert f"{BLOCK}: has opset {opset}, expected 14 to 24." in lint(change, opset=opset)


def test_an_ir_version_that_does_not_fit(lint):
    def change(model: onnx.ModelProto) -> None:
        model.ir_version += 1

    assert f"{BLOCK}: has IR version 9, expected 8, which is what opset 18 came with." in lint(change)


def test_another_output_name(lint):
    def change(model: onnx.ModelProto) -> None:
        producer(model, "hidden_states").output[0] = "output"
        model.graph.output[0].name = "output"

    (complaint,) = lint(change)
    assert complaint.startswith(f"{BLOCK}: has the outputs output float32 ['seq', 'batch', 32], presents")
    assert "expected hidden_states float32 ['seq', 'batch', 32], presents" in complaint


def test_another_input_dtype(lint):
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[2].type.tensor_type.elem_type = TensorProto.INT32

    assert any("position_ids int32" in complaint and "expected" in complaint for complaint in lint(change))


def test_an_axis_without_its_name(lint):
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3

    assert any("inputs_embeds float32 [3, 'batch', 32]" in complaint for complaint in lint(change))


def test_the_signature_of_another_graph(lint, config):
    complaints = lint(spec=embedding_spec(config))
    assert sum("has the inputs" in complaint or "has the outputs" in complaint for complaint in complaints) == 2


def drop_a_node(model: onnx.ModelProto) -> None:
    del model.graph.node[3]


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[3].op_type = "Frobnicate"


def attribute_of_a_wrong_type(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Transpose")
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("perm", "text"))


@pytest.mark.parametrize("change", [drop_a_node, unknown_operator, attribute_of_a_wrong_type])
def test_a_graph_that_the_checker_refuses(lint, change):
    assert any("fails onnx.checker" in complaint for complaint in lint(change))


def test_a_file_that_is_no_graph(small_copy, config):
    (small_copy / BLOCK).write_bytes(b"\xff\xff\xff")
    with pytest.raises(BundleError, match=f"{BLOCK} is not a readable ONNX model"):
        lint_graph(small_copy / BLOCK, block_spec(config), 18)


def test_random_damage_never_escapes(small_copy, config):
    """Any changed byte gives complaints, a BundleError, or (in a name or a constant) nothing; never another error."""
    path, generator = small_copy / BLOCK, np.random.default_rng(0)
    good = path.read_bytes()
    found = 0
    for _ in range(150):
        bad = bytearray(good)
        bad[generator.integers(len(bad))] ^= 1 << generator.integers(8)
        path.write_bytes(bad)
        try:
            found += bool(lint_graph(path, block_spec(config), 18))
        except BundleError:
            found += 1
    assert found > 50


def test_operator_inventory(small_bundle):
    model = onnx.load(small_bundle / "lm.onnx", load_external_data=False)
    assert operator_inventory(model) == {"Gather": 1, "Gemm": 1, "LayerNormalization": 1}
    node: Path | onnx.NodeProto = model.graph.node.add()
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    assert operator_inventory(model)["com.microsoft.MatMulNBits"] == 1
