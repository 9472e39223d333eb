"""The graphs of a bundle for MNN, run by MNN: what `Session` needs of one, with the inputs that MNN takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.errors import BundleError
from glmexport.interface import graph_spec
from glmexport.mnn.module import BACKENDS, CPU, MEMORY, MnnModule, has_backend

Array = npt.NDArray[Any]

GPU_BACKENDS = ("CUDA", "METAL", "OPENCL", "VULKAN")
"""First choice first."""

TAKES = {"bool": "int32", "int64": "int32"}
"""What a graph of ONNX takes or gives -> what MNN makes of it. A mask of bytes is taken without a word, and misread."""


class MnnGraph:
    """One opened graph; as onnxruntime's sessions, it takes and gives what `interface.graph_spec` says."""

    def __init__(self, bundle: Bundle, graph: str, *, memory: str | None, threads: int | None, backend: str) -> None:
        """memory: `module.NORMAL` or `LOW`, None for what the bundle was made for. Raises BundleError."""
        spec = graph_spec(graph, bundle.config, bundle.argmax)
        self._dtypes = {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
        inputs, outputs = ([tensor.name for tensor in tensors] for tensors in (spec.inputs, spec.outputs))
        path = bundle.path(names.graph_file(graph, names.MNN))
        how = memory or str(bundle.manifest["mnn"]["memory"])
        if how not in MEMORY:
            raise BundleError(f"The memory mode is {how!r:.40}, expected one of {', '.join(MEMORY)}.")
        self._module = MnnModule(path, inputs, outputs, memory=how, threads=threads, backend=backend)

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of these names. feeds: as the graph's ONNX form takes them. Raises BundleError."""
        found = self._module.run({name: as_mnn_takes(value) for name, value in feeds.items()})
        return [found[name].astype(self._dtypes[name], copy=False) for name in outputs]


def as_mnn_takes(value: Array) -> Array:
    """An array of the type that MNN reads: masks and positions int32."""
    return value.astype(TAKES.get(str(value.dtype), value.dtype), copy=False)


def backend_for(wanted: Sequence[str], *, on_gpu: bool) -> str:
    """The backend to open a graph on. wanted: first choice first; none is the CPU, or on a GPU whichever there is.

    Raises BundleError where MNN has not got it.
    """
    strange = [name for name in wanted if name.upper() not in BACKENDS]
    if strange:
        raise BundleError(f"MNN has no backend {strange[0]!r:.40}; expected one of {', '.join(BACKENDS)}.")
    choices = [name.upper() for name in wanted] or [*(GPU_BACKENDS if on_gpu else (CPU,))]
    for name in choices:
        if name == CPU or has_backend(name):
            return name
    raise BundleError(
        f"MNN here has no backend {' or '.join(choices)}; install a build of MNN that has one, or leave the "
        "graphs on the CPU."
    )
