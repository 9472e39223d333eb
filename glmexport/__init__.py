"""Export GLM-family language models from a PyTorch checkpoint to verified ONNX graphs, and run them.

`split`, `Session` and `generate` are here for programs (`glmexport.api`). Importing this package loads nothing heavy;
asking for one of the three does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmexport.api import Session, generate, split

# onnxruntime reports what it runs to its makers from 1.29 on, and reads this once, when it is imported: whatever a user
# has decided stays
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["Session", "__version__", "generate", "split"]


def __dir__() -> list[str]:
    return [*__all__]


def __getattr__(name: str) -> object:
    if name not in ("Session", "generate", "split"):
        raise AttributeError(f"module 'glmexport' has no attribute {name!r}")
    from glmexport import api

    return getattr(api, name)
