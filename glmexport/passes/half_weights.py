"""Half weights: float32 matrices stored as float16 with a Cast behind them, where that loses nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx

from glmexport.draft import BundleDraft, GraphDraft, Notice, is_matrix
from glmexport.errors import BundleError, RecipeError
from glmexport.form import FLOAT16
from glmexport.onnx_files import Array
from glmexport.tensors import Tensor


@dataclass(frozen=True)
class HalfWeightsPass:
    """The graphs compute in float32 as before: a runtime casts the matrices when it loads them, or when it reads them.

    What is no float32 matrix (biases, norms, integers of a quantized matrix) stays as it is.
    """

    def apply(self, draft: BundleDraft, notice: Notice) -> BundleDraft:
        """The draft with matrices at half their size. Raises BundleError where they have it already."""
        if draft.form.weights == FLOAT16:
            raise BundleError("The bundle's weights are float16 already; nothing is left to halve.")
        if draft.form.dtype == FLOAT16:
            raise BundleError("The graphs are float16 as a whole, their weights too; leave --weights float16 out.")
        changed = dataclasses.replace(draft, form=dataclasses.replace(draft.form, weights=FLOAT16))
        for graph in draft.graphs:
            changed = changed.with_graph(_halved(graph))
        return changed.with_step("weights", dtype=FLOAT16)


@dataclass(frozen=True)
class HalfMatrix:
    """A float32 matrix as float16 of the same shape, bit for bit the same numbers."""

    matrix: Tensor

    @property
    def name(self) -> str:
        """As before: the graph casts what has it."""
        return self.matrix.name

    @property
    def dtype(self) -> str:
        """`float16`."""
        return FLOAT16

    @property
    def shape(self) -> tuple[int, ...]:
        """As before."""
        return self.matrix.shape

    @property
    def transposed(self) -> bool:
        """As before."""
        return bool(getattr(self.matrix, "transposed", False))

    def slices(self) -> Iterator[Array]:
        """Float16 bands. Raises RecipeError where a weight is none in float16."""
        for band in self.matrix.slices():
            with np.errstate(over="ignore"):  # an infinity that was a number is found below
                half = band.astype(np.float16)
            exact = half.astype(np.float32) == band
            if not exact.all() and not (exact | np.isnan(band)).all():
                lost = band[~(exact | np.isnan(band))].flat[0]
                raise RecipeError(
                    f"{self.name} holds {float(lost)!r}, which float16 cannot: weights are stored so only where that "
                    "loses nothing, as of a float16 checkpoint; leave --weights out or quantize."
                )
            yield half


def _halved(graph: GraphDraft) -> GraphDraft:
    chosen = [tensor.name for tensor in graph.tensors if is_matrix(tensor)]
    if not chosen:
        return graph
    tensors = tuple(HalfMatrix(tensor) if tensor.name in chosen else tensor for tensor in graph.tensors)
    return graph.changed(
        tensors=tensors, make_model=lambda: casting(graph.make_model(), chosen), matrices=graph.matrices
    )


def casting(model: onnx.ModelProto, chosen: list[str]) -> onnx.ModelProto:
    """`model` (without external data) casting these float16 initializers to float32, in place; returns it.

    A table is cast after rows are looked up in it, so that never more than these are cast.
    """
    nodes: list[onnx.NodeProto] = []
    cast: set[str] = set()
    for node in model.graph.node:
        halves = [name for name in node.input if name in chosen]
        if node.op_type == "Gather" and halves == [node.input[0]]:
            rows = f"{node.output[0]}.{FLOAT16}"
            nodes += [node, _cast(rows, node.output[0])]
            node.output[0] = rows
            continue
        for name in halves:
            if name not in cast:
                cast.add(name)
                nodes.append(_cast(name, f"{name}.float32"))
        for place, name in enumerate(node.input):
            if name in halves:
                node.input[place] = f"{name}.float32"
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model


def _cast(source: str, target: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], name=f"Cast {source}", to=onnx.TensorProto.FLOAT)
