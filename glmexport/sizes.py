"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

from glmexport.errors import GlmExportError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as `3.2GB`, `800 MB`, `3GiB` or `1000000`. Raises GlmExportError."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?I?B?)\s*", text.upper())
    if match is None or match[2] not in _UNITS:
        raise GlmExportError(f"The size {text!r:.40} is none; expected MB, GB, MiB or GiB, as in 3.2GB.")
    return int(float(match[1]) * _UNITS[match[2]])


def size_in_words(count: float) -> str:
    """A number of bytes for people, in powers of 1000 as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
