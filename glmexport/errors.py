"""Errors a person or a file can cause.

Each message is one sentence that says what was found, what was expected and what to do; the command line prints it and
ends with status 2. Anything else that escapes is a bug in glmexport and keeps its traceback.
"""


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
