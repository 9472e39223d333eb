"""A server that speaks as much of Ollama's API as the web page uses, and says what a test tells it to say."""

from __future__ import annotations

import json
import mimetypes
import select
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "glmexport" / "serve" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MODELS = ("chatglm-6b:latest", "tiny-chatglm:latest")
PARAMETERS = (
    'temperature                    0.95\ntop_p                          0.7\nstop                           "<eop>"'
)
CONTEXT = 2048


@dataclass
class Reply:
    """One answer of `/api/chat`.

    pieces: what is streamed. hold: wait before the end until `go_on` or until the client is gone. cut: close the
    connection without a last line. error: a last line of its own. status, headers: instead of a stream.
    """

    pieces: Iterable[str] = ()
    hold: bool = False
    cut: bool = False
    error: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    counts: tuple[int, int] = (20, 10)
    done_reason: str = "stop"
    go_on: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)


@dataclass
class Fake:
    """What the server does and what it was asked."""

    address: str
    replies: list[Reply] = field(default_factory=list)
    chats: list[dict[str, Any]] = field(default_factory=list)
    models: tuple[str, ...] = MODELS
    key: str | None = None

    def reset(self) -> None:
        """As at the start."""
        self.replies, self.chats, self.models, self.key = [], [], MODELS, None

    def will_say(self, *pieces: str, **more: Any) -> Reply:
        """Adds an answer for the next question that has none yet."""
        reply = Reply(pieces, **more)
        self.replies.append(reply)
        return reply


def handler_of(fake: Fake) -> type[BaseHTTPRequestHandler]:
    """A handler that does what `fake` says."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a browser waits 40 ms for each answer otherwise

        def log_message(self, *_: object) -> None:
            """Nothing: tests say what they expect."""

        def do_GET(self) -> None:
            if self.path == "/api/tags":
                self.if_allowed(lambda: self.json({"models": [{"name": name} for name in fake.models]}))
            elif self.path == "/api/ps":
                self.if_allowed(lambda: self.json({"models": [{"name": name} for name in fake.models[:1]]}))
            else:
                self.file(self.path.split("?")[0].lstrip("/") or "index.html")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/api/show":
                self.if_allowed(lambda: self.json(shown()))
            elif self.path == "/api/chat":
                self.if_allowed(lambda: self.chat(body))
            else:
                self.json({"error": "not found"}, 404)

        def if_allowed(self, answer: Any) -> None:
            if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
                self.json({"error": "The API key is missing or wrong."}, 401)
            else:
                answer()

        def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send(json.dumps(value).encode(), "application/json", status, headers or {})

        def file(self, name: str) -> None:
            path = PAGE / name
            if not path.is_file():
                self.json({"error": "not found"}, 404)
                return
            kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
            self.send(path.read_bytes(), kind, 200, {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

        def send(self, data: bytes, kind: str, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def chat(self, body: dict[str, Any]) -> None:
            fake.chats.append(body)
            reply = fake.replies.pop(0) if fake.replies else Reply(["Hello."])
            if reply.status != 200:
                self.json({"error": reply.error}, reply.status, reply.headers)
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/x-ndjson")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                self.stream(body["model"], reply)
            except (BrokenPipeError, ConnectionResetError):
                reply.gone.set()
                self.close_connection = True

        def stream(self, model: str, reply: Reply) -> None:
            for piece in reply.pieces:
                self.line({"model": model, "message": {"role": "assistant", "content": piece}, "done": False})
            if reply.hold:
                while not reply.go_on.is_set():
                    if self.client_is_gone():
                        reply.gone.set()
                        self.close_connection = True
                        return
            if reply.cut:
                self.close_connection = True
                return
            if reply.error:
                self.line({"error": reply.error})
            else:
                prompt, answer = reply.counts
                counts = {"prompt_eval_count": prompt, "eval_count": answer, "eval_duration": answer * 100_000_000}
                last = {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": reply.done_reason}
                self.line({"model": model, **last, **counts})
            self.wfile.write(b"0\r\n\r\n")

        def line(self, value: object) -> None:
            data = json.dumps(value, ensure_ascii=False).encode() + b"\n"
            for part in (data[:7], data[7:]):  # a line never comes in one piece
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                self.wfile.flush()

        def client_is_gone(self) -> bool:
            readable, _, _ = select.select([self.connection], [], [], 0.01)
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    return Handler


def shown() -> dict[str, Any]:
    """What `/api/show` says of every model."""
    return {
        "parameters": PARAMETERS,
        "details": {"family": "chatglm", "parameter_size": "6.2B", "quantization_level": "int4"},
        "model_info": {"general.architecture": "chatglm", "chatglm.context_length": CONTEXT},
        "capabilities": ["completion"],
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser closes connections as it likes."""


@contextmanager
def serving() -> Iterator[Fake]:
    """A fake on a free port of the loopback address."""
    fake = Fake("")
    with _Server(("127.0.0.1", 0), handler_of(fake)) as server:
        fake.address = f"http://127.0.0.1:{server.server_address[1]}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
