"""Which tolerance each part of a bundle is held to, from what the manifest says of it."""

from __future__ import annotations

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.form import GRAPH, RAW


def graph_forms(bundle: Bundle) -> dict[str, str]:
    """Graph name -> its form (`tolerances.FORMS`): its coarsest matrix; an embedding without a graph is there too."""
    forms = {}
    for entry in bundle.graphs:
        bits = [record["bits"] for record in entry["matrices"].values()]
        forms[entry["name"]] = f"int{min(bits)}" if bits else "float32"
    embedding = bundle.form.embedding
    if embedding.kind == RAW:
        forms[names.EMBEDDING] = embedding.dtype
    elif embedding.kind != GRAPH:
        forms[names.EMBEDDING] = forms[names.HEAD]
    return forms


def form_in_words(bundle: Bundle) -> str:
    """`float32`, or what the passes made: `slim 1856, bfloat16 embedding, int4 and int8 matmulnbits`."""
    form, words = bundle.form, []
    if form.slim is not None:
        words.append(f"slim {bundle.config.vocab_size} of {form.slim.vocabulary.full_size} rows")
    if form.embedding.kind == RAW:
        words.append(f"{form.embedding.dtype} embedding")
    elif form.embedding.kind != GRAPH:
        words.append("shared embedding")
    if form.quantization is not None:
        bits = {record["bits"] for entry in bundle.graphs for record in entry["matrices"].values()}
        words.append(f"{' and '.join(f'int{count}' for count in sorted(bits))} {form.quantization.format}")
    return ", ".join(words) or "float32"
