"""The open graphs of a bundle: sessions of onnxruntime or MNN, kept or streamed as a placement says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.errors import BundleError, printable, reason_of
from glmexport.graph_lint import foreign_parts
from glmexport.mapped_pages import drop_mapped_pages
from glmexport.mnn.session import MnnGraph, backend_for
from glmexport.onnx_files import load_graph
from glmexport.placement import READ_AHEAD, Placement, graphs_for_gpu, held_on_cpu, place
from glmexport.stored import stored_tensors
from glmexport.thread_pool import share_threads

CPU_PROVIDER = "CPUExecutionProvider"
_NO_GPU = (CPU_PROVIDER, "AzureExecutionProvider")
OPENERS = 2
"""Graphs opened side by side. Packing a graph's weights keeps one core busy, so a second one waits for the disk or
uses another core; more would only take turns."""

MAX_COMPLAINT = 400
"""Characters of what is said about a graph, which may hold names of any length."""

_ADVICE_BYTES = 1 << 20  # Linux reads no more than some of the disk's largest request for one piece of advice


class OpenGraph(Protocol):
    """What can be run, whichever runtime opened it."""

    def run(self, outputs: list[str], feeds: dict[str, npt.NDArray[Any]], /) -> list[npt.NDArray[Any]]:
        """The outputs of these names."""
        ...


class GraphPool:
    """Opens graphs when they are asked for; those that are streamed are opened ahead of their turn and closed after it.

    Graphs are expected in the order of the data, over and over. Any other order works and opens more often.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        memory_limit: int | None,
        threads: int | None,
        providers: tuple[str, ...],
        gpu_memory: int | None,
        read_ahead: int = READ_AHEAD,
        mnn_memory: str | None = None,
        flavor: str = names.PORTABLE,
    ) -> None:
        """Plan; nothing is opened. Arguments as of `Session`."""
        self._flavor = flavor
        self._mnn_memory = mnn_memory
        self._bundle = bundle
        self._limit, self._threads, self._read_ahead = memory_limit, threads, read_ahead
        self._providers, self._gpu_memory = providers, gpu_memory
        files, width = bundle.sizes_of(flavor), bundle.form.float_bytes
        self._gpu = () if gpu_memory is None else graphs_for_gpu(files, bundle.config, gpu_memory, width)
        held = held_on_cpu(files, width)
        self.sizes = {name: held[name] if self._on_cpu(name) else size for name, size in files.items()}
        self._open: dict[str, Future[OpenGraph]] = {}
        self._openers = ThreadPoolExecutor(OPENERS, "glmexport-open")
        self.placement = self.placed(0)

    def reserve(self, kv_bytes: int) -> None:
        """Plan for a KV cache of so many bytes: from the next graph on, what can no longer be kept is streamed."""
        if self._limit is not None:
            self.placement = self.placed(kv_bytes)

    def get(self, graph: str) -> OpenGraph:
        """The open graph; opens what comes after it meanwhile. Raises BundleError where it cannot be opened."""
        window = self._window(graph)
        for name in [name for name in self._open if name in self.placement.streamed and name not in window]:
            self._close(name)
        for name in (graph, *window):
            self._begin(name)
        try:
            return self._open[graph].result()
        except Exception:
            del self._open[graph]
            raise

    def open_resident(self, advance: Callable[[str, int], None]) -> None:
        """Open, side by side, all that is to be kept. advance: takes (graph, its bytes) as each is done."""
        kept = (*self.placement.gpu, *self.placement.resident)
        for name in sorted(
            kept, key=lambda name: -self.sizes[name]
        ):  # the head packed last would keep one core waiting
            self._begin(name)
        for name in kept:
            self.get(name)
            advance(name, self.sizes[name])
        # onnxruntime has packed these and reads the file no more, but keeps scales mapped: a fifth of int4 by 32
        entries = (self._bundle.graph(name, self._flavor) for name in self.placement.resident)
        drop_mapped_pages(self._bundle.path(entry["data"]) for entry in entries if entry["matrices"])

    def release(self) -> None:
        """Close what is streamed, as far as it is open; it is opened again when it is needed."""
        for name in self.placement.streamed:
            if name in self._open:
                self._close(name)

    @property
    def held_bytes(self) -> int:
        """Bytes of the bundle's graphs that are open, or being opened, in the computer's memory."""
        return sum(self.sizes[name] for name in self._open if name not in self._gpu)

    def close(self) -> None:
        """Close everything; the pool is of no use afterwards."""
        self._openers.shutdown(cancel_futures=True)
        self._open.clear()

    def placed(self, kv_bytes: int) -> Placement:
        """Where the graphs would be beside a KV cache of so many bytes."""
        return place(
            self.sizes, kv_bytes=kv_bytes, memory_limit=self._limit, gpu=self._gpu, read_ahead=self._read_ahead
        )

    def _on_cpu(self, graph: str) -> bool:
        if self._gpu_memory is not None:
            return graph not in self._gpu
        return not self._providers or self._providers[0] == CPU_PROVIDER

    def _window(self, graph: str) -> list[str]:
        """The streamed graphs that may be open while `graph` runs: itself, if it is one, and the next that fit."""
        window: list[str] = []
        free = self.placement.window_bytes
        for name in islice(self._streamed_from(graph), 1 + self._read_ahead):
            if self.sizes[name] > free and name != graph:
                break
            free -= self.sizes[name]
            window.append(name)
        return window

    def _streamed_from(self, graph: str) -> Iterator[str]:
        """Every streamed graph once, in the order of the data, from `graph` on and around."""
        order = list(self.sizes)
        start = order.index(graph)
        return (name for name in order[start:] + order[:start] if name in self.placement.streamed)

    def _begin(self, graph: str) -> None:
        if graph not in self._open:
            self._open[graph] = self._openers.submit(self._load, graph)

    def _close(self, graph: str) -> None:
        future = self._open.pop(graph)
        if not future.cancel():
            future.exception()  # it is being opened: its bytes are only free once that has ended

    def _load(self, graph: str) -> OpenGraph:
        with_mnn = self._bundle.runtime == names.MNN
        entry = self._bundle.graph(graph, self._flavor)
        path = self._bundle.whole_path(entry["file"])
        if with_mnn:
            self._bundle.whole_path(entry["data"])
        else:
            self._demand_ours(graph, path)
        if graph in self.placement.streamed:
            _read_ahead(self._bundle.path(entry["data"]))
        return self._open_with_mnn(graph) if with_mnn else self._open_with_onnxruntime(graph, path)

    def _open_with_mnn(self, graph: str) -> OpenGraph:
        on_gpu = graph in self._gpu
        wanted = () if self._gpu_memory is not None and not on_gpu else self._providers
        backend = backend_for(wanted, on_gpu=on_gpu)
        return MnnGraph(self._bundle, graph, memory=self._mnn_memory, threads=self._threads, backend=backend)

    def _open_with_onnxruntime(self, graph: str, path: Path) -> OpenGraph:
        import onnxruntime  # type: ignore[import-untyped]

        share_arena()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it would log is raised too
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # they go when it does
        if share_threads(self._threads):
            options.use_per_session_threads = False
        else:  # threads of its own, which must not spin while the next graph runs
            options.add_session_config_entry("session.force_spinning_stop", "1")
            options.intra_op_num_threads = self._threads or 0
        if not self._bundle.graph(graph)["matrices"]:
            # packed copies of float32 matrices double a graph's memory and take a hundred times as long as mapping its
            # file; quantized ones are multiplied with a hundred times slower where they are not packed
            options.add_session_config_entry("session.disable_prepacking", "1")
        providers = self._providers_of(graph)
        try:
            session: OpenGraph = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's own errors share no public base class
            raise BundleError(
                f"{names.shown(path)} could not be loaded ({reason_of(error)}); copy the bundle or split again."
            ) from error
        return session

    def _demand_ours(self, graph: str, path: Path) -> None:
        """Refuse what onnxruntime would trust: data outside the bundle, sizes that are not the model's, loops."""
        model = load_graph(path)
        stored_tensors(self._bundle, model, self._bundle.graph(graph, self._flavor))
        spec = self._bundle.form.spec_of(graph, self._bundle.config, self._bundle.argmax, self._flavor)
        complaints = foreign_parts(model, spec)
        if complaints:
            raise BundleError(
                f"{names.shown(path)} {printable(complaints[0])[:MAX_COMPLAINT].rstrip('.')}; copy the bundle or split "
                "again."
            )

    def _providers_of(self, graph: str) -> list[str]:
        """Execution providers of a graph, first choice first; BundleError where onnxruntime has not got them."""
        if self._gpu_memory is not None and graph not in self._gpu:
            return [CPU_PROVIDER]
        import onnxruntime

        available = onnxruntime.get_available_providers()
        wanted = self._providers or (CPU_PROVIDER,)
        if self._gpu_memory is not None and not self._providers:
            wanted = tuple(name for name in available if name not in _NO_GPU) or ("of a GPU",)
        missing = [name for name in wanted if name not in available]
        if missing:  # onnxruntime itself would warn and go on without
            raise BundleError(
                f"onnxruntime here has no execution provider {missing[0]}, only {', '.join(available)}; install a "
                "build of onnxruntime that has one, or choose another."
            )
        return [*wanted, *([] if CPU_PROVIDER in wanted else [CPU_PROVIDER])]


@cache
def share_arena() -> None:
    """Have all graphs of the process take the memory of what they compute from one place.

    An arena of its own keeps, for each graph, what the longest prompt took: 28 times 260 MB after 512 tokens at full
    size (onnxruntime 1.31). Of one that they share every graph uses the same memory in its turn.
    """
    import onnxruntime

    place = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(place, None)


def _read_ahead(path: Path) -> None:
    """Ask the system to read a file into its cache, without waiting for it; where it cannot be asked, do nothing."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), path.open("rb", buffering=0) as file:  # who opens it says what is wrong with it
        for offset in range(0, os.fstat(file.fileno()).st_size, _ADVICE_BYTES):
            os.posix_fadvise(file.fileno(), offset, _ADVICE_BYTES, os.POSIX_FADV_WILLNEED)
