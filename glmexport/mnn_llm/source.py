"""What a package is made from: the tensors of a draft, of a checkpoint's or a bundle's, by the checkpoint's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport import names
from glmexport.affine import Affine, Floats, Quantized, dequantize
from glmexport.bundle_tokenizer import make_tokenizer
from glmexport.config import ModelConfig
from glmexport.draft import BundleDraft
from glmexport.errors import BundleError
from glmexport.form import GRAPH, RAW, Form
from glmexport.patch import patch_named
from glmexport.quantized_rows import CODES, SCALES, ZERO_POINTS, part_name
from glmexport.raw_rows import decode_rows
from glmexport.recipe import affine_of_record
from glmexport.tensors import FileTensor, Matrix, Tensor
from glmexport.tokenizer import Tokenizer

_BAND_ROWS = 1024


@dataclass(frozen=True)
class PackageSource:
    """tensors: by name, float32 or float16. integers: name -> how a matrix is quantized already.

    embedding_name, head_name: of the two [vocab, hidden].
    embedding_dtype: `bfloat16` or `float16`, whichever holds the rows of the embedding as they are, if one does.
    tokenizer_model: a SentencePiece model, None without. table: a raw embedding [vocab, hidden], None where the rows
    are those of a graph.
    """

    config: ModelConfig
    form: Form
    tensors: Mapping[str, Tensor]
    integers: Mapping[str, Affine]
    embedding_name: str
    head_name: str
    embedding_dtype: str
    tokenizer_model: bytes | None
    table: Tensor | None

    def tokenizer(self) -> Tokenizer:
        """Text to the ids of the package. Raises BundleError without one, CheckpointError for a damaged one."""
        if self.tokenizer_model is None:
            raise BundleError(
                f"There is no {names.TOKENIZER_MODEL}, without which MNN's engine cannot load a package; "
                "put it beside the weights."
            )
        return make_tokenizer(self.tokenizer_model, self.config, self.form)

    def vector(self, name: str) -> Floats:
        """A whole small tensor in float32. Raises BundleError where there is none, and what reading raises."""
        return np.concatenate(list(self._tensor(name).slices())).astype(np.float32)

    def bands(self, name: str) -> Iterator[Floats]:
        """Float32 bands of rows of a matrix [out, in] that is not quantized. Raises BundleError where there is none."""
        matrix: Matrix = self._tensor(name)  # type: ignore[assignment]  # tensors of two axes are matrices
        for band in matrix.bands():
            yield band.astype(np.float32, copy=False)

    def quantized_bands(self, name: str) -> Iterator[Quantized]:
        """Bands of rows of a matrix that is quantized already."""
        affine = self.integers[name]
        codes, scales = (_rows(self._tensor(part_name(name, part))) for part in (CODES, SCALES))
        points = None if affine.symmetric else _rows(self._tensor(part_name(name, ZERO_POINTS)))
        for start in range(0, len(codes), _BAND_ROWS):
            part = slice(start, start + _BAND_ROWS)
            scale = np.ascontiguousarray(scales[part])
            zeros = None if points is None else np.ascontiguousarray(points[part])
            yield Quantized(np.ascontiguousarray(codes[part]), scale, zeros, np.zeros((len(scale), 4)))

    def embedding_bands(self) -> Iterator[Floats]:
        """Float32 rows of the embedding, in bands."""
        if self.table is not None:
            for band in self.table.slices():
                yield decode_rows(band, self.form.embedding.dtype)
            return
        name = self.embedding_name if self.form.embedding.kind == GRAPH else self.head_name
        if name not in self.integers:
            yield from self.bands(name)
            return
        bits, width = self.integers[name].bits, self.config.hidden_size
        for part in self.quantized_bands(name):
            yield dequantize(part.codes, part.scales, part.zero_points, bits, width)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise BundleError(f"There is no tensor {name}, which MNN's engine needs; split the checkpoint again.")
        return self.tensors[name]


def source_of_draft(draft: BundleDraft) -> PackageSource:
    """The tensors of a draft. Raises BundleError for a bundle whose integers the engine cannot have as they are."""
    quantization = draft.form.quantization
    if quantization is not None and quantization.format != "matmulnbits":
        raise BundleError(
            f"The bundle is quantized in the form {quantization.format}, whose integers are turned; give the "
            "checkpoint, or quantize with --format matmulnbits."
        )
    tensors = {tensor.name: tensor for graph in draft.graphs for tensor in graph.tensors}
    integers = {name: affine_of_record(record()) for graph in draft.graphs for name, record in graph.matrices.items()}
    model = draft.read_file(names.TOKENIZER_MODEL) if names.TOKENIZER_MODEL in draft.files else None
    table = draft.table() if draft.form.embedding.kind == RAW else None
    patch = patch_named(draft.facts["architecture"])
    return PackageSource(
        draft.config,
        draft.form,
        tensors,
        integers,
        patch.embedding_name,
        patch.head_name,
        _embedding_dtype(draft),
        model,
        table,
    )


def _embedding_dtype(draft: BundleDraft) -> str:
    embedding = draft.form.embedding
    if embedding.kind == RAW:
        return "bfloat16" if embedding.dtype == "bfloat16" else "float16"
    return "bfloat16" if draft.facts["checkpoint"]["dtypes"] == ["bfloat16"] else "float16"


def _rows(tensor: Tensor) -> npt.NDArray[Any]:
    """A stored tensor as it lies in its file, mapped."""
    if not isinstance(tensor, FileTensor):
        raise BundleError(f"{tensor.name} is no file of a bundle yet; write the bundle first.")
    place = tensor.place
    return np.memmap(
        tensor.directory / place.location, mode="r", dtype=place.dtype, offset=place.offset, shape=place.shape
    )
