"""Rows of a quantized matrix in a bundle, read back to float32: single ones for an embedding, bands for a check."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport.affine import Affine, dequantize, unpack
from glmexport.errors import BundleError
from glmexport.onnx_files import Array, ExternalTensor, as_bytes
from glmexport.recipe import affine_of_record

CODES, SCALES, ZERO_POINTS = "codes", "scales", "zero_points"


def part_name(matrix: str, part: str) -> str:
    """Initializer name of one part of a quantized matrix."""
    return f"{matrix}.{part}"


def part_forms(affine: Affine, outputs: int, inputs: int, layout: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part -> (dtype, shape) of a matrix [outputs, inputs], in the order in which they are stored."""
    groups, block = affine.groups(inputs), affine.block_size(inputs)
    if layout == "matmulnbits":
        forms: dict[str, tuple[str, tuple[int, ...]]] = {
            CODES: ("uint8", (outputs, groups, block * affine.bits // 8)),
            SCALES: ("float32", (outputs, groups)),
            ZERO_POINTS: ("uint8", (outputs, -(-groups * affine.bits // 8))),
        }
    else:
        per_group = (outputs,) if affine.per_channel else (groups, outputs)
        forms = {
            CODES: (affine.qdq_type, (inputs, outputs)),
            SCALES: ("float32", per_group),
            ZERO_POINTS: (affine.qdq_type, per_group),
        }
    if affine.symmetric:
        del forms[ZERO_POINTS]
    return forms


class QuantizedRows:
    """A quantized matrix [out, in], mapped from the bundle's data file; rows are dequantized when asked for."""

    def __init__(
        self,
        directory: Path,
        places: Mapping[str, ExternalTensor],
        name: str,
        record: Mapping[str, Any],
        shape: tuple[int, int],
        layout: str,
    ) -> None:
        """Map the matrix `name`.

        places: of the graph's tensors (`stored_tensors`). record: what the manifest says of the matrix. layout: one of
        `recipe.FORMATS`. Raises BundleError where the parts are not those of such a matrix.
        """
        self.affine: Affine = affine_of_record(record)
        self.outputs, self.inputs = shape
        self._layout = layout
        self.parts = _map_parts(directory, places, name, self.affine, shape, layout)

    def rows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Float32 rows [len(ids), in] of these outputs."""
        codes, scales = self.parts[CODES], self.parts[SCALES]
        points = self.parts.get(ZERO_POINTS)
        if self._layout == "matmulnbits":
            return dequantize(
                codes[ids], scales[ids], None if points is None else points[ids], self.affine.bits, self.inputs
            )
        centred = self._elements(codes, np.arange(self.inputs), ids)
        block = self.inputs if self.affine.per_channel else self.affine.block_size(self.inputs)
        groups = np.arange(math.ceil(self.inputs / block))
        per_group = scales.reshape(-1, self.outputs)[:, ids].T  # [rows, groups]
        if points is not None:
            centred -= np.repeat(self._elements(points, groups, ids), block, axis=1)[:, : self.inputs]
        centred *= np.repeat(per_group, block, axis=1)[:, : self.inputs]
        return centred

    def let_go(self) -> None:
        """Give back the pages that were read, for whoever reads all rows once; they count as memory of the process."""
        for part in self.parts.values():
            mapped = getattr(part, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def integers(self, ids: npt.NDArray[np.int64]) -> tuple[Array, Array, Array | None]:
        """What these outputs are made of: codes uint8 [n, in], scales float32 [n, groups], zero points uint8 or None.

        Codes are unsigned; where the matrix is symmetric the zero point of all is `affine.middle`. Groups are of
        `affine.block_size` inputs, the last one of what is left.
        """
        codes, scales = self.parts[CODES], self.parts[SCALES]
        points = self.parts.get(ZERO_POINTS)
        bits, groups = self.affine.bits, self.affine.groups(self.inputs)
        if self._layout == "matmulnbits":
            flat = codes[ids].reshape(len(ids), -1)
            whole = None if points is None else unpack(points[ids], bits, groups)
            return unpack(flat, bits, self.inputs), np.asarray(scales[ids]), whole
        middle = np.float32(self.affine.middle if self.affine.symmetric else 0)
        unsigned = (self._elements(codes, np.arange(self.inputs), ids) + middle).astype(np.uint8)
        lines = np.arange(scales.size // self.outputs)
        per_group = np.ascontiguousarray(scales.reshape(-1, self.outputs)[:, ids].T)
        whole = None if points is None else self._elements(points, lines, ids).astype(np.uint8)
        if self.affine.per_channel:  # the other layout repeats the one scale
            per_group = np.repeat(per_group, groups, axis=1)
            whole = None if whole is None else np.repeat(whole, groups, axis=1)
        return unsigned, per_group, whole

    def _elements(self, packed: Array, lines: Array, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Integers of a packed row-major [lines, out] array at [ids, lines], as float32."""
        flat = ids[:, None] + lines[None, :] * self.outputs
        codes: npt.NDArray[np.uint8]
        if self.affine.bits == 8:
            codes = packed[flat]
        else:
            shift = ((flat & 1) * 4).astype(np.uint8)  # the second of two is the high nibble
            codes = (packed[flat >> 1] >> shift) & np.uint8(15)
        if self.affine.symmetric:
            middle = np.uint8(self.affine.middle)  # two's complement -> excess, and back as a number
            return (codes ^ middle).astype(np.float32) - np.float32(middle)
        return codes.astype(np.float32)


def _map_parts(
    directory: Path,
    places: Mapping[str, ExternalTensor],
    name: str,
    affine: Affine,
    shape: tuple[int, int],
    layout: str,
) -> dict[str, Array]:
    parts: dict[str, Array] = {}
    for part, (dtype, part_shape) in part_forms(affine, *shape, layout).items():
        place = places.get(part_name(name, part))
        if place is None or (place.dtype, place.shape) != (dtype, part_shape):
            found = "nothing" if place is None else f"{place.dtype} {list(place.shape)}"
            raise BundleError(
                f"{part_name(name, part)} is {found}, expected {dtype} {list(part_shape)}; quantize the bundle again."
            )
        if layout == "qdq" and part != SCALES:
            place = as_bytes(place)
        try:
            parts[part] = np.memmap(
                directory / place.location, mode="r", dtype=place.dtype, offset=place.offset, shape=place.shape
            )
        except (OSError, ValueError) as error:
            raise BundleError(f"{place.location} could not be mapped ({error}); copy the bundle again.") from error
    return parts
