"""Embedding rows of a bundle whose embedding is no graph: from the raw file, or from the quantized LM head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.errors import BundleError
from glmexport.form import RAW, RAW_DTYPES
from glmexport.quantized_rows import QuantizedRows
from glmexport.raw_rows import decode_rows
from glmexport.stored import stored_tensors_of

Rows = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]


def embedding_rows(bundle: Bundle) -> Rows:
    """A function from ids int64 [n], all of them rows, to float32 [n, hidden]; files are mapped, not read.

    Raises BundleError where the file cannot be mapped or the head is not what the manifest says.
    """
    if bundle.form.embedding.kind == RAW:
        return _raw_rows(bundle)
    return head_rows(bundle).rows


def head_rows(bundle: Bundle) -> QuantizedRows:
    """The quantized LM head [vocab, hidden]. Raises BundleError where it is not quantized."""
    matrices = bundle.graph(names.HEAD)["matrices"]
    if len(matrices) != 1 or bundle.form.quantization is None:
        raise BundleError(f"{names.graph_file(names.HEAD)} has {len(matrices)} quantized matrices, expected one.")
    ((name, record),) = matrices.items()
    shape = (bundle.config.vocab_size, bundle.config.hidden_size)
    places = stored_tensors_of(bundle, names.HEAD)
    return QuantizedRows(bundle.directory, places, name, record, shape, bundle.form.quantization.format)


def _raw_rows(bundle: Bundle) -> Rows:
    name, form = bundle.form.embedding_file or "", bundle.form.embedding
    shape = (bundle.config.vocab_size, bundle.config.hidden_size)
    dtype = np.dtype(RAW_DTYPES[form.dtype].numpy).newbyteorder("<")
    try:
        table = np.memmap(bundle.whole_path(name), dtype, "r", shape=shape)
    except (OSError, ValueError) as error:
        raise BundleError(f"{name} could not be mapped ({error}); copy or embed the bundle again.") from error
    return lambda ids: decode_rows(table[ids], form.dtype)
