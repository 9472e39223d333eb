"""uvicorn around the application: signals, the grace that running answers get, and what is printed."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.applications import Starlette

from glmexport.errors import GlmExportError
from glmexport.serve.context import Server as ServerContext
from glmexport.serve.protocol import PatientProtocol
from glmexport.serve.settings import Settings

KEEP_ALIVE_SECONDS = 65
MAX_HEADER_BYTES = 32 << 10
MAX_CONNECTIONS = 1024
EXTRA_SECONDS = 5
"""That uvicorn waits longer for connections to close than running answers may take."""


class Server(uvicorn.Server):
    """Ends on SIGINT or SIGTERM: no new questions, a grace for the running answers; at once on a second SIGINT.

    started: called with the socket's address when questions are taken.
    """

    def __init__(
        self, app: Starlette, settings: Settings, started: Callable[[str, int], None] = lambda host, port: None
    ):
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=True,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=round(settings.shutdown_timeout) + EXTRA_SECONDS,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                limit_concurrency=MAX_CONNECTIONS,
                lifespan="on",
                http=PatientProtocol,
                ws="none",
                proxy_headers=False,
            )
        )
        self._app, self._settings, self._started = app, settings, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, then tell whoever waits for it."""
        await super().startup(sockets)
        if self.started:
            listening = sockets or [one for server in self.servers for one in server.sockets]
            host, port = listening[0].getsockname()[:2]
            self._started(host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, while the models end their answers."""
        context: ServerContext = self._app.state.server
        draining = asyncio.create_task(context.models.drain(self._settings.shutdown_timeout))
        await super().shutdown(sockets)
        with suppress(asyncio.CancelledError):
            await draining

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End on them, and do not raise them again: having been stopped is how a server ends well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(settings: Settings) -> socket.socket:
    """A socket that listens. Raises GlmExportError where the address is taken or none of this computer's."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise GlmExportError(
            f"{settings.host}:{settings.port} cannot be listened on ({error.strerror or error}); choose another --port "
            "or --host (Ollama itself uses 11434)."
        ) from error
    return listener


def run_server(app: Starlette, settings: Settings, started: Callable[[str, int], None]) -> None:
    """Serve until a signal. Raises GlmExportError: an address that cannot be had, a model that cannot be loaded."""
    listener = listen(settings)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    server = Server(app, settings, started)
    try:
        asyncio.run(server.serve([listener]))
    except SystemExit as error:  # uvicorn's way to say that the lifespan did not begin
        raise app.state.failure or GlmExportError("The server could not be started; its log says why.") from error
    finally:
        listener.close()
