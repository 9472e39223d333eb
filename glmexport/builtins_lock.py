"""A lock for whoever replaces Python's builtins for a while, and for whoever must not find them replaced."""

from __future__ import annotations

import threading

BUILTINS_LOCK = threading.RLock()
"""torch.export replaces `min`, `max` and `math.pow` in the whole process while it traces; they give the same numbers to
anybody else, but numba, which compiles what a name stands for, fails on them."""
