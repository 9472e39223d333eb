"""What the plots share: a figure of two parts, drawn without a screen, as a PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glmexport.errors import GlmExportError


def demand_matplotlib() -> None:
    """Raise GlmExportError where there is no matplotlib, before anything long is begun."""
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise GlmExportError(
            "--plot needs matplotlib, which is not installed: pip install 'glmexport[plot]'."
        ) from error


def two_parts() -> tuple[Any, Any, Any]:
    """(figure, axes of the wider part on the left, axes of the other)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    return figure, left, right


def save_png(figure: Any, path: Path) -> None:
    """Write the file. Raises GlmExportError where it cannot be written."""
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise GlmExportError(f"{path} could not be written ({error.strerror}); choose another file.") from error
