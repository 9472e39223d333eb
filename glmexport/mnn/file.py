"""A `.mnn` file, a FlatBuffer: what its operators say, and how they are made to speak of weights beside the file.

The converter is given stand-ins with a few outputs (`plain_graph`). Of what it makes, the convolutions are replaced by
ones of the real size whose weights lie in `X.mnn.weight`, and the shapes that hold a stand-in's number are corrected in
place. Nothing goes through MNN's JSON form, which prints six digits of every constant.

A FlatBuffer refers forwards only, so a new table may be appended and an operator pointed at it; the old one stays
behind, unread. Field numbers are those of MNN's schema (3.6), as the converter's own files show them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glmexport.errors import ExportError
from glmexport.mnn.matrix import MnnMatrix

NET_OPERATORS, NET_UUID = 3, 11
OP_MAIN_TYPE, OP_MAIN, OP_NAME, OP_TYPE = 1, 2, 3, 5
TYPE_CONST, TYPE_CONVOLUTION, TYPE_LAYER_NORM = 11, 12, 603
MAIN_CONVOLUTION = 9
BLOB_INTEGERS, BLOB_EXTERNAL = 5, 9
NORM_EXTERNAL = 5
CONV_COMMON, CONV_QUANTIZATION, CONV_EXTERNAL = 0, 3, 6
COMMON_OUTPUTS, COMMON_INPUTS = 10, 11
UUID_BYTES = 36
ALIGNMENT = 8


@dataclass(frozen=True)
class Table:
    """One table of a FlatBuffer. Reading outside of the file raises ExportError."""

    data: bytes
    position: int

    def field(self, number: int) -> int | None:
        """Where a field lies in the file, None where it has its default."""
        vtable = self.position - self._read("<i", self.position)
        size = self._read("<H", vtable)
        entry = 4 + 2 * number
        offset = self._read("<H", vtable + entry) if entry + 2 <= size else 0
        return self.position + offset if offset else None

    def integer(self, number: int) -> int:
        """An int32 field; 0 where it is absent."""
        place = self.field(number)
        return 0 if place is None else self._read("<i", place)

    def reference(self, number: int) -> int | None:
        """Where what a field refers to lies."""
        place = self.field(number)
        return None if place is None else place + self._read("<I", place)

    def table(self, number: int) -> Table:
        """The table that a field refers to."""
        place = self.reference(number)
        if place is None:
            raise ExportError("The converter's file lacks a table that it must have; convert again.")
        return Table(self.data, place)

    def vector(self, number: int, element: str) -> tuple[int, tuple[int, ...]]:
        """(where its elements begin, the elements) of a vector of integers; none where it is absent."""
        place = self.reference(number)
        if place is None:
            return 0, ()
        count = self._read("<I", place)
        if count * struct.calcsize(element) > len(self.data) - place - 4:
            raise ExportError("A list in the converter's file ends beyond the file; convert again.")
        return place + 4, struct.unpack_from(f"<{count}{element}", self.data, place + 4)

    def _read(self, form: str, place: int) -> int:
        try:
            return int(struct.unpack_from(form, self.data, place)[0]) if place >= 0 else self._outside()
        except struct.error:
            return self._outside()

    @staticmethod
    def _outside() -> int:
        raise ExportError("The converter's file refers to places outside of itself: it is cut off; convert again.")


@dataclass(frozen=True)
class Stored:
    """Bytes that an operator has in the file beside the model. place: of the list that says where, in the model."""

    place: int
    offset: int
    length: int


@dataclass(frozen=True)
class Convolution:
    """A product in the file. number: of the operator. bias: where that lies in the file beside the model."""

    number: int
    outputs: int
    inputs: int
    stored: Stored
    bias: tuple[int, int]


@dataclass(frozen=True)
class MnnFile:
    """What the converter made.

    kept: what norms and constants have beside the model. constants: (place, values) of every constant list of int32.
    """

    data: bytes
    convolutions: tuple[Convolution, ...]
    kept: tuple[Stored, ...]
    constants: tuple[tuple[int, tuple[int, ...]], ...]


def read_mnn(data: bytes, weight_bytes: int) -> MnnFile:
    """Read a model whose weights lie beside it, in a file of so many bytes.

    Raises ExportError where it is cut off or holds weights in places that are not known of.
    """
    convolutions, kept, constants = [], [], []
    for number, operator in enumerate(operators(data)):
        kind = operator.integer(OP_TYPE)
        if kind == TYPE_CONVOLUTION:
            convolutions.append(_convolution(number, operator.table(OP_MAIN)))
        elif kind in (TYPE_CONST, TYPE_LAYER_NORM):
            main = operator.table(OP_MAIN)
            place, external = main.vector(NORM_EXTERNAL if kind == TYPE_LAYER_NORM else BLOB_EXTERNAL, "q")
            if external:
                kept.append(Stored(place, external[0], sum(external[1:])))
            if kind == TYPE_CONST:
                constants.append(main.vector(BLOB_INTEGERS, "i"))
    stored = [*(one.stored for one in convolutions), *kept]
    found = sum(one.length for one in stored)
    if found != weight_bytes or any(not 0 <= one.offset <= weight_bytes - one.length for one in stored):
        raise ExportError(
            f"The converter's operators speak of {found} bytes of weights beside the model and the file has "
            f"{weight_bytes}; it was cut off, or MNN stores something in a way that is not known; convert again."
        )
    return MnnFile(data, tuple(convolutions), tuple(kept), tuple(constants))


def operators(data: bytes) -> list[Table]:
    """Every operator of a model, in its order. Raises ExportError where it is cut off."""
    if len(data) < ALIGNMENT:
        raise ExportError(f"The converter's file has {len(data)} bytes, which is no model; convert again.")
    net = Table(data, struct.unpack_from("<I", data)[0])
    start, offsets = net.vector(NET_OPERATORS, "I")
    return [Table(data, start + 4 * number + offset) for number, offset in enumerate(offsets)]


def _convolution(number: int, main: Table) -> Convolution:
    common = main.table(CONV_COMMON)
    place, external = main.vector(CONV_EXTERNAL, "q")
    if main.field(CONV_QUANTIZATION) is not None or len(external) != 3:
        raise ExportError("The converter stored a product in another way than it was asked to; convert again.")
    offset, weights, bias = external
    stored = Stored(place, offset, weights + bias)
    sizes = common.integer(COMMON_OUTPUTS), common.integer(COMMON_INPUTS)
    if weights != 4 * sizes[0] * sizes[1]:
        raise ExportError(f"The converter stored {weights} bytes for a product of {sizes}; convert again.")
    return Convolution(number, *sizes, stored, (offset + weights, bias))


def with_matrices(
    file: MnnFile, matrices: Mapping[int, MnnMatrix], offsets: Mapping[int, int], kept: Sequence[int]
) -> bytes:
    """The model with other products; its uuid is still the converter's.

    matrices: number of an operator -> what it is to multiply with. offsets: where that lies beside the model. kept:
    where each of `file.kept` does.
    """
    changed = bytearray(file.data)
    for stored, offset in zip(file.kept, kept, strict=True):
        struct.pack_into("<q", changed, stored.place, offset)
    start, entries = Table(file.data, struct.unpack_from("<I", file.data)[0]).vector(NET_OPERATORS, "I")
    for number, matrix in matrices.items():
        operator = Table(file.data, start + 4 * number + entries[number])
        place = operator.field(OP_MAIN)
        if place is None:
            raise ExportError("A product of the converter's has no parameters; convert again.")
        table = _convolution_table(matrix, offsets[number])
        changed += bytes(-len(changed) % ALIGNMENT)
        struct.pack_into("<I", changed, place, len(changed) + struct.unpack_from("<I", table)[0] - place)
        changed += table
    return bytes(changed)


def with_sizes(file: MnnFile, sizes: Mapping[int, int]) -> MnnFile:
    """The file with each constant that is a stand-in's number as the number that it stands for.

    sizes: stand-in -> real. Raises ExportError where such a number is part of something else.
    """
    changed = bytearray(file.data)
    for place, values in file.constants:
        if not sizes.keys() & {*values}:
            continue
        if len(values) != 1:
            raise ExportError(f"The converter put a size into the list {list(values)!r:.80}, which is not known of.")
        struct.pack_into("<i", changed, place, sizes[values[0]])
    return MnnFile(bytes(changed), file.convolutions, file.kept, file.constants)


def with_uuid(data: bytes, content: bytes) -> bytes:
    """The model with a uuid that follows from its own bytes and from `content`, so that the same gives the same."""
    place = Table(data, struct.unpack_from("<I", data)[0]).reference(NET_UUID)
    if place is None or struct.unpack_from("<I", data, place)[0] != UUID_BYTES:
        raise ExportError("The converter's file has no uuid of 36 characters; this MNN is not known.")
    start, end = place + 4, place + 4 + UUID_BYTES
    digest = hashlib.sha256(data[:start] + data[end:] + content).hexdigest()
    parts = (digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32])
    return data[:start] + "-".join(parts).encode() + data[end:]


def _convolution_table(matrix: MnnMatrix, offset: int) -> bytes:
    """A finished buffer whose root is the table of a product with `matrix`, whose bytes begin at `offset`."""
    import flatbuffers  # type: ignore[import-untyped]  # comes with the extra, beside MNN

    builder = flatbuffers.Builder(512)
    builder.ForceDefaults(True)
    external = matrix.external(offset)
    builder.StartVector(8, len(external), 8)
    for value in reversed(external):
        builder.PrependInt64(value)
    places = builder.EndVector()
    quantization = None
    if matrix.kind is not None:
        builder.StartObject(16)
        builder.PrependInt32Slot(2, matrix.kind, 0)
        builder.PrependBoolSlot(3, False, False)
        builder.PrependFloat32Slot(4, 1.0, 0.0)
        builder.PrependInt32Slot(7, matrix.stored_bits, 0)
        builder.PrependInt32Slot(8, matrix.lowest, 0)
        builder.PrependInt32Slot(9, matrix.scale_rows, 0)
        builder.PrependBoolSlot(11, matrix.wide_header, False)
        quantization = builder.EndObject()
    builder.StartObject(17)
    for slot in range(2, 8):
        builder.PrependInt32Slot(slot, 1, 1)
    builder.PrependInt32Slot(9, 1, 1)
    builder.PrependInt32Slot(COMMON_OUTPUTS, matrix.outputs, 0)
    builder.PrependInt32Slot(COMMON_INPUTS, matrix.inputs, 0)
    common = builder.EndObject()
    builder.StartObject(7)
    builder.PrependUOffsetTRelativeSlot(CONV_COMMON, common, 0)
    if quantization is not None:
        builder.PrependUOffsetTRelativeSlot(CONV_QUANTIZATION, quantization, 0)
    builder.PrependUOffsetTRelativeSlot(CONV_EXTERNAL, places, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())
