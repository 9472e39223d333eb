"""Servers and engines to test: a runner that computes nothing, and a real server in a thread, on the loopback alone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from glmexport.config import SpecialIds
from glmexport.serve.app import make_app
from glmexport.serve.engine import Engine
from glmexport.serve.modelfile import Modelfile
from glmexport.serve.row import Ask, Piece
from glmexport.serve.server import Server, listen
from glmexport.serve.settings import Settings
from glmexport.serve.store import Entry, Store

VOCAB, END = 50, 3
SPECIAL = SpecialIds(mask=0, gmask=1, bos=2, eos=END, pad=4, forced=5)
WAIT = 20.0
"""Seconds after which a test that waits for something has failed; no test takes them."""


class FakeRunner:
    """Rows whose next token follows from their own tokens alone. gate: a semaphore to let steps through one by one."""

    def __init__(self, slots: int = 4, max_length: int = 64, gate: threading.Semaphore | None = None) -> None:
        self.slots, self.max_length, self.kv_bytes_per_slot = slots, max_length, 1000
        self.rows: dict[int, list[int]] = {}
        self.gate, self.calls = gate, list[Any]()
        self.closed = False
        self.broken: Exception | None = None

    def prefill(self, slot, input_ids):
        assert slot not in self.rows
        assert 0 <= slot < self.slots
        self._pass(("prefill", slot, tuple(input_ids)))
        self.rows[slot] = list(input_ids)
        return logits_after(self.rows[slot])

    def decode(self, slots, tokens):
        self._pass(("decode", tuple(slots)))
        for slot, token in zip(slots, tokens, strict=True):
            self.rows[slot].append(token)
            assert len(self.rows[slot]) <= self.max_length
        return np.stack([logits_after(self.rows[slot]) for slot in slots])

    def free(self, slot):
        self.rows.pop(slot, None)

    def close(self):
        self.closed = True

    def _pass(self, call):
        if self.gate is not None:
            assert self.gate.acquire(timeout=WAIT)
        self.calls.append(call)
        if self.broken is not None:
            raise self.broken


def logits_after(tokens: list[int]) -> np.ndarray:
    """float32 [VOCAB], the same for the same tokens; the end token is never the likeliest."""
    random = np.random.default_rng(abs(hash(tuple(tokens))))
    logits = random.normal(size=VOCAB).astype(np.float32)
    logits[END] = -10
    return logits


def alone(ask: Ask) -> list[int]:
    """The greedy tokens of a row of `FakeRunner`."""
    tokens, answer = list(ask.prompt_ids), []
    while len(answer) < ask.max_tokens:
        answer.append(int(logits_after(tokens).argmax()))
        tokens.append(answer[-1])
    return answer


def until(condition) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@dataclass
class Heard:
    """A sink that remembers, and can be waited on."""

    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, number: int, piece: Piece) -> None:
        with self.changed:
            self.pieces.setdefault(number, []).append(piece)
            self.changed.notify_all()

    def wait(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), WAIT)

    def end(self, number: int = 0):
        """How an answer ended, waited for."""
        self.wait(lambda heard: number in heard.pieces and heard.pieces[number][-1].end is not None)
        return self.pieces[number][-1].end

    def text(self, number: int = 0) -> str:
        self.end(number)
        return "".join(piece.text for piece in self.pieces[number])

    def ids(self, number: int = 0) -> list[int]:
        """Of an answer whose logprobs were asked for."""
        self.end(number)
        return [token.id for piece in self.pieces[number] for token in piece.tokens]


@contextmanager
def engine_of(runner: FakeRunner, tokenizer: Any = None, **options: Any) -> Iterator[Engine]:
    engine = Engine(runner, tokenizer, SPECIAL, **options)
    try:
        yield engine
    finally:
        if runner.gate is not None:
            runner.gate.release(10_000)
        engine.stop("over", drain=False)
        assert engine.join(WAIT)
        assert runner.closed


def entry_of(bundle: Path, name: str = "tiny", **modelfile: Any) -> Entry:
    return Entry(name, bundle, Modelfile(str(bundle), **modelfile), 1_700_000_000.0, created=False)


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    app: Any
    server: Server
    thread: threading.Thread

    @property
    def models(self) -> Any:
        return self.app.state.server.models

    def engine(self) -> Engine:
        (loaded,) = self.models.loaded.values()
        return loaded.served.engine

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a request; a body that is no bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as response:
                return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read()
        except urllib.error.HTTPError as error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()

    def json(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        status, _, text = self.ask(method, path, body, headers)
        assert status == 200, text
        return json.loads(text)


@contextmanager
def serving(home: Path, *entries: Entry, preload: bool = True, **options: Any) -> Iterator[Running]:
    """A real server on a port of its own. options: of `Settings`."""
    settings = replace(Settings(port=0, threads=1, max_num_seqs=4, shutdown_timeout=5.0), **options)
    fixed = {entry.name: entry for entry in entries}
    app = make_app(settings, Store(home), fixed, preload=entries if preload else ())
    listener, started, address = listen(settings), threading.Event(), list[str]()

    def tell(host: str, port: int) -> None:
        address.append(f"http://{host}:{port}")
        started.set()

    server = Server(app, settings, tell)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    assert started.wait(WAIT)
    try:
        yield Running(address[0], app, server, thread)
    finally:
        server.should_exit = True
        thread.join(WAIT)
        listener.close()
        assert not thread.is_alive()
