"""Errors a person or a file can cause.

Each message is one sentence that says what was found, what was expected and what to do; the command line prints it and
ends with status 2. Anything else that escapes is a bug in glmexport and keeps its traceback.
"""

_NO_MEMORY = ("bad_alloc", "not enough memory", "allocate memory", "Failed to allocate")
_MAX_REASON = 300


class GlmExportError(Exception):
    """Base of every error that glmexport raises on purpose."""


class CheckpointError(GlmExportError):
    """The source directory, its config or its weight files are not what a supported checkpoint has."""


class BundleError(GlmExportError):
    """A bundle is missing, incomplete, changed since it was written, or in the way of a new one."""


class ExportError(GlmExportError):
    """A graph could not be made, or what was made breaks a rule of the bundle."""


class RecipeError(GlmExportError):
    """How to quantize, slim or store is not said in a way that can be done."""


def reason_of(error: BaseException) -> str:
    """What a library says, as a part of a sentence: its first line, printable, not too long, without a full stop.

    Raises MemoryError where it says that memory ran out, for which few libraries have a class of their own.
    """
    if means_no_memory(error):
        raise MemoryError from error
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = line if len(line) <= _MAX_REASON else f"{line[: _MAX_REASON - 1]}…"
    return printable(line).rstrip(" .:")


def means_no_memory(error: BaseException) -> bool:
    """Whether an error is about memory that could not be had, whoever raised it."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def printable(text: str) -> str:
    """A text with everything that a terminal might obey written out, but for ends of lines."""
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)
