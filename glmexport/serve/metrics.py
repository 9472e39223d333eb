"""Figures for Prometheus: what runs, what waits, how long answers take."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from glmexport.serve.engine import Watch
from glmexport.serve.row import Piece, Row

TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper bounds of the buckets, in seconds."""

EngineFigures = tuple[str, int, int, int, int]
"""(model, rows running, rows waiting, slots, bytes of KV cache a slot)."""


class Metrics:
    """One server's figures, in a registry of their own. engines: gives the figures of the models in memory."""

    def __init__(self, engines: Callable[[], Iterable[EngineFigures]]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "glmexport_requests", "Requests, by path and status.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("glmexport_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry)
        self.answer_tokens = Counter("glmexport_answer_tokens", "Tokens of answers.", ["model"], registry=registry)
        self.answers = Counter(
            "glmexport_answers", "Answers, by how they ended.", ["model", "reason"], registry=registry
        )
        self.queued = self._times("glmexport_queue_seconds", "Time that rows waited for a slot.")
        self.first_token = self._times("glmexport_time_to_first_token_seconds", "From question to first token.")
        self.between_tokens = self._times("glmexport_inter_token_seconds", "From token to token of a row.")
        self.open = Gauge("glmexport_requests_open", "Requests that are being answered.", registry=registry)
        registry.register(_Engines(engines))

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)

    def watch(self, model: str) -> Watch:
        """What an engine tells the figures of a model to."""
        return _Watch(self, model)

    def _times(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["model"], buckets=TIMES, registry=self.registry)


class _Watch(Watch):
    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model

    def begun(self, queued: float) -> None:
        self._metrics.queued.labels(self._model).observe(queued)

    def first_token(self, since_asked: float) -> None:
        self._metrics.first_token.labels(self._model).observe(since_asked)

    def step(self, seconds: float, rows: int) -> None:
        times = self._metrics.between_tokens.labels(self._model)
        for _ in range(rows):
            times.observe(seconds)

    def ended(self, row: Row, piece: Piece) -> None:
        if piece.end is not None:
            self._metrics.prompt_tokens.labels(self._model).inc(piece.end.prompt_tokens)
            self._metrics.answer_tokens.labels(self._model).inc(piece.end.answer_tokens)
            self._metrics.answers.labels(self._model, piece.end.reason).inc()


class _Engines:
    """Asked for when somebody reads: engines come and go."""

    def __init__(self, engines: Callable[[], Iterable[EngineFigures]]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("glmexport_rows_running", "Rows in slots (KV slots in use).", labels=["model"])
        waiting = GaugeMetricFamily("glmexport_rows_waiting", "Rows in the queue.", labels=["model"])
        slots = GaugeMetricFamily("glmexport_kv_slots", "Slots.", labels=["model"])
        held = GaugeMetricFamily("glmexport_kv_slot_bytes", "Bytes of KV cache of one slot.", labels=["model"])
        for model, *figures in self._engines():
            for family, figure in zip((running, waiting, slots, held), figures, strict=True):
                family.add_metric([model], figure)
        return (running, waiting, slots, held)
