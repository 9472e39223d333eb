"""Names of models: `NAME` or `NAME:TAG`, as people type them and as they become files."""

from __future__ import annotations

import re

from glmexport.errors import GlmExportError
from glmexport.untrusted import quoted

LATEST = "latest"
MAX_LENGTH = 120
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"({_PART})(?::({_PART}))?")


def split_name(name: str) -> tuple[str, str]:
    """(name, tag) of `mario` or `mario:v2`; the tag is `latest` where none is given. Raises GlmExportError."""
    match = _NAME.fullmatch(name) if len(name) <= MAX_LENGTH else None
    if match is None:
        raise GlmExportError(
            f"{quoted(name)} is no name for a model; expected letters, digits, `.`, `_` and `-`, a letter or digit "
            "first, and a tag of the same after `:` if any."
        )
    return match[1], match[2] or LATEST


def full_name(name: str) -> str:
    """`mario` -> `mario:latest`; what has a tag stays, and so does what is no name at all."""
    last = name.rpartition("/")[2]
    return name if ":" in last else f"{name}:{LATEST}"


def name_of_directory(directory_name: str) -> str:
    """A name made of a directory's: what a name cannot hold becomes `-`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", directory_name).lstrip("._-")[:MAX_LENGTH]
    return name or "model"
