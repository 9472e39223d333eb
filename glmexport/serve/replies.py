"""What every answer over HTTP has in common: bodies read within limits, errors in each surface's form, streams."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from glmexport.errors import GlmExportError, printable
from glmexport.serve.engine import QueueFullError, StoppedError
from glmexport.serve.loading import NoRoomError
from glmexport.serve.models import BrokenModelError, NoModelError
from glmexport.untrusted import few, load_json

LOGGER = logging.getLogger("glmexport.serve")
OPENAI_PREFIX = "/v1/"
STOPPING_RETRY = 5
MAX_LOGGED = 20_000
"""Characters of a request's body in the log, where it is asked for."""

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_implemented_error",
    503: "overloaded_error",
}
"""Status -> `type` in OpenAI's form; `server_error` for others."""

FormT = TypeVar("FormT", bound="Form")


class ApiError(Exception):
    """An error with a status. param: the field it is about. code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}


class Form(BaseModel):
    """A request's body: every field of exactly its type; what is not known is kept aside, for the log."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    def unknown(self) -> list[str]:
        """Fields that mean nothing here."""
        return sorted(self.model_extra or {})


def error_of(error: Exception) -> ApiError:
    """What went wrong, as it is told to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NoModelError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, QueueFullError):
        return ApiError(503, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, StoppedError):
        return ApiError(503, str(error), code="stopping", headers={"Retry-After": str(STOPPING_RETRY)})
    if isinstance(error, NoRoomError):
        return ApiError(500, str(error), code="no_memory")
    if isinstance(error, BrokenModelError):
        return ApiError(500, str(error), code="model_broken")
    if isinstance(error, GlmExportError):
        return ApiError(400, str(error))
    LOGGER.error("A request failed", exc_info=error)
    return ApiError(500, "Something went wrong in the server; its log has the reason.")


def error_document(path: str, error: ApiError) -> dict[str, Any]:
    """An error in the form of the surface that the path belongs to."""
    message = printable(str(error))
    if not path.startswith(OPENAI_PREFIX):
        return {"error": message}
    kind = KINDS.get(error.status, "server_error")
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def error_response(path: str, error: Exception) -> Response:
    """The response for an error. A full queue is 429 to OpenAI's clients, which wait for it, 503 to Ollama's."""
    told = error_of(error)
    status = 429 if told.code == "queue_full" and path.startswith(OPENAI_PREFIX) else told.status
    told.status = status
    return JSONResponse(error_document(path, told), status, headers=told.headers)


async def read_form(request: Request, kind: type[FormT]) -> FormT:
    """The body of a request, whatever its Content-Type says. Raises ApiError with 400."""
    document = await read_object(request)
    if request.app.state.settings.log_prompts:
        LOGGER.info("%s: %s", request.url.path, json.dumps(document, ensure_ascii=True)[:MAX_LOGGED])
    try:
        form = kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{place or 'The body'}: {first['msg']}.", param=place or None) from error
    if form.unknown():
        LOGGER.info("%s: fields without a meaning here: %s.", request.url.path, few(form.unknown()))
    return form


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body. Raises ApiError with 400."""
    settings = request.app.state.settings
    try:
        async with asyncio.timeout(settings.body_timeout):
            body = await request.body()
    except TimeoutError as error:
        raise ApiError(408, f"The body did not come within {settings.body_timeout:.0f} seconds.") from error
    except ClientDisconnect as error:
        raise ApiError(400, "The body is not whole.") from error
    try:
        document = load_json(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is no JSON ({str(error)[:120] or 'nested too deep'}).") from error
    if not isinstance(document, dict):
        raise ApiError(400, f"The body is a JSON {type(document).__name__}, expected an object.")
    return document


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no number")


class Stream(Response):
    """A body that comes in chunks; `close` is awaited at its end, whoever ended it.

    A client that is gone, or that takes nothing for `timeout` seconds, ends it.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        media_type: str,
        timeout: float,
    ) -> None:
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._close, self._timeout = chunks, close, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._chunks:
                await self._send(send, {"type": "http.response.body", "body": chunk, "more_body": True})
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except (OSError, TimeoutError):
            LOGGER.info("A client took no more of its answer.")
        finally:
            await self._chunks.aclose()
            await self._close()

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(self._timeout):
            await send(message)


def to_json(document: Any) -> bytes:
    """One line of JSON."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")
