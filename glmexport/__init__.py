"""Export GLM-family language models from a PyTorch checkpoint to verified ONNX graphs, and run them.

`split`, `Session` and `generate` are here for programs (`glmexport.api`). Importing this package loads nothing heavy;
asking for one of the three does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmexport.api import Session, generate, split

__version__ = "0.1.0"
__all__ = ["Session", "__version__", "generate", "split"]


def __dir__() -> list[str]:
    return [*__all__]


def __getattr__(name: str) -> object:
    if name not in ("Session", "generate", "split"):
        raise AttributeError(f"module 'glmexport' has no attribute {name!r}")
    from glmexport import api

    return getattr(api, name)
