"""Versions of the tools that shape a graph's bytes."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

EXPORT_TOOLS = ("torch", "onnx", "onnxscript", "onnxsim")
"""Another version of one of these may give another graph of the same model."""


def tool_versions() -> dict[str, str]:
    """Tool -> installed version, for the manifest."""
    tools = (*EXPORT_TOOLS, "transformers", "onnxruntime", "numpy")
    return {"python": platform.python_version(), **{tool: _version(tool) for tool in tools}}


@cache
def _version(tool: str) -> str:
    try:
        return version(tool)
    except PackageNotFoundError:
        return "not installed as a package"
