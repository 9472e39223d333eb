"""Choose int8 for the matrices where it helps most, int4 for the others, under a size for the whole bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from glmexport.affine import Affine
from glmexport.draft import GRAPH_FILE_BYTES, BundleDraft, ignore_notice
from glmexport.errors import RecipeError
from glmexport.form import QuantizationForm
from glmexport.passes.quantize_weights import QuantizePass, demand_quantizable, matrices_of
from glmexport.quantized import QuantizedMatrix
from glmexport.recipe import Recipe, Rule
from glmexport.tensors import matrix_shape


@dataclass(frozen=True)
class _Choice:
    """A matrix, the squared relative error that int8 would save it, and the bytes that it would cost."""

    name: str
    block_id: int | None
    gain: float
    cost: int


def choose_recipe(
    draft: BundleDraft,
    target_bytes: int,
    int4: Affine,
    int8: Affine,
    form: QuantizationForm,
    advance: Callable[[str, int], None],
) -> Recipe:
    """The recipe whose bundle takes at most `target_bytes`, all files counted.

    Every matrix is quantized to 4 bits once, to see what that does to it. The LM head is the first to get 8 bits, since
    its error reaches the logits undiluted; then the others, most squared relative error a byte first. advance: takes
    (matrix, bytes of float32 read). Raises RecipeError where int4 everywhere is too large already.
    """
    demand_quantizable(draft)
    choices = []
    for block_id, matrix in matrices_of(draft):
        outputs, inputs = matrix_shape(matrix)
        cost = int8.sizes(outputs, inputs).total - int4.sizes(outputs, inputs).total
        error = QuantizedMatrix(matrix, int4, "matmulnbits").measure().relative_error
        choices.append(_Choice(matrix.name, block_id, error**2, cost))
        advance(f"measure {matrix.name}", 4 * outputs * inputs)
    graph_bytes = _graph_bytes(draft, int4, int8, form)
    choices.sort(key=lambda choice: (choice.block_id is not None, -choice.gain / choice.cost))
    chosen: list[_Choice] = []
    smallest = _size(draft, _recipe([], int4, int8), form, graph_bytes)
    if smallest > target_bytes:
        raise RecipeError(
            f"With int4 everywhere the bundle takes {smallest:,} bytes, more than the {target_bytes:,} asked for; "
            f"raise --target-size, or use a larger --group-size."
        )
    for choice in choices:
        if _size(draft, _recipe([*chosen, choice], int4, int8), form, graph_bytes) <= target_bytes:
            chosen.append(choice)
    return _recipe(chosen, int4, int8)


def _recipe(chosen: list[_Choice], int4: Affine, int8: Affine) -> Recipe:
    """Rules for the chosen matrices, one for each kind of matrix, then one for all others."""
    blocks: dict[str, set[int]] = {}
    rules = []
    for choice in chosen:
        if choice.block_id is None:
            rules.append(Rule(choice.name, int8))
        else:
            kind = choice.name.replace(f".{choice.block_id}.", ".*.", 1)
            blocks.setdefault(kind, set()).add(choice.block_id)
    rules += [Rule(kind, int8, frozenset(ids)) for kind, ids in sorted(blocks.items())]
    return Recipe((*rules, Rule("*", int4)))


GraphBytes = Mapping[str, tuple[int, float]]


def _graph_bytes(draft: BundleDraft, int4: Affine, int8: Affine, form: QuantizationForm) -> GraphBytes:
    """Graph -> (size of its file with int4 matrices alone, what each int8 one adds)."""
    made = [QuantizePass(Recipe((Rule("*", affine),)), form).apply(draft, ignore_notice) for affine in (int4, int8)]
    sizes = {}
    for four, eight in zip(made[0].graphs, made[1].graphs, strict=True):
        low, high = four.graph_bytes(), eight.graph_bytes()
        sizes[four.name] = (low, (high - low) / max(len(four.matrices), 1))
    return sizes


def _size(draft: BundleDraft, recipe: Recipe, form: QuantizationForm, graph_bytes: GraphBytes) -> int:
    """Bytes of the bundle: its graph files measured, the rest exact but for the manifest."""
    changed = QuantizePass(recipe, form).apply(draft, ignore_notice)
    total = sum(changed.sizes().values())
    for graph in changed.graphs:
        low, more = graph_bytes[graph.name]
        wide = sum(record()["bits"] == 8 for record in graph.matrices.values())
        total += int(low + more * wide) - GRAPH_FILE_BYTES
    return total
