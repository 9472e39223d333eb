"""One `.mnn` model in MNN's Python engine: opened, fed with arrays, and kept from printing to our stdout.

MNN writes to the C library's stdout when it is imported, when it opens a file and where something is wrong; what it
wrote can still be in that library's buffer when the call is over. So file descriptor 1 is turned away meanwhile.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from glmexport.errors import BundleError, GlmExportError

Array = npt.NDArray[Any]

NORMAL, LOW = "normal", "low"
MEMORY = {NORMAL: 0, LOW: 2}
"""How weights are held -> MNN's number. normal: as float32. low: as they are stored, activations rounded to 8 bits."""

CPU = "CPU"
BACKENDS = {CPU: 0, "METAL": 1, "CUDA": 2, "OPENCL": 3, "VULKAN": 7}
"""Where a model runs -> MNN's number; what this build of it has is only seen when a model is opened."""

_HIGH_PRECISION = 1
_NO_BACKEND = b"Can't Find type="
"""What MNN prints before it goes on with the CPU instead of what it was asked for."""

_turned = threading.RLock()


@contextmanager
def quiet(target: int | None = None) -> Iterator[None]:
    """Turn what C code writes to stdout away, or to another file descriptor. One thread at a time."""
    with _turned:
        with suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        try:
            kept = os.dup(1)
        except OSError:  # there is no stdout
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere if target is None else target, 1)
            yield
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(nowhere)
            os.close(kept)


def mnn() -> ModuleType:
    """MNN's Python package. Raises GlmExportError, which says how to get it, where there is none."""
    try:
        with quiet():
            import MNN  # type: ignore[import-untyped]
    except ImportError as error:
        raise GlmExportError(
            f"MNN is not installed, which this bundle needs ({error}); install it with `pip install 'glmexport[mnn]'`."
        ) from error
    module: ModuleType = MNN
    return module


def has_backend(backend: str) -> bool:
    """Whether this build of MNN can run a model there."""
    engine = mnn()
    with tempfile.TemporaryFile() as said:
        with quiet(said.fileno()):
            engine.nn.create_runtime_manager(({"backend": BACKENDS[backend], "numThread": 1},))
        said.seek(0)
        return _NO_BACKEND not in said.read()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class MnnModule:
    """An opened model. Not to be run by two threads at once."""

    def __init__(
        self,
        path: Path,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        memory: str = LOW,
        threads: int | None = None,
        backend: str = CPU,
    ) -> None:
        """Open `path`, whose weights lie beside it. Raises BundleError where MNN cannot."""
        engine = mnn()
        self._path, self._inputs, self._outputs = path, tuple(inputs), tuple(outputs)
        settings = {
            "backend": BACKENDS[backend],
            "numThread": threads or cores(),
            "precision": _HIGH_PRECISION,
            "memory": MEMORY[memory],
        }
        try:
            with quiet():
                self._manager = engine.nn.create_runtime_manager((settings,))
                self._module = engine.nn.load_module_from_file(
                    str(path), [*inputs], [*outputs], runtime_manager=self._manager
                )
        except Exception as error:  # MNN's own errors share no public base class
            raise BundleError(f"{path.name} could not be opened by MNN ({error}); convert the bundle again.") from error
        if self._module is None:
            raise BundleError(f"{path.name} could not be opened by MNN; convert the bundle again.")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, in memory of their own. feeds: int32 or float32, of the shapes that the model has.

        Raises BundleError where MNN fails.
        """
        engine = mnn()
        try:
            with quiet():
                variables = [_variable(engine, feeds[name]) for name in self._inputs]
                results = self._module.forward(variables)
                return {name: _array(one) for name, one in zip(self._outputs, results, strict=True)}
        except Exception as error:  # as above
            raise BundleError(f"{self._path.name} failed to run in MNN: {error}.") from error


def _variable(engine: ModuleType, value: Array) -> Any:
    kind = engine.expr.int if value.dtype == np.int32 else engine.expr.float
    variable = engine.expr.placeholder([*value.shape], engine.expr.NCHW, kind)
    if value.size:  # there is nothing to write into an empty one
        variable.write(np.ascontiguousarray(value))
    return variable


def _array(variable: Any) -> Array:
    """A copy: what MNN gives lies in memory that the next run uses."""
    return np.array(variable.read(), copy=True)


def run_request() -> None:
    """In a process of its own: run a model over arrays in files, as the JSON in the first argument says.

    model, inputs, outputs: of the model. memories: modes to run it in. count: of files `in-<i>.npz` in the working
    directory; writes `out-<memory>-<i>.npz`. Ends with status 1 and a sentence where MNN cannot.
    """
    request = json.loads(sys.argv[1])
    try:
        for memory in request["memories"]:
            module = MnnModule(Path(request["model"]), request["inputs"], request["outputs"], memory=memory)
            for number in range(request["count"]):
                with np.load(f"in-{number}.npz") as file:
                    found: dict[str, Any] = {**module.run({name: file[name] for name in file.files})}
                np.savez(f"out-{memory}-{number}.npz", **found)
            del module  # its memory is needed for the next
    except GlmExportError as error:
        sys.exit(str(error))
