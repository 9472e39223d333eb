"""The ways to run a bundle to verify it: each flavor for onnxruntime; normal and low mode for MNN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.mnn.module import LOW, NORMAL
from glmexport.session import Session
from glmexport.verify.forms import FLOAT_BITS
from glmexport.verify.runs import Run
from glmexport.verify.tolerances import (
    CHAIN_BUDGETS,
    FORMS,
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
    held to these as well. flavor: of the graphs. block_form: of blocks, where that is coarser than their weights' own.
    """

    session: Session
    label: str
    tolerances: Mapping[str, Tolerance]
    budgets: Mapping[str, ChainBudget]
    exact: bool = False
    flavor: str = names.PORTABLE
    block_form: str = FORMS[0]

    def form_of(self, graph: str, form: str) -> str:
        """The form that a graph is held to whose weights have the form `form`."""
        is_block = names.graph_kind(graph) == names.KIND_BLOCK
        return max(self.block_form, form, key=FORMS.index) if is_block else form

    def comparable(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which places [seq, batch] of hidden states are held to the reference. mask: bool [batch, 1, seq, total].

        All, but for padding that sees nothing where attention over nothing is 0 instead of the mean of everything.
        """
        blind = np.asarray(mask[:, 0].all(-1)).T
        return ~blind if self.flavor == names.ORT else np.ones_like(blind)


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
        for flavor in bundle.flavors:
            session = Session(bundle, memory_limit=MEMORY_LIMIT, read_ahead=0, flavor=flavor)
            label = "" if flavor == names.PORTABLE else f", {flavor}"
            cache = bundle.form.cache_dtype(flavor)
            yield Mode(session, label, TOLERANCES, CHAIN_BUDGETS, flavor=flavor, block_form=cache)
        return
    integers = any(record["bits"] < FLOAT_BITS for entry in bundle.graphs for record in entry["matrices"].values())
    low = integers and bundle.manifest["mnn"]["memory"] == LOW  # without integers, low mode is normal mode
    for memory in (NORMAL, LOW) if low else (NORMAL,):
        session = Session(bundle, memory_limit=MEMORY_LIMIT, read_ahead=0, mnn_memory=memory)
        tolerances, budgets = MNN_TOLERANCES[memory], MNN_CHAIN_BUDGETS[memory]
        yield Mode(session, f", {memory}", tolerances, budgets, exact=memory == NORMAL)
