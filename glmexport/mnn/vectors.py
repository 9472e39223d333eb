"""The vectors of a `.mnn` model, held bit for bit: norms and tables, which MNN's converter copies by itself.

Numbers alone do not hold them: one that is off by its last bit moves an output by less than the order of a sum does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport.errors import ExportError
from glmexport.mnn.file import BLOB_EXTERNAL, NORM_EXTERNAL, OP_MAIN, OP_TYPE, TYPE_CONST, TYPE_LAYER_NORM, operators
from glmexport.mnn.matrix import FileBytes

BLOB_FLOATS = 7
NORM_WEIGHT, NORM_BIAS = 2, 3
_INLINE = {TYPE_CONST: (BLOB_FLOATS,), TYPE_LAYER_NORM: (NORM_WEIGHT, NORM_BIAS)}
_EXTERNAL = {TYPE_CONST: BLOB_EXTERNAL, TYPE_LAYER_NORM: NORM_EXTERNAL}


def model_vectors(model: bytes, beside: Path) -> Iterator[bytes]:
    """Every vector of floats that is no matrix and no bias, as its bytes; those of one number alone only from beside.

    beside: the file of weights. Raises ExportError for a model that cannot be read, OSError.
    """
    weights = FileBytes(beside)
    for operator in operators(model):
        kind = operator.integer(OP_TYPE)
        if kind not in _EXTERNAL:
            continue
        main = operator.table(OP_MAIN)
        for number in _INLINE[kind]:
            values = main.vector(number, "f")[1]
            if len(values) > 1:
                yield np.array(values, "<f4").tobytes()
        _, external = main.vector(_EXTERNAL[kind], "q")
        if not external:
            continue
        start, *lengths = external
        for length in lengths:
            if start < 0 or length < 0 or start + length > len(weights):
                raise ExportError(f"The model looks for {length} bytes at {start} of {beside.name}, which ends before.")
            if length:
                yield weights[start : start + length].tobytes()
            start += length


def complaint_of_vectors(
    model: bytes, beside: Path, needed: Mapping[str, npt.NDArray[Any]], known: Mapping[str, npt.NDArray[Any]]
) -> str | None:
    """What is wrong with the vectors of a model in words, None where each is bit for bit what it must be.

    needed: name -> float32 vector that the model must hold, as often as it is named. known: what else it may hold.
    Raises ExportError for a model that cannot be read, OSError.
    """
    found = Counter(model_vectors(model, beside))
    wanted = Counter(_bytes(value) for value in needed.values())
    wrong = [name for name, value in needed.items() if found[_bytes(value)] < wanted[_bytes(value)]]
    strange = found.keys() - wanted.keys() - {_bytes(value) for value in known.values()}
    if not wrong and not strange:
        return None
    lengths = ", ".join(str(length) for length in sorted({len(data) // 4 for data in strange}))
    words = [f"{', '.join(wrong)} not there bit for bit"] * bool(wrong)
    words += [f"vectors of {lengths} numbers that belong to nothing"] * bool(strange)
    return " and ".join(words)


def _bytes(value: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(value, "<f4").tobytes()
