"""What a bundle stores against the checkpoint's tensors: bit for bit, rounded bit for bit, or group by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.checkpoint import Checkpoint
from glmexport.errors import BundleError
from glmexport.form import GRAPH, RAW, RAW_DTYPES, TRUNCATE, EmbeddingForm
from glmexport.onnx_files import COMPARE_BYTES, ExternalTensor, holds, read_band, rows_of
from glmexport.quantized_rows import QuantizedRows
from glmexport.raw_rows import decode_rows
from glmexport.stored import stored_tensors_of
from glmexport.verify.matrices import check_matrix, record_complaints
from glmexport.verify.reference import StreamedReference
from glmexport.verify.report import Row

Array = npt.NDArray[Any]
Rows = Callable[[int, int], torch.Tensor]


class StoredWeights:
    """The weights of one bundle; each method yields rows for the report. Raises BundleError for unreadable files."""

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, reference: StreamedReference) -> None:
        self._bundle, self._checkpoint, self._reference = bundle, checkpoint, reference
        self._dtype = getattr(torch, bundle.form.dtype)

    def embedding(self) -> Iterator[Row]:
        """The embedding, whatever it is; shared rows are the LM head's, which is compared where it is met."""
        name, form = self._checkpoint.embedding_name, self._bundle.form.embedding
        if form.kind == GRAPH:
            yield _exact(names.EMBEDDING, self._wrong_table(names.EMBEDDING, name), 1)
        elif form.kind == RAW:
            yield _exact(names.EMBEDDING, self._wrong_raw_rows(form, name), 1)

    def block(self, graph: str, weights: Mapping[str, torch.Tensor]) -> Iterator[Row]:
        """The weights of a block, which are all in memory."""
        wrong, exact, rows = self._compare(graph, weights)
        yield from rows
        yield _exact(graph, wrong, exact)

    def as_stored(self, graph: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a block as the bundle has them: the quantized ones, or all of them in its dtype."""
        matrices = self._bundle.graph(graph)["matrices"]
        return {
            name: torch.from_numpy(self._quantized(graph, name, value.shape).rows(np.arange(value.shape[0])))
            if name in matrices
            else value.to(self._dtype)
            for name, value in weights.items()
        }

    def head(self, norm_weights: Mapping[str, torch.Tensor]) -> Iterator[Row]:
        """The final norm, which is in memory, and the LM head [vocab, hidden], streamed."""
        name = self._checkpoint.head_name
        wrong, exact, _ = self._compare(names.HEAD, norm_weights)
        if name in self._bundle.graph(names.HEAD)["matrices"]:
            yield self._matrix(names.HEAD, name, self._table_shape(), partial(self._table_rows, name))
        else:
            wrong, exact = [*wrong, *self._wrong_table(names.HEAD, name)], exact + 1
        yield _exact(names.HEAD, wrong, exact)

    def _compare(self, graph: str, weights: Mapping[str, torch.Tensor]) -> tuple[list[str], int, list[Row]]:
        """(wrong ones of those stored as they are, how many these are, rows about the quantized ones)."""
        entry = self._bundle.graph(graph)
        transposed, stored = set(entry["transposed"]), stored_tensors_of(self._bundle, graph)
        wrong, exact, rows = [], 0, []
        for name, value in weights.items():
            if name in entry["matrices"]:
                rows.append(self._matrix(graph, name, value.shape, _rows_of_tensor(value)))
                continue
            exact += 1
            expected = self._as_in_graphs(value.t() if name in transposed else value).numpy()
            if name not in stored or not self._holds(stored[name], expected.shape, rows_of(expected)):
                wrong.append(name)
        return wrong, exact, rows

    def _quantized(self, graph: str, name: str, shape: tuple[int, ...]) -> QuantizedRows:
        quantization = self._bundle.form.quantization
        if quantization is None:
            raise BundleError(f"{graph} has quantized matrices and the manifest does not say how they are stored.")
        places, record = stored_tensors_of(self._bundle, graph), self._bundle.graph(graph)["matrices"][name]
        size = (shape[0], shape[1])
        return QuantizedRows(self._bundle.directory, places, name, record, size, quantization.format)

    def _matrix(self, graph: str, name: str, shape: tuple[int, ...], rows: Rows) -> Row:
        record = self._bundle.graph(graph)["matrices"][name]
        finding = check_matrix(self._quantized(graph, name, shape), rows)
        complaints = record_complaints(record, finding)
        if finding.bad_groups:
            complaints.insert(0, f"{finding.bad_groups} of {finding.groups} groups are worse than plain rounding")
        found = "; ".join(complaints) or f"int{record['bits']}, cosine {finding.cosine:.6f}"
        detail = f"{name}: {found}"
        return Row(graph, "quantized", not complaints, relative_error=finding.relative_error, detail=detail)

    def _wrong_table(self, graph: str, name: str) -> list[str]:
        """`name` if that [vocab, hidden] matrix is not the checkpoint's, bit for bit; holds neither of them whole."""
        stored, rows = stored_tensors_of(self._bundle, graph), partial(self._table_rows, name)
        shape = self._table_shape()
        same = name in stored and self._holds(stored[name], shape, lambda start, stop: rows(start, stop).numpy())
        return [] if same else [name]

    def _holds(self, place: ExternalTensor, shape: tuple[int, ...], rows: Callable[[int, int], Array]) -> bool:
        return holds(self._bundle.directory, place, shape, rows, self._bundle.beyond_cache)

    def _wrong_raw_rows(self, form: EmbeddingForm, name: str) -> list[str]:
        """The raw file's name if it is not the checkpoint's embedding, rounded by torch, byte for byte."""
        file, (vocab, hidden) = self._bundle.form.embedding_file or "", self._table_shape()
        width = hidden * RAW_DTYPES[form.dtype].bytes
        place = ExternalTensor(file, "uint8", (vocab, width), file, 0, vocab * width)
        band, direct = max(COMPARE_BYTES // width, 1), self._bundle.beyond_cache
        for start in range(0, vocab, band):
            stop = min(start + band, vocab)
            expected = _as_stored(self._table_rows(name, start, stop), form)
            if not _same_rows(read_band(self._bundle.directory, place, start, stop, direct), expected, form):
                return [file]
        return []

    def _as_in_graphs(self, values: torch.Tensor) -> torch.Tensor:
        """Float32 values as the graphs compute with them: rounded where those are float16, in float32 again."""
        return values.to(self._dtype).float()

    def _table_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._as_in_graphs(self._reference.table_rows(name, start, stop))

    def _table_shape(self) -> tuple[int, int]:
        return (self._bundle.config.vocab_size, self._bundle.config.hidden_size)


def _exact(graph: str, wrong: list[str], count: int) -> Row:
    detail = f"differ from the checkpoint: {', '.join(wrong)}" if wrong else f"{count} tensors equal bit for bit"
    return Row(graph, "weights", not wrong, detail=detail)


def _rows_of_tensor(value: torch.Tensor) -> Rows:
    return lambda start, stop: value[start:stop]


def _same_rows(found: Array, expected: Array, form: EmbeddingForm) -> bool:
    """Whether bytes uint8 [rows, width] are equal, but for how a NaN is written."""
    if np.array_equal(found, expected):
        return True
    ours, theirs = (np.ascontiguousarray(rows).view(RAW_DTYPES[form.dtype].numpy) for rows in (found, expected))
    nan = np.isnan(decode_rows(ours, form.dtype)) & np.isnan(decode_rows(theirs, form.dtype))
    return bool((nan | (ours.view(f"u{ours.itemsize}") == theirs.view(f"u{theirs.itemsize}"))).all())


def _as_stored(rows: torch.Tensor, form: EmbeddingForm) -> Array:
    """Float32 rows as bytes uint8 [rows, width] of a raw file, by torch's own rounding."""
    if form.dtype == "bfloat16" and form.rounding == TRUNCATE:
        halves = rows.contiguous().view(torch.int16).reshape(len(rows), -1, 2)  # little-endian: the upper half is last
        return np.ascontiguousarray(halves[..., 1].numpy()).view(np.uint8)
    return rows.to(getattr(torch, form.dtype)).contiguous().view(torch.uint8).numpy()
