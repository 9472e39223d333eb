"""How long a model stays in memory, as Ollama's users write it."""

from __future__ import annotations

import math
import re

from glmexport.errors import GlmExportError
from glmexport.untrusted import quoted

FOREVER = math.inf
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d{1,12}(?:\.\d{0,9})?|\.\d{1,9})(ns|us|µs|ms|s|m|h)")
_NUMBER = re.compile(r"-?\d{1,12}(?:\.\d{0,9})?")
MAX_SECONDS = 1e9


def parse_duration(value: float | str) -> float:
    """Seconds of a number, or of a text such as `5m`, `1h30m` or `-1`; what is negative, or too long, is for ever.

    Raises GlmExportError.
    """
    seconds = value if isinstance(value, int | float) else _of_text(value.strip())
    if isinstance(value, bool) or math.isnan(seconds):
        raise GlmExportError(f"{value!r:.40} is no duration; expected seconds, or a text such as 5m.")
    return FOREVER if seconds < 0 or seconds > MAX_SECONDS else float(seconds)


def _of_text(text: str) -> float:
    if _NUMBER.fullmatch(text):
        return float(text)
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text)
    parts = _PART.findall(rest)
    if not parts or "".join(number + unit for number, unit in parts) != rest:
        raise GlmExportError(f"{quoted(text)} is no duration; expected seconds, or a text such as 5m or 1h30m.")
    return sign * sum(float(number) * _UNITS[unit] for number, unit in parts)
