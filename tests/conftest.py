"""Fixtures shared by the tests: the golden checkpoint and what the original code computed on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN_CHECKPOINT = ROOT / "examples" / "chatglm-6b-tiny"
GOLDEN_DATA = ROOT / "tests" / "data" / "chatglm-6b-tiny"


@pytest.fixture(scope="session")
def golden_checkpoint() -> Path:
    return GOLDEN_CHECKPOINT


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What the original v1.1.0 code computes on the golden checkpoint, in float32."""
    with np.load(GOLDEN_DATA / "expected.npz") as file:
        return {name: file[name] for name in file.files}
