"""Which tolerance each part of a bundle is held to, from what the manifest says of it."""

from __future__ import annotations

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.form import GRAPH, RAW, SHARED
from glmexport.verify.tolerances import FORMS

FLOAT_BITS = 16
"""Matrices of a bundle for MNN have their bits said whether they are integers or not; floats have these or more."""


def _form_of(bits: int) -> str:
    return f"float{bits}" if bits >= FLOAT_BITS else f"int{bits}"


def graph_forms(bundle: Bundle) -> dict[str, str]:
    """Graph name -> its form (`tolerances.FORMS`): its coarsest matrix; an embedding without a graph is there too."""
    forms = {}
    for entry in bundle.graphs:
        bits = [record["bits"] for record in entry["matrices"].values()]
        forms[entry["name"]] = _form_of(min(bits)) if bits else bundle.form.dtype
    embedding = bundle.form.embedding
    if bundle.runtime == names.MNN and bundle.manifest["mnn"]["source"].get("embedding") == SHARED:
        forms[names.EMBEDDING] = f"int{bundle.manifest['mnn']['source'].get('head_bits')}"
    elif embedding.kind == RAW:
        forms[names.EMBEDDING] = max(embedding.dtype, bundle.form.dtype, key=FORMS.index)
    elif embedding.kind != GRAPH:
        forms[names.EMBEDDING] = forms[names.HEAD]
    return forms
