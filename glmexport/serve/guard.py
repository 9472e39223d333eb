"""Who may ask at all: the key, the Host and Origin of a request, its size; and the line about it in the log."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmexport.errors import printable
from glmexport.serve.metrics import Metrics
from glmexport.serve.replies import ApiError, error_response
from glmexport.serve.settings import LOOPBACK, Settings

ACCESS = logging.getLogger("glmexport.serve.access")
OPEN_PATHS = ("/health",)
"""What needs no key."""

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"server", b"glmexport"),
)
_WAYS_IN = 'Bearer realm="glmexport"', 'Basic realm="glmexport", charset="UTF-8"'
MAX_PATH = 200


class TooLargeError(ApiError):
    """A body of more bytes than are taken."""


class Guard:
    """Lets a request through to `app`, or answers it itself."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        begun, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *SECURITY_HEADERS]}
            await send(message)

        self._metrics.open.inc()
        try:
            await self._answer(scope, receive, answer)
        finally:
            self._metrics.open.dec()
            self._log(scope, status, time.monotonic() - begun)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        try:
            demand_host(headers, self._settings)
            demand_origin(headers)
            if path not in OPEN_PATHS:
                demand_key(headers, self._settings.api_key)
            limited = _limited(receive, headers, self._settings.max_body)
        except ApiError as error:
            await error_response(path, error)(scope, receive, send)
            return
        await self._app(scope, limited, send)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, str(status)).inc()
        client = (scope.get("client") or ("-",))[0]
        path = printable(scope.get("raw_path", b"").decode("ascii", "replace"))[:MAX_PATH]  # as sent: on one line
        ACCESS.info("%s %s %s %s %.0f ms", client, scope["method"], path, status or "gone", seconds * 1000)


def demand_host(headers: Headers, settings: Settings) -> None:
    """Raise ApiError for a Host that is not this server's, which is how other sites' names come to point at it."""
    allowed = {*settings.hosts, settings.host.lower(), *LOOPBACK}
    if not settings.is_local and not settings.hosts:
        return  # by whatever name it is known
    host = _hostname(headers.get("host", ""))
    if host not in allowed:
        raise ApiError(403, f"The Host {host!r:.80} is not this server's; see --allowed-host.", code="host")


def demand_origin(headers: Headers) -> None:
    """Raise ApiError for a request that another site's page makes."""
    origin = headers.get("origin")
    if origin is None:
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise ApiError(403, "Pages of other sites may not ask this server.", code="origin")
        return
    if urlsplit_or_none(origin) != headers.get("host", "").lower():
        raise ApiError(
            403, f"The Origin {origin!r:.80} is not this server; pages of other sites may not ask it.", code="origin"
        )


def demand_key(headers: Headers, key: str | None) -> None:
    """Raise ApiError unless the request has the key, as a bearer token or as the password of a browser's dialogue."""
    if key is None or same_key(_given_key(headers), key):
        return
    asks = _WAYS_IN[1] if "text/html" in headers.get("accept", "") else _WAYS_IN[0]
    raise ApiError(
        401,
        "The API key is missing or wrong; send `Authorization: Bearer KEY`.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": asks},
    )


def same_key(given: str, key: str) -> bool:
    """Whether two keys are one, in a time that says nothing about them."""
    first, second = (hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given, key))
    return hmac.compare_digest(first, second)


def urlsplit_or_none(origin: str) -> str | None:
    """host:port of an origin, None where it has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _given_key(headers: Headers) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _hostname(host: str) -> str:
    """`localhost` of `localhost:11434`, `::1` of `[::1]:11434`."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _limited(receive: Receive, headers: Headers, limit: int) -> Receive:
    """A `receive` that takes no more than `limit` bytes. Raises ApiError where more are announced."""
    sentence = f"The body has more than {limit} bytes."
    announced = headers.get("content-length", "0")
    if not (announced.isascii() and announced.isdecimal()):
        raise ApiError(400, "The Content-Length is no number.")
    if int(announced) > limit:
        raise TooLargeError(413, sentence)
    taken = 0

    async def receive_limited() -> Message:
        nonlocal taken
        message = await receive()
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
            if taken > limit:
                raise TooLargeError(413, sentence)
        return message

    return receive_limited
