"""Compiling a kernel once for every process, where some directory takes the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any], signature: str) -> Callable[..., Any]:
    """The function, compiled for one signature, or read from the cache of an earlier process.

    It runs without the interpreter's lock; divisions by zero give what IEEE 754 says.
    """
    try:
        return _njit(function, signature, cache=True)
    except (RuntimeError, OSError):  # no cache directory, the package's nor the user's, takes files
        return _njit(function, signature, cache=False)


def _njit(function: Callable[..., Any], signature: str, *, cache: bool) -> Callable[..., Any]:
    kernel: Callable[..., Any] = numba.njit([signature], cache=cache, nogil=True, error_model="numpy")(function)
    return kernel
