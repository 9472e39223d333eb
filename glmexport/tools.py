"""Versions of the tools that shape a graph's bytes."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

EXPORT_TOOLS = ("torch", "onnx", "onnxscript", "onnxsim")
"""Another version of one of these may give another graph of the same model."""


def tool_versions() -> dict[str, str]:
    """Tool -> installed version, for the manifest."""
    versions = {"python": platform.python_version()}
    for tool in (*EXPORT_TOOLS, "transformers", "onnxruntime", "numpy"):
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:
            versions[tool] = "not installed as a package"
    return versions
