"""A running server, asked with the standard library alone: for the commands that list, stop and remove models."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from glmexport.errors import GlmExportError, printable
from glmexport.serve.settings import DEFAULT_HOST, DEFAULT_PORT

HOST_VARIABLES = ("GLMEXPORT_HOST", "OLLAMA_HOST")
KEY_VARIABLE = "GLMEXPORT_API_KEY"
TIMEOUT = 60.0
MAX_BYTES = 64 << 20


class Client:
    """One server's address and key. Raises GlmExportError for what it refuses."""

    def __init__(self, address: str, key: str | None = None) -> None:
        self.address, self._key = address, key
        # a proxy of the environment's is for the world outside
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def is_ours(self) -> bool:
        """Whether a glmexport server answers there, and not another one that uses the same port, or nobody."""
        try:
            return self.ask("GET", "/version").get("server") == "glmexport"
        except GlmExportError as error:
            if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code == 401:
                raise
            return False

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that a route gives; empty where it gives nothing."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, method=method)
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=TIMEOUT) as response:
                text = response.read(MAX_BYTES)
        except urllib.error.HTTPError as error:
            raise GlmExportError(f"The server at {self.address} answers: {_sentence(error)}") from error
        except (OSError, ValueError) as error:
            raise GlmExportError(f"No server answers at {self.address}; start one with `glmexport serve`.") from error
        try:
            document = json.loads(text) if text else {}
        except ValueError as error:
            raise GlmExportError(f"What answers at {self.address} is no glmexport server.") from error
        return document if isinstance(document, dict) else {}


def client_of(host: str | None, key: str | None) -> Client:
    """The server that is meant: `host` as a host, host:port or URL, else the environment's, else the default one."""
    host = host or next((os.environ[name] for name in HOST_VARIABLES if os.environ.get(name)), None) or DEFAULT_HOST
    scheme, separator, rest = host.rpartition("://")
    place = rest.rstrip("/")
    if ":" not in place.rpartition("]")[2]:
        place = f"{place}:{DEFAULT_PORT}"
    place = place.replace("0.0.0.0", DEFAULT_HOST, 1) if place.startswith("0.0.0.0") else place
    return Client(f"{scheme if separator else 'http'}://{place}", key or os.environ.get(KEY_VARIABLE))


def _sentence(error: urllib.error.HTTPError) -> str:
    try:
        told = json.loads(error.read(MAX_BYTES)).get("error")
        text = told.get("message") if isinstance(told, dict) else told
    except (ValueError, AttributeError, OSError):
        text = None
    sentence = printable(str(text or f"{error.code} {error.reason}"))
    return sentence if sentence.endswith(".") else f"{sentence}."
