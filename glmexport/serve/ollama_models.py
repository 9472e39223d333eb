"""Ollama's routes about models: which there are, what they are, created, copied and removed."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from glmexport.bundle import Bundle, open_bundle
from glmexport.errors import GlmExportError
from glmexport.inventory import form_in_words
from glmexport.serve.context import Server, server_of
from glmexport.serve.defaults import options_of
from glmexport.serve.loading import generation_defaults
from glmexport.serve.model_names import full_name, split_name
from glmexport.serve.modelfile import Modelfile, modelfile_from_json, parse_modelfile
from glmexport.serve.models import NoModelError
from glmexport.serve.replies import LOGGER, ApiError, Form, Stream, read_form, to_json
from glmexport.serve.store import Entry

OLLAMA_VERSION = "0.12.11"
"""Whose API this is; user interfaces read three numbers there."""

TEMPLATE = "[Round {n}]\n问：{query}\n答：{answer}"
FOR_EVER = timedelta(days=365 * 100)
NDJSON = "application/x-ndjson"


class NameForm(Form):
    """A body that names a model; old clients say `name`."""

    model: str | None = None
    name: str | None = None

    @property
    def which(self) -> str:
        """The name. Raises ApiError where there is none."""
        if not (self.model or self.name):
            raise ApiError(400, "model: a name is missing.", param="model")
        return self.model or self.name or ""


class ShowForm(NameForm):
    """The body of `/api/show`."""

    verbose: bool | None = None
    system: str | None = None


class CreateForm(NameForm):
    """The body of `/api/create`; `from` is a word of Python's."""

    stream: bool | None = None
    modelfile: str | None = None
    template: str | None = None
    quantize: str | None = None
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    license: str | list[str] | None = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    messages: list[dict[str, Any]] | None = None


class CopyForm(Form):
    """The body of `/api/copy`."""

    source: str
    destination: str


async def tags(request: Request) -> Response:
    """`GET /api/tags`."""
    models = []
    for entry in server_of(request).models.entries():
        try:
            models.append(_listed(entry))
        except GlmExportError as error:  # its bundle is gone; that is no reason not to list the others
            LOGGER.warning("%s is not listed: %s", entry.name, error)
    return JSONResponse({"models": models})


async def ps(request: Request) -> Response:
    """`GET /api/ps`."""
    now = datetime.now(UTC)
    models = []
    for loaded in server_of(request).models.loaded.values():
        rooms = loaded.served.rooms
        expires = now + FOR_EVER if loaded.expires is None else datetime.fromtimestamp(loaded.expires, UTC)
        facts = {
            "size": rooms.graphs + rooms.slots * rooms.kv_per_slot,
            "size_vram": 0,
            "expires_at": _time(expires),
            "context_length": rooms.length,
        }
        models.append({key: value for key, value in _listed(loaded.entry).items() if key != "modified_at"} | facts)
    return JSONResponse({"models": models})


async def show(request: Request) -> Response:
    """`POST /api/show`; `defaults` is this server's own: sampling where a request does not say."""
    form = await read_form(request, ShowForm)
    server = server_of(request)
    entry = server.models.find(form.which)
    bundle, modelfile = open_bundle(entry.bundle), entry.modelfile
    facts = {
        "modelfile": f"# Modelfile by glmexport\n{modelfile.text()}",
        "parameters": "\n".join(modelfile.parameter_lines()),
        "template": TEMPLATE,
        "details": details(bundle),
        "model_info": _model_info(bundle, server),
        "capabilities": ["completion"],
        "modified_at": _time(datetime.fromtimestamp(entry.modified, UTC)),
        "defaults": defaults_of(server, entry),
    }
    extra: dict[str, Any] = {"system": modelfile.system, "license": "\n".join(modelfile.license)}
    extra["messages"] = [{"role": role, "content": text} for role, text in modelfile.messages]
    return JSONResponse(facts | {key: value for key, value in extra.items() if value})


async def create(request: Request) -> Response:
    """`POST /api/create`: over HTTP a model is made from another one, or from a bundle in the model store."""
    form = await read_form(request, CreateForm)
    server = server_of(request)
    split_name(form.which)
    for name in ("template", "quantize", "files", "adapters"):
        if getattr(form, name):
            raise ApiError(
                400, _REFUSED.get(name, f"{name} is not supported; make a bundle with `glmexport`."), param=name
            )
    source = (form.model_extra or {}).get("from")
    modelfile = parse_modelfile(form.modelfile) if form.modelfile else Modelfile("")
    fields = form.model_dump(include={"license", "system", "parameters", "messages"}, exclude_none=True)
    given = modelfile_from_json(fields, "The request")
    whole = given.over(modelfile)
    whole = whole.with_source(source) if isinstance(source, str) and source else whole
    if not whole.source:
        raise ApiError(400, "from: a model or a bundle of the store is missing.", param="from")
    known = {full_name(entry.name): entry for entry in server.models.entries()}
    _refuse_fixed(server, form.which)
    server.store.create(form.which, whole, known, within=server.store.bundles)
    if form.stream is False:
        return JSONResponse({"status": "success"})
    return Stream(_statuses("using existing layers", "writing manifest", "success"), _nothing, NDJSON, 60.0)


async def copy(request: Request) -> Response:
    """`POST /api/copy`."""
    form = await read_form(request, CopyForm)
    server = server_of(request)
    entry = server.models.find(form.source)
    split_name(form.destination)
    _refuse_fixed(server, form.destination)
    server.store.copy(entry, form.destination)
    return Response()


async def delete(request: Request) -> Response:
    """`DELETE /api/delete`: the name; bundles stay where they are."""
    form = await read_form(request, NameForm)
    server = server_of(request)
    entry = server.models.find(form.which)
    _refuse_fixed(server, form.which)
    loaded = server.models.status(entry)
    if not server.store.remove(form.which):
        raise NoModelError(f"model '{form.which:.200}' not found")
    if loaded is not None and loaded.entry.name == entry.name and not loaded.users:
        await server.models.unload(entry)
    return Response()


async def version(request: Request) -> Response:
    """`GET /api/version`."""
    return JSONResponse({"version": OLLAMA_VERSION})


async def unsupported(request: Request) -> Response:
    """What needs a registry of models, or another kind of model."""
    word = request.url.path.removeprefix("/api/").partition("/")[0]
    raise ApiError(501, _UNSUPPORTED.get(word, f"{request.url.path} is not supported here."))


_REFUSED = {
    "template": "template: it is in Go's language, which is not run here; leave it out for the model's own chat "
    "format, or give a Jinja template with `glmexport serve --chat-template FILE`."
}
_UNSUPPORTED = {
    "pull": "There is no registry to pull from: make a bundle with `glmexport split`, name it with `glmexport create`.",
    "push": "There is no registry to push to: copy the bundle's directory.",
    "embed": "The model gives no embeddings, only answers.",
    "embeddings": "The model gives no embeddings, only answers.",
    "blobs": "Files are not taken over HTTP: name a bundle with `glmexport create`.",
}


def defaults_of(server: Server, entry: Entry) -> dict[str, Any]:
    """Sampling and limits where a request does not say."""
    options = options_of(generation_defaults(entry.bundle, server.settings), entry.modelfile.parameters)
    sampling = options.sampling
    positions = open_bundle(entry.bundle).config.max_positions
    context = min(server.settings.max_model_len or positions, options.context or positions)
    return {
        "temperature": 0.0 if sampling.is_greedy else sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "num_predict": options.max_tokens,
        "num_ctx": context,
        "stop": list(options.stop),
    }


def details(bundle: Bundle) -> dict[str, Any]:
    """Facts of a bundle in the words of Ollama's clients."""
    parameters = sum(int(entry["parameters"]) for entry in bundle.graphs)
    return {
        "parent_model": "",
        "format": bundle.runtime,
        "family": "chatglm",
        "families": ["chatglm"],
        "parameter_size": _in_words(parameters),
        "quantization_level": form_in_words(bundle),
    }


def _listed(entry: Entry) -> dict[str, Any]:
    bundle = open_bundle(entry.bundle)
    return {
        "name": full_name(entry.name),
        "model": full_name(entry.name),
        "modified_at": _time(datetime.fromtimestamp(entry.modified or time.time(), UTC)),
        "size": bundle.total_bytes,
        "digest": entry.digest,
        "details": details(bundle),
    }


def _model_info(bundle: Bundle, server: Server) -> dict[str, Any]:
    config = bundle.config
    return {
        "general.architecture": str(bundle.manifest["architecture"]),
        "general.parameter_count": sum(int(entry["parameters"]) for entry in bundle.graphs),
        "chatglm.context_length": server.settings.max_model_len or config.max_positions,
        "chatglm.embedding_length": config.hidden_size,
        "chatglm.block_count": config.num_blocks,
        "chatglm.attention.head_count": config.num_heads,
        "chatglm.feed_forward_length": config.inner_size,
        "chatglm.vocab_size": config.vocab_size,
    }


def _refuse_fixed(server: Server, name: str) -> None:
    if ":".join(split_name(name)) in server.models.fixed:
        raise ApiError(400, f"The model {name} is one that the server was started with; choose another name.")


def _in_words(count: int) -> str:
    power = min(int(math.log10(max(count, 1)) // 3), 3)
    return f"{count / 1000**power:.1f}{('', 'K', 'M', 'B')[power]}"


def _time(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


async def _statuses(*statuses: str) -> AsyncGenerator[bytes, None]:
    for status in statuses:
        yield to_json({"status": status}) + b"\n"


async def _nothing() -> None:
    return None
