"""Time and error of quantizing one matrix, beside eager torch and beside copying it.

Example: python benchmarks/quantize_kernels.py --shape 4096 4096 --threads 2

Weights are normal, 0.02 wide, with 8 input columns twenty times as large; the error is |w - v| / |w|. `copy` is the
floor: the matrix read and written once, as float32. Each figure is the best of the repeats; `[in,out]` is the time
where the matrix is the transpose view of such an array.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product

import numpy as np
import torch

from glmexport.affine import BITS, METHODS, Affine
from glmexport.quantize_kernels import quantize

GROUP_SIZES = (32, 128, "channel")


def weights(out: int, width: int) -> np.ndarray:
    """Float32 [out, width]."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((out, width), dtype=np.float32) * np.float32(0.02)
    matrix[:, random.choice(width, min(8, width), replace=False)] *= 20
    return matrix


def best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the quickest call."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def torch_rounding(matrix: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric rounding to nearest as eager operations: packed codes and scales."""
    top = 2 ** (bits - 1) - 1
    groups = matrix.reshape(len(matrix), -1, group)
    scales = groups.abs().amax(-1, keepdim=True) / top
    codes = (torch.round(groups / scales).clamp_(-top - 1, top) + (top + 1)).to(torch.uint8)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4) if bits == 4 else codes), scales


def copy(matrix: np.ndarray, threads: int) -> Callable[[], object]:
    """A call that copies the matrix with so many threads."""
    target = np.empty_like(matrix)
    edges = [len(matrix) * number // threads for number in range(threads + 1)]
    bands = [slice(*pair) for pair in pairwise(edges)]

    def call() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda band: np.copyto(target[band], matrix[band]), bands))

    return call


def measure(out: int, width: int, threads: int, repeats: int) -> list[dict[str, object]]:
    """A row of the table for each way to quantize."""
    matrix = weights(out, width)
    turned = np.ascontiguousarray(matrix.T).T
    scale = 1e9 / matrix.size
    torch.set_num_threads(threads)
    quantize(matrix[:1], Affine(4, 32))  # compiles
    rows: list[dict[str, object]] = [{"method": "copy", "ns": best(copy(matrix, threads), repeats) * scale}]
    for bits, group in product(BITS, GROUP_SIZES):
        size = group if isinstance(group, int) else width
        call = best(lambda b=bits, s=size: torch_rounding(torch.from_numpy(matrix), b, s), repeats)
        rows.append({"method": "torch rtn", "bits": bits, "group": group, "symmetric": True, "ns": call * scale})
    for method, bits, group, symmetric in product(METHODS, BITS, GROUP_SIZES, (True, False)):
        spec = Affine(bits, group, symmetric, method)
        rows.append(
            {
                "method": method,
                "bits": bits,
                "group": group,
                "symmetric": symmetric,
                "ns": best(lambda s=spec: quantize(matrix, s, threads), repeats) * scale,
                "ns_transposed": best(lambda s=spec: quantize(turned, s, threads), repeats) * scale,
                "relative_error": quantize(matrix, spec, threads).fit.relative_error,
            }
        )
    return rows


def line(row: dict[str, object]) -> str:
    """One line of the table."""
    symmetric = {True: "symmetric", False: "asymmetric", None: ""}[row.get("symmetric")]
    name = f"{row['method']:<10} {row.get('bits', ''):>4} {row.get('group', ''):>8} {symmetric:<10}"
    turned = f"{row['ns_transposed']:8.2f}" if "ns_transposed" in row else " " * 8
    error = f"{row['relative_error']:12.5f}" if "relative_error" in row else ""
    return f"{name} {row['ns']:8.2f} {turned} {error}".rstrip()


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs=2, type=int, default=(4096, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args()
    rows = measure(*arguments.shape, arguments.threads, arguments.repeats)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'method':<10} bits    group {'':<10} {'ns/param':>8} {'[in,out]':>8} {'error':>12}")
    for row in rows:
        print(line(row))


if __name__ == "__main__":
    main()
