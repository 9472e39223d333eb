"""Which tolerance each part of a bundle is held to, from what the manifest says of it."""

from __future__ import annotations

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.form import GRAPH, RAW
from glmexport.verify.tolerances import FORMS


def graph_forms(bundle: Bundle) -> dict[str, str]:
    """Graph name -> its form (`tolerances.FORMS`): its coarsest matrix; an embedding without a graph is there too."""
    forms = {}
    for entry in bundle.graphs:
        bits = [record["bits"] for record in entry["matrices"].values()]
        forms[entry["name"]] = f"int{min(bits)}" if bits else bundle.form.dtype
    embedding = bundle.form.embedding
    if embedding.kind == RAW:
        forms[names.EMBEDDING] = max(embedding.dtype, bundle.form.dtype, key=FORMS.index)
    elif embedding.kind != GRAPH:
        forms[names.EMBEDDING] = forms[names.HEAD]
    return forms
