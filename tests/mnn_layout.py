"""A slow reader of matrices as they lie beside a model for MNN; it shares no code with glmexport."""

from __future__ import annotations

import struct

import numpy as np


def slowly_read(data: bytes, outputs: int, inputs: int, bits: int, block: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(weights [outputs, inputs], bias [outputs]) of a matrix: one number after the other."""
    bias = np.frombuffer(data[len(data) - 4 * outputs :], "<f4")
    if bits >= 16:
        assert len(data) == outputs * (inputs * bits // 8 + 4)
        floats = np.frombuffer(data[: outputs * inputs * bits // 8], {32: "<f4", 16: "<f2"}[bits])
        return floats.astype(np.float32).reshape(outputs, inputs), bias
    rows = outputs * inputs // block
    head = "<B2IB" if max(rows, block) > 65535 else "<B2HB"
    axes, *sizes, levels = struct.unpack_from(head, data)
    assert (axes, sizes, levels) == (2, [rows, block], 2**bits % 256)
    at = struct.calcsize(head)
    table = struct.unpack_from(f"{2**bits}b", data, at)
    assert table == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    at += 2**bits
    count = outputs * inputs
    if bits == 4:
        codes = [data[at + i // 2] >> 4 if i % 2 == 0 else data[at + i // 2] & 15 for i in range(count)]
        at += -(-count // 2)
    else:
        codes = [*data[at : at + count]]
        at += count
    assert len(data) == at + 8 * rows + 4 * outputs
    pairs = np.frombuffer(data, "<f4", 2 * rows, at).reshape(rows, 2)
    values = [code * pairs[i // block, 1] + pairs[i // block, 0] for i, code in enumerate(codes)]
    return np.array(values, np.float32).reshape(outputs, inputs), bias
