"""What a bundle for MNN stores against the checkpoint: its manifest, its small files, every vector and every matrix.

Floats must be the checkpoint's (float16: rounded once). Integers that a quantized bundle had are held, group by group,
to plain rounding, as they are there. Integers that were rounded on the way must be the nearest step of their block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from glmexport import names
from glmexport.affine import Affine, Floats
from glmexport.bundle import Bundle
from glmexport.checkpoint import Checkpoint
from glmexport.draft import BundleDraft
from glmexport.errors import BundleError, ExportError, GlmExportError
from glmexport.form import SHARED
from glmexport.mnn.matrix import FLOAT16, FLOAT32, FileBytes, MnnMatrix, StoredMatrix
from glmexport.mnn.rounding import is_nearest
from glmexport.mnn.vectors import complaint_of_vectors
from glmexport.recipe import affine_of_record
from glmexport.tensors import rows_per_slice
from glmexport.verify.matrices import check_matrix
from glmexport.verify.reference import StreamedReference
from glmexport.verify.report import Row
from glmexport.verify.stored_weights import StoredWeights
from glmexport.verify.structure import tokenizer_row

Array = npt.NDArray[Any]
Rows = Callable[[int, int], torch.Tensor]

FACTS = ("architecture", "model", "vocabulary", "embedding", "weights", "tied", "tokenizer")
"""Keys of the manifest that follow from the checkpoint and the form."""


def check_mnn_structure(bundle: Bundle, expected: BundleDraft, advance: Callable[[str], None]) -> Iterator[Row]:
    """Rows for the manifest and the tokenizer. expected: what the bundle would be for onnxruntime, in the same form."""
    graphs = {entry[key] for entry in bundle.graphs for key in ("file", "data")}
    files = {*expected.files, *graphs, *({names.RECIPE} & {*bundle.files})}
    complaints = [f"{name} belongs to no graph and not to the tokenizer." for name in sorted({*bundle.files} - files)]
    complaints += [f"{name} is missing." for name in sorted(files - {*bundle.files})]
    document = expected.manifest([])
    complaints += [
        f"{key} is {bundle.manifest.get(key)!r:.120}, where the checkpoint gives {document[key]!r:.120}."
        for key in FACTS
        if bundle.manifest.get(key) != document[key]
    ]
    yield Row("all", "manifest", not complaints, detail=" ".join(complaints) or "says what the checkpoint gives")
    yield tokenizer_row(bundle, expected)
    for entry in bundle.graphs:
        yield _vectors_row(bundle, expected, entry)


def _vectors_row(bundle: Bundle, expected: BundleDraft, entry: Mapping[str, Any]) -> Row:
    """Norms and tables of a graph, which are the checkpoint's and the patch's bit for bit."""
    graph = entry["name"]
    draft = expected.graph(graph)
    biases = {f"{name.removesuffix('.weight')}.bias" for name in entry["matrices"]}
    tensors = () if draft is None else draft.tensors
    small = {tensor.name: tensor for tensor in tensors if len(tensor.shape) != 2 and tensor.name not in biases}
    known = {name: np.concatenate([*tensor.slices()]).astype(np.float32) for name, tensor in small.items()}
    needed = {name: value for name, value in known.items() if value.ndim == 1 and value.size > 1}
    try:
        model, beside = bundle.read_small(entry["file"]), bundle.whole_path(entry["data"])
        complaint = complaint_of_vectors(model, beside, needed, known)
    except (GlmExportError, OSError) as error:
        complaint = f"{entry['file']}: {error}"
    return Row(graph, "constants", not complaint, detail=complaint or f"{len(needed)} vectors equal bit for bit")


@dataclass(frozen=True)
class _Quantized:
    """A stored matrix as `check_matrix` reads one."""

    stored: StoredMatrix
    affine: Affine
    outputs: int
    inputs: int

    def rows(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Float32 rows of consecutive outputs."""
        return self.stored.rows(int(ids[0]), len(ids))


class MnnStoredWeights:
    """The weights of one bundle; each method yields rows for the report. Raises BundleError for unreadable files."""

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, reference: StreamedReference) -> None:
        self._bundle, self._checkpoint, self._reference = bundle, checkpoint, reference

    def embedding(self) -> Iterator[Row]:
        """The raw file, unless its rows were those of a quantized head, which numbers alone are held to."""
        if self._bundle.manifest["mnn"]["source"].get("embedding") != SHARED:
            yield from StoredWeights(self._bundle, self._checkpoint, self._reference).embedding()

    def block(self, graph: str, weights: Mapping[str, torch.Tensor]) -> Iterator[Row]:
        """The matrices of a block, and the biases beside them."""
        for name in self._bundle.graph(graph)["matrices"]:
            if name not in weights:
                yield Row(graph, "weights", False, detail=f"{name} is no matrix of this block")
                continue
            value, bias = weights[name], weights.get(f"{name.removesuffix('.weight')}.bias")
            yield self._row(graph, name, (value.shape[0], value.shape[1]), partial(_slice, value), bias)

    def as_stored(self, graph: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a block, with its matrices as the bundle has them."""
        found = dict(weights)
        for name in self._bundle.graph(graph)["matrices"]:
            outputs, inputs = weights[name].shape
            found[name] = torch.from_numpy(self._stored(graph, name, (outputs, inputs)).rows(0, outputs))
        return found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final-normed states [rows, hidden] -> logits [rows, vocab] of the head as it is stored, read in bands."""
        vocab, width = self._bundle.config.vocab_size, self._bundle.config.hidden_size
        stored = self._stored(names.HEAD, self._checkpoint.head_name, (vocab, width))
        step = 2 * rows_per_slice(width)
        bands = (stored.rows(start, min(step, vocab - start)) for start in range(0, vocab, step))
        return torch.cat([torch.nn.functional.linear(hidden, torch.from_numpy(band)) for band in bands], -1)

    def head(self, norm_weights: Mapping[str, torch.Tensor]) -> Iterator[Row]:
        """The LM head [vocab, hidden], streamed."""
        name = self._checkpoint.head_name
        shape = (self._bundle.config.vocab_size, self._bundle.config.hidden_size)
        yield self._row(names.HEAD, name, shape, partial(self._reference.table_rows, name), None)

    def _stored(self, graph: str, name: str, shape: tuple[int, int]) -> StoredMatrix:
        entry = self._bundle.graph(graph)
        record = entry["matrices"].get(name)
        if record is None:
            raise BundleError(f"The manifest does not say where {name} lies; convert the bundle again.")
        path = self._bundle.whole_path(entry["data"])
        try:
            form = MnnMatrix(*shape, record["bits"], record["block"], record["symmetric"])
            return StoredMatrix(FileBytes(path, record["offset"]), form)
        except (ExportError, OSError) as error:
            raise BundleError(f"{entry['data']}: {name}: {error}") from error

    def _row(self, graph: str, name: str, shape: tuple[int, int], rows: Rows, bias: torch.Tensor | None) -> Row:
        record, stored = self._bundle.graph(graph)["matrices"].get(name, {}), self._stored(graph, name, shape)
        expected_bias = np.zeros(shape[0], np.float32) if bias is None else bias.numpy()
        if not np.array_equal(stored.bias, expected_bias):
            return Row(graph, "weights", False, detail=f"{name}: the bias beside it is not the checkpoint's")
        if record["bits"] < FLOAT16 and not record["rounded"]:
            affine = affine_of_record(record["source"])
            finding = check_matrix(_Quantized(stored, affine, *shape), rows)
            wrong = f"{finding.bad_groups} of {finding.groups} groups are worse than plain rounding"
            detail = wrong if finding.bad_groups else f"int{record['bits']}, cosine {finding.cosine:.6f}"
            error, passed = finding.relative_error, not finding.bad_groups
        else:
            passed, error = _nearest(stored, rows)
            kind = f"{'int' if record['bits'] < FLOAT16 else 'float'}{record['bits']}"
            exact = "equal bit for bit" if record["bits"] == FLOAT32 else f"{kind}, each the nearest that there is"
            detail = exact if passed else f"{kind}, and not the nearest to the checkpoint's weights"
        return Row(graph, "weights", passed, relative_error=error, detail=f"{name}: {detail}")


def _nearest(stored: StoredMatrix, rows: Rows) -> tuple[bool, float]:
    """Whether every weight is the nearest of its form, and ‖error‖ / ‖weights‖."""
    matrix, passed, squared_error, squared_weights = stored.matrix, True, 0.0, 0.0
    step = rows_per_slice(matrix.inputs)
    for start in range(0, matrix.outputs, step):
        count = min(step, matrix.outputs - start)
        expected, found = rows(start, start + count).contiguous().numpy(), stored.rows(start, count)
        passed &= is_nearest(found, expected, matrix, rounded=True)
        squared_error += float(np.square(found - expected, dtype=np.float64).sum())
        squared_weights += float(np.square(expected, dtype=np.float64).sum())
    return passed, (squared_error / squared_weights) ** 0.5 if squared_weights else 0.0


def _slice(value: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return value[start:stop]
