"""A draft -> a bundle on disk, each byte read once and written once."""

from __future__ import annotations

import dataclasses
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import onnx

from glmexport import names
from glmexport.ahead import Ahead
from glmexport.bundle import LinkedFile
from glmexport.bundle_writer import BundleWriter
from glmexport.draft import BundleDraft, GraphDraft, graph_entry, with_tensors
from glmexport.errors import BundleError, ExportError
from glmexport.graph_lint import lint_graph
from glmexport.interface import opset_of
from glmexport.onnx_files import Array, ExternalDataWriter, ExternalTensor, load_graph, stored_bytes
from glmexport.tensors import SLICE_BYTES, Tensor

Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class Resumable:
    """What it takes to go on with a bundle after a run that was killed.

    identity: all that its bytes follow from, as plain JSON values. resume: whether to go on with an earlier run;
    begun is then told whether there was one. check: called before the bundle is put in its place, raises where what it
    was made from is no longer what it was.
    """

    identity: Mapping[str, Any]
    resume: bool
    begun: Callable[[bool], None]
    check: Callable[[], None]


def ignore_advance(what: str, count: int) -> None:
    """Drop a progress report."""


def write_bundle(
    draft: BundleDraft,
    output: Path,
    *,
    force: bool = False,
    copy: bool = False,
    resumable: Resumable | None = None,
    advance: Advance = ignore_advance,
) -> Path:
    """Write the bundle and return its path.

    copy: unchanged files of another bundle instead of linking them. resumable: what a later run needs to go on, None
    where none can. advance: takes (graph or file, bytes written) as weights are written.
    Raises BundleError where the output may not be written, the disk is too small (before starting), or what is to be
    resumed is another bundle; ExportError where a graph is not what it must be, and whatever the tensors raise while
    they are read. What is left behind, `BundleWriter` says.
    """
    identity, resume = (None, False) if resumable is None else (resumable.identity, resumable.resume)
    if not resume:
        check_disk(output, sum(draft.sizes().values()) if copy else new_bytes(draft))
    with BundleWriter(output, force=force, copy=copy, identity=identity, resume=resume) as writer:
        if resumable is not None and resume:
            resumable.begun(writer.resumed)
        finished: dict[str, dict[str, Any]] = {}
        for graph in draft.graphs:
            advance(graph.name, 0)
            entry = writer.finished(graph.name)
            if entry is not None:
                finished[graph.name] = entry
                advance(graph.name, graph.data_bytes)
        entries = []
        with Making(draft, [graph for graph in draft.graphs if graph.name not in finished]) as making:
            for graph in draft.graphs:
                if graph.name not in finished:
                    advance(graph.name, 0)
                    finished[graph.name] = entry = _write_graph(writer, draft, graph, making, advance)
                    writer.finish(graph.name, files_of(graph), entry)
                entries.append(finished[graph.name])
            for name, content in draft.files.items():
                advance(name, 0)
                _write_file(writer, name, content, making, advance)
        advance(names.MANIFEST, 0)
        if resumable is not None:
            resumable.check()
        return writer.commit(draft.manifest(entries))


def new_bytes(draft: BundleDraft) -> int:
    """Bytes that must be free where the bundle goes: what is not linked."""
    linked = draft.shared_data()
    linked |= {
        names.in_flavor(names.data_file(graph.name), next(iter(graph.models)))
        for graph in draft.graphs
        if graph.data_link
    }
    linked |= {name for name, content in draft.files.items() if isinstance(content, LinkedFile)}
    return sum(size for name, size in draft.sizes().items() if name not in linked)


def check_disk(output: Path, needed: int) -> None:
    """Raise BundleError where fewer than `needed` bytes are free for `output`."""
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BundleError(
            f"{place} has {free / 1e6:,.1f} MB free and the bundle needs {needed / 1e6:,.1f} MB; free some or choose "
            f"another output."
        )


class Making:
    """What is to be written, made in threads: tensors ahead of what writes them, and beside them the graphs.

    Tensors are begun in the order in which they are written, those of the graphs and then those that are files; several
    at once, so that one is read while another is cast or turned. Making a graph may mean tracing it, which takes
    seconds that nothing of the weights depends on.
    """

    TENSORS_AT_ONCE = 3
    SLICES_AHEAD = 2
    WAITING_BYTES = TENSORS_AT_ONCE * SLICES_AHEAD * SLICE_BYTES

    def __init__(self, draft: BundleDraft, graphs: Sequence[GraphDraft]) -> None:
        files = [content for content in draft.files.values() if not isinstance(content, bytes | LinkedFile)]
        self._coming = deque(chain(*(graph.tensors for graph in graphs if graph.data_link is None), files))
        self._begun: deque[tuple[Ahead[Array], int]] = deque()
        self._makers = ThreadPoolExecutor(self.TENSORS_AT_ONCE, thread_name_prefix="tensors")
        self._begin()
        self._tracer = ThreadPoolExecutor(1, thread_name_prefix="graphs")
        self._models = {
            (graph.name, flavor): self._tracer.submit(make)
            for graph in graphs
            for flavor, make in graph.models.items()
            if flavor not in graph.graph_links
        }

    def __enter__(self) -> Making:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._makers.shutdown(wait=False, cancel_futures=True)
        for slices, _ in self._begun:
            slices.stop()
        self._makers.shutdown()
        self._tracer.shutdown(cancel_futures=True)

    def slices(self) -> Iterator[Array]:
        """Those of the next tensor. Raises what making them raises."""
        yield from self._begun[0][0]
        self._begun.popleft()
        self._begin()

    def _begin(self) -> None:
        """Begin tensors as far as what may wait of them fits beside what may wait already."""
        while self._coming:
            tensor = self._coming[0]
            waiting = min(stored_bytes(tensor.dtype, tensor.shape), self.SLICES_AHEAD * SLICE_BYTES)
            if self._begun and sum(bytes_ for _, bytes_ in self._begun) + waiting > self.WAITING_BYTES:
                break
            self._begun.append((Ahead(tensor.slices, self._makers, self.SLICES_AHEAD), waiting))
            self._coming.popleft()

    def model(self, graph: GraphDraft, flavor: str) -> onnx.ModelProto:
        """The graph without its tensors. Raises what making it raises."""
        return self._models.pop((graph.name, flavor)).result()


def files_of(graph: GraphDraft) -> tuple[str, ...]:
    """The files of a graph, the data first."""
    own = names.data_file(graph.name), names.graph_file(graph.name)
    return tuple(names.in_flavor(file, flavor) for flavor in graph.models for file in own)


def _write_graph(
    writer: BundleWriter, draft: BundleDraft, graph: GraphDraft, making: Making, advance: Advance
) -> dict[str, Any]:
    first, *others = (names.in_flavor(names.data_file(graph.name), flavor) for flavor in graph.models)
    if graph.data_link is not None:
        places = [tensor.place for tensor in graph.tensors]  # type: ignore[attr-defined]  # links come with FileTensor
        writer.link(first, graph.data_link)
        advance(graph.name, graph.data_bytes)
    else:
        with writer.create(first) as sink:
            data = ExternalDataWriter(sink, first)
            for tensor in graph.tensors:
                data.add(tensor.name, tensor.dtype, tensor.shape, _reported(making.slices(), graph.name, advance))
        places = data.tensors
    for other in others:
        writer.link(other, LinkedFile(writer.path(first), writer.files[first]))
    beside = [dataclasses.replace(place, location=names.data_file(graph.name)) for place in places]
    models = {flavor: _write_flavor(writer, draft, graph, flavor, beside, making) for flavor in graph.models}
    return graph_entry(draft, graph, models)


def _write_flavor(
    writer: BundleWriter,
    draft: BundleDraft,
    graph: GraphDraft,
    flavor: str,
    places: Sequence[ExternalTensor],
    making: Making,
) -> onnx.ModelProto:
    name = names.in_flavor(names.graph_file(graph.name), flavor)
    if flavor in graph.graph_links:
        writer.link(name, graph.graph_links[flavor])
        return load_graph(writer.path(name))
    model = with_tensors(making.model(graph, flavor), places)
    writer.write_bytes(name, model.SerializeToString(deterministic=True))
    spec = draft.form.spec_of(graph.name, draft.config, draft.argmax, flavor)
    complaints = lint_graph(writer.path(name), spec, opset_of(flavor, draft.opset))
    if complaints:
        raise ExportError("A graph breaks the bundle's rules, so nothing was written: " + " ".join(complaints))
    return model


def _write_file(
    writer: BundleWriter, name: str, content: bytes | Tensor | LinkedFile, making: Making, advance: Advance
) -> None:
    if isinstance(content, bytes):
        writer.write_bytes(name, content)
    elif isinstance(content, LinkedFile):
        writer.link(name, content)
    else:
        with writer.create(name) as sink:
            data = ExternalDataWriter(sink, name)
            data.add(name, content.dtype, content.shape, _reported(making.slices(), name, advance))


def _reported(slices: Iterator[Array], what: str, advance: Advance) -> Iterator[Array]:
    for part in slices:
        yield part
        advance(what, part.nbytes)
