"""onnxruntime over a bundle: embedding, blocks and LM head, opened when needed, closed when memory asks for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.embedding_rows import embedding_rows
from glmexport.errors import BundleError
from glmexport.form import GRAPH
from glmexport.interface import graph_spec

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]

Array = npt.NDArray[Any]


class Session:
    """Runs the graphs of one bundle on the CPU; least recently used graphs are closed above `resident_bytes`.

    resident_bytes: weights to keep open, None for all of them. The graph that runs is always open, whatever its size.
    threads: of each graph, None for onnxruntime's choice.
    """

    def __init__(self, bundle: Bundle, *, resident_bytes: int | None = None, threads: int | None = None) -> None:
        self._bundle = bundle
        self._resident_bytes = resident_bytes
        self._threads = threads
        self._rows: Callable[[Array], Array] | None = None
        self._open: OrderedDict[str, onnxruntime.InferenceSession] = OrderedDict()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def embed(self, input_ids: Array) -> Array:
        """input_ids int64 [batch, seq] -> float32 [seq, batch, hidden]; raises BundleError for ids without a row."""
        if self._bundle.form.embedding.kind == GRAPH:
            return self._run(names.EMBEDDING, {names.INPUT_IDS: input_ids})[names.INPUTS_EMBEDS]
        if self._rows is None:
            self._rows = embedding_rows(self._bundle)
        vocab_size = self._bundle.config.vocab_size
        if input_ids.size and not (input_ids.min() >= 0 and input_ids.max() < vocab_size):
            raise BundleError(
                f"Ids from {input_ids.min()} to {input_ids.max()} were given, expected 0 to {vocab_size - 1}."
            )
        rows = self._rows(input_ids.T.reshape(-1))
        return rows.reshape(*input_ids.T.shape, self._bundle.config.hidden_size)

    def block(
        self, block_id: int, hidden: Array, attention_mask: Array, position_ids: Array, past: Array
    ) -> tuple[Array, Array]:
        """(hidden_states [seq, batch, hidden], presents [2, total, batch, heads, head_dim]), as in `block_spec`."""
        feeds = {
            names.INPUTS_EMBEDS: hidden,
            names.ATTENTION_MASK: attention_mask,
            names.POSITION_IDS: position_ids,
            names.PAST: past,
        }
        outputs = self._run(names.block_name(block_id), feeds)
        return outputs[names.HIDDEN_STATES], outputs[names.PRESENTS]

    def head(self, hidden: Array) -> dict[str, Array]:
        """Hidden states [seq, batch, hidden] -> `logits` [batch, vocab] and/or `token_id` [batch]."""
        return self._run(names.HEAD, {names.HIDDEN_STATES: hidden})

    def empty_past(self, batch: int) -> Array:
        """A KV cache of length 0: float32 [2, 0, batch, heads, head_dim]."""
        config = self._bundle.config
        return np.zeros((2, 0, batch, config.num_heads, config.head_dim), np.float32)

    def _run(self, graph: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        session = self._opened(graph)
        spec = graph_spec(graph, self._bundle.config, self._bundle.argmax)
        outputs = [output.name for output in spec.outputs]
        try:
            values = session.run(outputs, dict(feeds))
        except Exception as error:  # onnxruntime's own errors share no public base class
            raise BundleError(f"{names.graph_file(graph)} failed to run: {str(error).splitlines()[0]}") from error
        return dict(zip(outputs, values, strict=True))

    def _opened(self, graph: str) -> onnxruntime.InferenceSession:
        if graph in self._open:
            self._open.move_to_end(graph)
            return self._open[graph]
        self._make_room(self._weight_bytes(graph))
        self._open[graph] = self._load(graph)
        return self._open[graph]

    def _load(self, graph: str) -> onnxruntime.InferenceSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if not self._bundle.graph(graph)["matrices"]:
            # packed copies of float32 matrices double a graph's memory and take a hundred times as long as mapping its
            # file; quantized ones are multiplied with a hundred times slower where they are not packed
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        path = self._bundle.path(names.graph_file(graph))
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # see _run
            raise BundleError(f"{path.name} could not be loaded: {str(error).splitlines()[0]}") from error

    def _make_room(self, needed: int) -> None:
        if self._resident_bytes is None:
            return
        while self._open and sum(map(self._weight_bytes, self._open)) + needed > self._resident_bytes:
            self._open.popitem(last=False)

    def _weight_bytes(self, graph: str) -> int:
        return self._bundle.files[names.data_file(graph)].bytes
