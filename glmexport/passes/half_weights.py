"""Half weights: float32 matrices stored as float16 with a Cast behind them, where that loses nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from glmexport.compiled import Kernel
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
            half = np.empty(band.shape, np.float16)
            lost = _HALVE(band.reshape(-1).view(np.uint32), half.reshape(-1).view(np.uint16))
            if lost >= 0:
                raise RecipeError(
                    f"{self.name} holds {float(band.flat[lost])!r}, which float16 cannot: weights are stored so only "
                    "where that loses nothing, as of a float16 checkpoint; leave --weights out or quantize."
                )
            yield half


def _halve(numbers: npt.NDArray[np.uint32], halves: npt.NDArray[np.uint16]) -> int:
    """Write float32 numbers as float16, both by their bits (IEEE 754); the place of one that float16 lacks, or -1.

    numpy's cast takes the numbers one by one, which is slower than the disk.
    """
    lost = -1
    for place in range(len(numbers)):
        bits = int(np.int64(numbers[place]))
        magnitude = bits & 0x7FFFFFFF
        if magnitude >= 0x38800000:  # 2**-14, the smallest normal float16: exponents differ by 112
            half = (magnitude >> 13) - (112 << 10)
            if magnitude >= 0x7F800000:  # infinity, or NaN with what fits of its payload
                half = 0x7C00 | (half & 0x3FF)
                if magnitude > 0x7F800000 and half == 0x7C00:
                    half += 1
            elif magnitude & 0x1FFF or magnitude >= 0x47800000:  # 2**16
                lost = place
        else:  # a multiple of 2**-24
            significand = (magnitude & 0x7FFFFF) | (0x800000 if magnitude >= 0x800000 else 0)
            shift = min(126 - (magnitude >> 23), 62)
            half = significand >> shift
            if half << shift != significand:
                lost = place
        halves[place] = np.uint16((bits >> 16) & 0x8000 | half)
    return lost


_HALVE = Kernel(_halve, 'int64(Array(uint32, 1, "C", readonly=True), uint16[::1])')


def _halved(graph: GraphDraft) -> GraphDraft:
    chosen = [tensor.name for tensor in graph.tensors if is_matrix(tensor)]
    if not chosen:
        return graph
    tensors = tuple(HalfMatrix(tensor) if tensor.name in chosen else tensor for tensor in graph.tensors)
    return graph.changed(lambda model: casting(model, chosen), tensors=tensors)


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
