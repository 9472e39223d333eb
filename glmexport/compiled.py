"""Kernels: functions compiled for one signature, once for every process where some directory takes the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

from glmexport.builtins_lock import BUILTINS_LOCK


class Kernel:
    """A function, compiled when it is called first, or read from the cache of an earlier process; by any thread.

    It runs without the interpreter's lock; divisions by zero give what IEEE 754 says.
    """

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self._function, self._signature = function, signature
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """What the function gives for arguments of the signature's types."""
        if self._compiled is None:
            with BUILTINS_LOCK:  # and so that of several threads one compiles, and the others wait for it
                self._compiled = self._compiled or self._compile()
        return self._compiled(*arguments)

    def _compile(self) -> Callable[..., Any]:
        try:
            return self._njit(cache=True)
        except (RuntimeError, OSError):  # no cache directory, the package's nor the user's, takes files
            return self._njit(cache=False)

    def _njit(self, *, cache: bool) -> Callable[..., Any]:
        compile_ = numba.njit([self._signature], cache=cache, nogil=True, error_model="numpy")
        kernel: Callable[..., Any] = compile_(self._function)
        return kernel
