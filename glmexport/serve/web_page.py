"""The web page, where the package holds one: plain files, and headers that keep everything else out of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

DIRECTORY = Path(__file__).parent / "page"
INDEX = "index.html"
RUNNING = "Ollama is running"
"""What clients of Ollama look for."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}


def page_routes(directory: Path = DIRECTORY) -> list[Route]:
    """`/` and a route for each of the page's files, which are those that are there when the server starts."""
    files = sorted(path for path in directory.rglob("*") if path.is_file()) if (directory / INDEX).is_file() else []

    async def root(request: Request) -> Response:
        if files and "text/html" in request.headers.get("accept", ""):
            return FileResponse(directory / INDEX, headers={**_HEADERS, "Vary": "Accept"})
        return PlainTextResponse(RUNNING, headers={"Vary": "Accept"})

    routes = [Route("/", root, methods=["GET"])]
    for path in files:
        name = path.relative_to(directory).as_posix()
        routes.append(Route(f"/{name}", _file(path), methods=["GET"], name=f"page:{name}"))
    return routes


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    async def handler(request: Request) -> Response:
        return FileResponse(path, headers=_HEADERS)

    return handler
