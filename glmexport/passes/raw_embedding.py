"""Embed: the embedding as one raw file of rows, or as the rows of the quantized LM head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from glmexport import names
from glmexport.draft import BundleDraft, Notice, as_matrix
from glmexport.errors import BundleError, RecipeError
from glmexport.form import GRAPH, RAW_DTYPES, SHARED, TRUNCATE, EmbeddingForm
from glmexport.onnx_files import Array
from glmexport.raw_rows import decode_rows, encode_rows
from glmexport.tensors import Matrix


class RoundedRows:
    """A [vocab, hidden] matrix as a raw file has it; `relative_error` is known once it is written."""

    transposed = False

    def __init__(self, name: str, matrix: Matrix, form: EmbeddingForm) -> None:
        self.name, self.shape = name, matrix.shape
        self.dtype = RAW_DTYPES[form.dtype].numpy
        self._matrix, self._form = matrix, form
        self._squared_error = self._squared_sum = 0.0

    def slices(self) -> Iterator[Array]:
        """Encoded rows. Raises RecipeError where a value is too large for the dtype."""
        for rows in self._matrix.bands():
            encoded = encode_rows(rows, self._form.dtype, self._form.rounding)
            decoded = decode_rows(encoded, self._form.dtype)
            finite = np.isfinite(rows)
            if not np.array_equal(np.isfinite(decoded), finite):
                raise RecipeError(
                    f"{self._matrix.name} holds values up to {np.abs(rows).max():.3g}, which {self._form.dtype} cannot "
                    f"hold; choose another dtype."
                )
            if finite.all():
                self._squared_error += float(np.square(rows - decoded, dtype=np.float64).sum())
                self._squared_sum += float(np.square(rows, dtype=np.float64).sum())
            else:
                difference = rows[finite] - decoded[finite]
                self._squared_error += float(np.square(difference, dtype=np.float64).sum())
                self._squared_sum += float(np.square(rows[finite], dtype=np.float64).sum())
            yield encoded

    @property
    def relative_error(self) -> float:
        """‖x - rounded‖ / ‖x‖ over all finite values of the table."""
        return math.sqrt(self._squared_error / self._squared_sum) if self._squared_sum else 0.0


@dataclass(frozen=True)
class EmbedPass:
    """form: where embedding rows shall come from."""

    form: EmbeddingForm

    def __post_init__(self) -> None:
        if self.form.rounding == TRUNCATE and self.form.dtype != "bfloat16":
            raise RecipeError(
                f"Rounding {TRUNCATE} is the upper half of a float32, which is bfloat16; for {self.form.dtype} leave "
                f"it out."
            )

    def apply(self, draft: BundleDraft, notice: Notice) -> BundleDraft:
        """The draft without embedding.onnx. Raises BundleError where there is none, or the head cannot stand in."""
        form = draft.form.embedding
        if form.kind != GRAPH:
            what = draft.form.embedding_file or "the LM head's rows"
            raise BundleError(
                f"The bundle has no {names.EMBEDDING} graph any more, its embedding is {what}; start from one that has."
            )
        return _shared(draft) if self.form.kind == SHARED else _raw(draft, self.form)


def _raw(draft: BundleDraft, form: EmbeddingForm) -> BundleDraft:
    matrix = as_matrix(draft.graphs[0].tensors[0])
    changed = _without_graph(draft, form)
    name = changed.form.embedding_file or ""
    changed = dataclasses.replace(changed, files={**changed.files, name: RoundedRows(name, matrix, form)})
    return changed.with_step("embed", dtype=RAW_DTYPES[form.dtype].word, rounding=form.rounding)


def _shared(draft: BundleDraft) -> BundleDraft:
    head = draft.graph(names.HEAD)
    if not draft.facts["tied"]:
        raise BundleError(
            "The embedding cannot be the LM head's rows: the checkpoint is not tied, its head differs from its "
            "embedding; store a raw embedding instead (bf16)."
        )
    if head is None or not head.matrices:
        raise BundleError(
            "The embedding cannot be the LM head's rows while the head is float32, which would save nothing that a raw "
            "file does not; quantize the head first (--lm-bits 8)."
        )
    return _without_graph(draft, EmbeddingForm(SHARED)).with_step("embed", dtype=SHARED)


def _without_graph(draft: BundleDraft, form: EmbeddingForm) -> BundleDraft:
    return dataclasses.replace(draft, form=dataclasses.replace(draft.form, embedding=form), graphs=draft.graphs[1:])
