"""The ways to run a bundle to verify it: one for onnxruntime, for MNN normal mode, and low mode where made for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.mnn.module import LOW, NORMAL
from glmexport.session import Session
from glmexport.verify.forms import FLOAT_BITS
from glmexport.verify.runs import Run
from glmexport.verify.tolerances import (
    CHAIN_BUDGETS,
    MNN_CHAIN_BUDGETS,
    MNN_TOLERANCES,
    TOLERANCES,
    ChainBudget,
    Tolerance,
)

MEMORY_LIMIT = 1 << 28
"""Bytes of graphs to keep open: small models stay, of a large one only the graph that runs, because the reference's own
block is in memory beside it."""


@dataclass(frozen=True)
class Mode:
    """One way to run a bundle, and what it is held to.

    label: after the name of a case. exact: whether products are float32 ones of the stored weights, so that they can be
    held to these as well.
    """

    session: Session
    label: str
    tolerances: Mapping[str, Tolerance]
    budgets: Mapping[str, ChainBudget]
    exact: bool = False


@dataclass
class ModeRun(Run):
    """A case on its way through the graphs in one mode."""

    mode: Mode = field(kw_only=True)

    @property
    def name(self) -> str:
        """Of the case, and how it was run."""
        return f"{self.case.name}{self.mode.label}"


def modes_of(bundle: Bundle) -> Iterator[Mode]:
    """Each with a session of its own, which the caller closes. Raises BundleError where the runtime is missing."""
    if bundle.runtime == names.ONNX:
        yield Mode(Session(bundle, memory_limit=MEMORY_LIMIT, read_ahead=0), "", TOLERANCES, CHAIN_BUDGETS)
        return
    integers = any(record["bits"] < FLOAT_BITS for entry in bundle.graphs for record in entry["matrices"].values())
    low = integers and bundle.manifest["mnn"]["memory"] == LOW  # without integers, low mode is normal mode
    for memory in (NORMAL, LOW) if low else (NORMAL,):
        session = Session(bundle, memory_limit=MEMORY_LIMIT, read_ahead=0, mnn_memory=memory)
        tolerances, budgets = MNN_TOLERANCES[memory], MNN_CHAIN_BUDGETS[memory]
        yield Mode(session, f", {memory}", tolerances, budgets, exact=memory == NORMAL)
