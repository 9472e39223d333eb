"""Quantize: the blocks' matrices and the LM head as small integers with scales, weight-only, without any data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

from glmexport import names
from glmexport.draft import BundleDraft, GraphDraft, Notice, as_matrix, is_matrix
from glmexport.errors import BundleError, ExportError
from glmexport.form import ACTIVATIONS, FLOAT16, MIN_QDQ_OPSET, QuantizationForm
from glmexport.passes.wide_activations import with_wide_activations
from glmexport.quantized import QuantizedMatrix
from glmexport.quantized_rows import CODES, SCALES, ZERO_POINTS, part_name
from glmexport.recipe import Recipe
from glmexport.tensors import Matrix

CONTRIB_DOMAIN = "com.microsoft"
FUSED_CHANNEL_BLOCK = 32
"""The group that onnxruntime gives a DequantizeLinear with one scale per channel when it fuses it with its product."""


@dataclass(frozen=True)
class QuantizePass:
    """recipe: what becomes of each matrix. form: how the graphs multiply with it."""

    recipe: Recipe
    form: QuantizationForm

    def apply(self, draft: BundleDraft, notice: Notice) -> BundleDraft:
        """The quantized draft. Raises BundleError where it is quantized already, RecipeError for a gap in the rules."""
        demand_quantizable(draft)
        for number in self.recipe.unused((matrix.name, block_id) for block_id, matrix in matrices_of(draft)):
            notice(f"Rule {number} of the recipe decides about no matrix.")
        if self.form.format == "qdq" and draft.opset < MIN_QDQ_OPSET:
            from glmexport.lifting import lifted  # here: it traces anew, with torch

            notice(f"The graphs are lifted from opset {draft.opset} to {MIN_QDQ_OPSET}, which qdq needs.")
            draft = lifted(draft, MIN_QDQ_OPSET)
        changed = draft
        for graph in draft.graphs:
            changed = changed.with_graph(self._quantize_graph(graph))
        files = {**draft.files, names.RECIPE: self.recipe.as_toml().encode()}
        form = dataclasses.replace(draft.form, quantization=self.form)
        changed = dataclasses.replace(changed, form=form, files=files)
        return changed.with_step("quantize", **dataclasses.asdict(self.form))

    def _quantize_graph(self, graph: GraphDraft) -> GraphDraft:
        chosen: dict[str, QuantizedMatrix] = {}
        for matrix in _matrices(graph):
            affine = self.recipe.affine(matrix.name, names.block_id_of(graph.name))
            if affine is not None:
                chosen[matrix.name] = QuantizedMatrix(matrix, affine, self.form.format)  # type: ignore[arg-type]  # FORMATS are layouts
        if not chosen:
            return graph
        tensors = [
            part
            for tensor in graph.tensors
            for part in (chosen[tensor.name].tensors if tensor.name in chosen else (tensor,))
        ]

        records = {name: matrix.record for name, matrix in chosen.items()}
        return graph.changed(
            lambda model: quantized_graph(model, chosen, self.form), tensors=tuple(tensors), matrices=records
        )


def demand_quantizable(draft: BundleDraft) -> None:
    """Raise BundleError where the draft's matrices are not those of float32 graphs, stored as float32."""
    if draft.form.quantization is not None:
        raise BundleError(
            f"The bundle is quantized already ({draft.form.quantization.format}); quantize the float32 bundle it "
            f"was made from instead: rounding twice only adds errors."
        )
    if draft.form.weights == FLOAT16:
        raise BundleError(
            "The bundle's weights are stored as float16, which is for bundles that stay as they are; quantize the "
            "float32 bundle, or split with --quantize."
        )
    if draft.form.dtype == FLOAT16:
        raise BundleError(
            "The graphs compute in float16, and quantized products are made for float32 activations: split with "
            "--quantize or with --dtype float16, not both."
        )


def matrices_of(draft: BundleDraft) -> Iterator[tuple[int | None, Matrix]]:
    """(block id, or None for the LM head; matrix) of everything that can be quantized."""
    for graph in draft.graphs:
        for matrix in _matrices(graph):
            yield names.block_id_of(graph.name), matrix


def _matrices(graph: GraphDraft) -> Iterator[Matrix]:
    """The float32 matrices of a block or the head; an embedding is looked up, not multiplied with."""
    if graph.name != names.EMBEDDING:
        for tensor in graph.tensors:
            if is_matrix(tensor):
                yield as_matrix(tensor)


def quantized_graph(
    model: onnx.ModelProto, chosen: Mapping[str, QuantizedMatrix], form: QuantizationForm
) -> onnx.ModelProto:
    """`model` (without external data) multiplying with the quantized matrices, in place; returns it.

    Raises ExportError where a matrix is not read by exactly one product.
    """
    nodes: list[onnx.NodeProto] = []
    replaced: list[str] = []
    for node in model.graph.node:
        name = node.input[1] if _is_product(node) else ""
        if name not in chosen:
            nodes.append(node)
            continue
        matrix = chosen[name]
        make = _nbits_nodes if form.format == "matmulnbits" else _qdq_nodes
        product = make(node, matrix, form)
        if form.activations(matrix.affine.bits) == "int16":
            product = with_wide_activations(model, product, matrix.inputs, _activation_block(matrix), node.name)
        nodes.extend(product)
        replaced.append(name)
    if sorted(replaced) != sorted(chosen):
        wrong = sorted({*chosen} ^ {*replaced} or {*chosen})
        raise ExportError(f"{model.graph.name}: {wrong[0]} is not the weight of exactly one product of the graph.")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if form.format == "matmulnbits":
        model.opset_import.append(onnx.helper.make_opsetid(CONTRIB_DOMAIN, 1))
    return model


def _activation_block(matrix: QuantizedMatrix) -> int:
    """How many inputs share a scale when onnxruntime rounds them: those of a group, as far as it knows of it."""
    if matrix.layout == "qdq" and matrix.affine.per_channel:
        return FUSED_CHANNEL_BLOCK
    return matrix.affine.block_size(matrix.inputs)


def _is_product(node: onnx.NodeProto) -> bool:
    """X @ W, or x @ W.T without anything added."""
    if node.op_type == "MatMul" and not node.domain:
        return True
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}  # written out or left to their defaults
    return node.op_type == "Gemm" and len(node.input) == 2 and {**plain, **attributes} == {**plain, "transB": 1}


def _nbits_nodes(node: onnx.NodeProto, matrix: QuantizedMatrix, form: QuantizationForm) -> list[onnx.NodeProto]:
    return [
        onnx.helper.make_node(
            "MatMulNBits",
            [node.input[0], *_part_names(matrix)],
            list(node.output),
            name=node.name.replace(node.op_type, "MatMulNBits"),
            domain=CONTRIB_DOMAIN,
            K=matrix.inputs,
            N=matrix.outputs,
            bits=matrix.affine.bits,
            block_size=matrix.affine.block_size(matrix.inputs),
            accuracy_level=ACTIVATIONS[form.activations(matrix.affine.bits)],
        )
    ]


def _qdq_nodes(node: onnx.NodeProto, matrix: QuantizedMatrix, form: QuantizationForm) -> list[onnx.NodeProto]:
    weight = f"{matrix.name}.dequantized"
    dequantize = onnx.helper.make_node(
        "DequantizeLinear",
        _part_names(matrix),
        [weight],
        name=node.name.replace(node.op_type, "DequantizeLinear"),
        **matrix.affine.qdq_attributes(matrix.inputs),  # type: ignore[arg-type]  # attributes, of any type
    )
    product = onnx.helper.make_node(
        "MatMul", [node.input[0], weight], list(node.output), name=node.name.replace(node.op_type, "MatMul")
    )
    return [dequantize, product]


def _part_names(matrix: QuantizedMatrix) -> list[str]:
    parts = [CODES, SCALES] if matrix.affine.symmetric else [CODES, SCALES, ZERO_POINTS]
    return [part_name(matrix.name, part) for part in parts]
