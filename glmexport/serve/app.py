"""The application: every route, what guards them, and what happens when it starts and stops."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from glmexport.errors import GlmExportError
from glmexport.serve import ollama, ollama_models, openai, operations
from glmexport.serve.context import Server
from glmexport.serve.guard import Guard
from glmexport.serve.loading import load
from glmexport.serve.metrics import EngineFigures, Metrics
from glmexport.serve.models import Loader, Models
from glmexport.serve.prompts import jinja_template
from glmexport.serve.replies import ApiError, error_response
from glmexport.serve.settings import Settings
from glmexport.serve.store import Entry, Store
from glmexport.serve.web_page import page_routes

ROUTES = (
    ("/api/version", ollama_models.version, "GET"),
    ("/api/tags", ollama_models.tags, "GET"),
    ("/api/ps", ollama_models.ps, "GET"),
    ("/api/show", ollama_models.show, "POST"),
    ("/api/create", ollama_models.create, "POST"),
    ("/api/copy", ollama_models.copy, "POST"),
    ("/api/delete", ollama_models.delete, "DELETE"),
    ("/api/generate", ollama.generate, "POST"),
    ("/api/chat", ollama.chat, "POST"),
    ("/api/pull", ollama_models.unsupported, "POST"),
    ("/api/push", ollama_models.unsupported, "POST"),
    ("/api/embed", ollama_models.unsupported, "POST"),
    ("/api/embeddings", ollama_models.unsupported, "POST"),
    ("/api/blobs/{digest}", ollama_models.unsupported, "POST"),
    ("/api/blobs/{digest}", ollama_models.unsupported, "HEAD"),
    ("/v1/models", openai.models, "GET"),
    ("/v1/models/{name:path}", openai.model, "GET"),
    ("/v1/chat/completions", openai.chat, "POST"),
    ("/v1/completions", openai.completions, "POST"),
    ("/health", operations.health, "GET"),
    ("/metrics", operations.metrics, "GET"),
    ("/version", operations.version, "GET"),
    ("/tokenize", operations.tokenize, "POST"),
    ("/detokenize", operations.detokenize, "POST"),
)
"""(path, handler, method)."""


def make_app(
    settings: Settings,
    store: Store,
    fixed: Mapping[str, Entry],
    *,
    preload: Sequence[Entry] = (),
    loader: Loader = load,
) -> Starlette:
    """The application of one server. fixed: models of the command line, by name. preload: those to load at the start.

    Raises GlmExportError for a chat template that is none.
    """
    template = jinja_template(settings.chat_template) if settings.chat_template else None
    metrics = Metrics(lambda: _figures(models))
    models = Models(settings, store, fixed, watch=metrics.watch, loader=loader)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            await models.preload(preload)
        except GlmExportError as error:
            app.state.failure = error  # uvicorn would show a traceback and no more
            raise
        yield
        await models.close()

    routes = [Route(path, handler, methods=[method]) for path, handler, method in ROUTES]
    app = Starlette(
        routes=[*routes, *page_routes()],
        lifespan=lifespan,
        exception_handlers={
            HTTPException: _on_http_error,
            ApiError: _on_error,
            GlmExportError: _on_error,
            Exception: _on_error,
        },
    )
    app.router.redirect_slashes = False  # a redirect would take a body elsewhere
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    app.state.settings, app.state.failure = settings, None
    app.state.server = Server(settings, store, models, metrics, template)
    return app


def _figures(models: Models) -> Iterable[EngineFigures]:
    for loaded in [*models.loaded.values()]:
        engine = loaded.served.engine
        runner = engine.runner
        yield loaded.entry.name, engine.running, engine.waiting, runner.slots, runner.kv_bytes_per_slot


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(request.url.path, error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    words = {
        404: f"There is no {request.url.path[:200]} here.",
        405: f"{request.method} is not for {request.url.path[:200]}.",
    }
    told = ApiError(error.status_code, words.get(error.status_code, error.detail), headers=dict(error.headers or {}))
    return error_response(request.url.path, told)
