"""The same graphs at a higher opset: traced anew from the model's sizes, their weights where they are."""

from __future__ import annotations

import dataclasses

from glmexport import names
from glmexport.checkpoint_draft import model_of_part
from glmexport.draft import BundleDraft, GraphDraft
from glmexport.graphs import patched_parts
from glmexport.patch import patch_named


def lifted(draft: BundleDraft, opset: int) -> BundleDraft:
    """The draft with every portable graph at `opset`; data files stay links.

    Raises BundleError for an unknown architecture.
    """
    patch = patch_named(draft.facts["architecture"])
    parts = {part.name: part for part in patched_parts(patch, draft.config, draft.argmax, draft.form.dtype)}

    def lift(graph: GraphDraft) -> GraphDraft:
        if names.PORTABLE not in graph.models:
            return graph
        made = model_of_part(patch, draft.config, parts[graph.name], draft.argmax, opset, draft.form.dtype)
        return graph.with_model(names.PORTABLE, made)

    return dataclasses.replace(draft, graphs=tuple(map(lift, draft.graphs)), facts={**draft.facts, "opset": opset})
