"""The embedding of a bundle as a raw file, where it is a graph or the LM head's rows: the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from glmexport.bundle import Bundle
from glmexport.draft import BundleDraft
from glmexport.embedding_rows import head_rows
from glmexport.form import GRAPH, RAW, EmbeddingForm
from glmexport.onnx_files import Array
from glmexport.quantized_rows import QuantizedRows
from glmexport.tensors import Tensor, rows_per_slice


@dataclass(frozen=True)
class HeadTable:
    """The rows of a quantized LM head as float32 [vocab, hidden]."""

    name: str
    rows: QuantizedRows
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """[vocab, hidden]."""
        return (self.rows.outputs, self.rows.inputs)

    def slices(self) -> Iterator[Array]:
        """Rows in their order."""
        step = rows_per_slice(self.rows.inputs)
        for start in range(0, self.rows.outputs, step):
            yield self.rows.rows(np.arange(start, min(start + step, self.rows.outputs)))


def raw_embedding(bundle: Bundle, draft: BundleDraft) -> tuple[Tensor, EmbeddingForm]:
    """The table as a tensor whose slices are the file, and the form that it has then. draft: of the bundle.

    Raises BundleError where the head, whose rows it is, cannot be read.
    """
    if bundle.form.embedding.kind == GRAPH:
        (table,) = (tensor for tensor in draft.graphs[0].tensors if len(tensor.shape) == 2)
        return table, EmbeddingForm(RAW, table.dtype)
    return HeadTable("embedding", head_rows(bundle)), EmbeddingForm(RAW, "float32")
