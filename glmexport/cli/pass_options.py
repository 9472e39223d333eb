"""The options of the passes, which `slim`, `embed`, `quantize` and `split` share, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glmexport.affine import METHODS, Affine
from glmexport.errors import RecipeError
from glmexport.form import (
    ACTIVATIONS,
    FLOAT16,
    GRAPH,
    NEAREST,
    RAW,
    RAW_DTYPES,
    ROUNDINGS,
    SHARED,
    EmbeddingForm,
    QuantizationForm,
)
from glmexport.recipe import DEFAULT_GROUP_SIZE, DEFAULT_METHOD, FORMATS, KEEP, Recipe, read_recipe, uniform_recipe

if TYPE_CHECKING:
    from glmexport.passes import Pass
    from glmexport.passes.quantize_weights import QuantizePass
    from glmexport.passes.raw_embedding import EmbedPass
    from glmexport.passes.slim_vocab import SlimPass

EMBEDDINGS = {row.word: dtype for dtype, row in RAW_DTYPES.items()}
"""Word on the command line -> dtype of a raw embedding file."""

QUANTIZE_WORDS = {"int8": "8", "int4": "4"}
_BY_RECIPE = {"group-size": "group_size", "asymmetric": "asymmetric", "lm-bits": "lm_bits", "method": "method"}
FILE = click.Path(path_type=Path, dir_okay=False)


def slim_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--keep` and `--corpus`."""
    keep = click.option("--keep", type=FILE, metavar="FILE", help="Keep these ids of the checkpoint only, one a line.")
    corpus = click.option(
        "--corpus",
        type=FILE,
        multiple=True,
        metavar="FILE",
        help="Keep what these texts use, besides special, byte, blank and single-character pieces; may be repeated.",
    )
    return keep(corpus(function))


def rounding_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--rounding`."""
    return click.option(
        "--rounding",
        type=click.Choice(ROUNDINGS),
        help=f"How bf16 rows are rounded; truncate gives the upper half of each float32.  [default: {NEAREST}]",
    )(function)


def quantize_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All that says how matrices are quantized, but for the number of bits."""
    options = (
        click.option(
            "--group-size",
            metavar="32|64|128|channel",
            help=f"Weights that share a scale; channel: all inputs of an output.  [default: {DEFAULT_GROUP_SIZE}]",
        ),
        click.option("--asymmetric", is_flag=True, default=None, help="Store a zero point for each group too."),
        click.option("--lm-bits", metavar="8|4|none", help="Bits of the LM head; none keeps float32.  [default: 8]"),
        click.option(
            "--format",
            "layout",
            type=click.Choice(FORMATS),
            help="matmulnbits: onnxruntime's operator, quick to load; qdq: the standard's, for any runtime.  "
            f"[default: {FORMATS[0]}]",
        ),
        click.option(
            "--method",
            metavar="|".join(METHODS),
            help="rtn: plain rounding; mse: the scale of least squared error; hqq: half-quadratic.  "
            f"[default: {DEFAULT_METHOD}]",
        ),
        click.option(
            "--activations",
            type=click.Choice([*ACTIVATIONS]),
            help="What products round activations to.  [default: int8 for 4-bit matrices, int16 for 8-bit ones]",
        ),
        click.option("--recipe", type=FILE, metavar="FILE", help="TOML rules instead, for each matrix its own way."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def embed_pass(word: str, rounding: str | None) -> EmbedPass:
    """The pass for `--embedding` or `--dtype`. Raises RecipeError for a rounding that the dtype does not have."""
    from glmexport.passes.raw_embedding import EmbedPass

    if word == SHARED:
        if rounding is not None:
            raise RecipeError("Shared rows are the LM head's own, which are not rounded again; leave --rounding out.")
        return EmbedPass(EmbeddingForm(SHARED))
    return EmbedPass(EmbeddingForm(RAW, EMBEDDINGS[word], rounding or NEAREST))


def slim_pass(keep: Path | None, corpus: tuple[Path, ...]) -> SlimPass:
    """The pass for `--keep` and `--corpus`."""
    from glmexport.passes.slim_vocab import SlimPass

    return SlimPass(keep, tuple(corpus))


def quantize_pass(bits: str | None, options: Mapping[str, Any], num_blocks: int) -> QuantizePass:
    """The pass for `--bits` or `--quantize` and the options of `quantize_options`.

    Raises RecipeError where they contradict each other or name what there is not.
    """
    from glmexport.passes.quantize_weights import QuantizePass

    recipe = options["recipe"]
    if recipe is not None:
        given = [word for word, key in _BY_RECIPE.items() if options[key] is not None] + ["bits"] * (bits is not None)
        if given:
            raise RecipeError(f"A recipe says everything about every matrix; leave out --{given[0]} or --recipe.")
        return QuantizePass(read_recipe(recipe), quantization_form(options))
    if bits is None:
        raise RecipeError("How many bits? Give --bits 8 or 4, a --recipe, or --auto with --target-size.")
    return QuantizePass(_uniform(bits, options, num_blocks), quantization_form(options))


def passes_of_options(options: Mapping[str, Any], num_blocks: int) -> tuple[Pass, ...]:
    """The passes that `split` is asked for, in their order (see `glmexport.passes`). Raises RecipeError."""
    passes: list[Pass] = []
    if options["kv_cache_dtype"] == FLOAT16:
        from glmexport.passes.half_cache import HalfCachePass

        passes.append(HalfCachePass())
    if options["slim"] or options["keep"] or options["corpus"]:
        passes.append(slim_pass(options["keep"], options["corpus"]))
    embedding = options["embedding"]
    if embedding in (GRAPH, SHARED) and options["rounding"] is not None:
        raise RecipeError(f"--rounding is for a raw embedding, and --embedding is {embedding}; leave one of them out.")
    if embedding not in (GRAPH, SHARED):
        passes.append(embed_pass(embedding, options["rounding"]))
    word = options["quantize"]
    if word is not None and word not in QUANTIZE_WORDS:
        raise RecipeError(f"--quantize is {word!r:.40}, expected {' or '.join(QUANTIZE_WORDS)}.")
    if word is not None or options["recipe"] is not None:
        passes.append(quantize_pass(word and QUANTIZE_WORDS[word], options, num_blocks))
    else:
        words = {**_BY_RECIPE, "format": "layout", "activations": "activations"}
        useless = [name for name, key in words.items() if options[key] is not None]
        if useless:
            raise RecipeError(f"--{useless[0]} says how to quantize; add --quantize int8 or int4, or leave it out.")
    if embedding == SHARED:
        passes.append(embed_pass(SHARED, options["rounding"]))
    if options["weights"] == FLOAT16:
        from glmexport.passes.half_weights import HalfWeightsPass

        passes.append(HalfWeightsPass())
    return tuple(passes)


def quantization_form(options: Mapping[str, Any]) -> QuantizationForm:
    """The form for `--format` and `--activations`. Raises RecipeError for float32 activations in qdq."""
    activations = options["activations"]
    layout = options["layout"] or FORMATS[0]
    if activations is None:
        return QuantizationForm(layout)
    if layout == "qdq" and activations == "float32":
        raise RecipeError(
            "A qdq graph cannot say that activations stay float32: onnxruntime has a session option for it, "
            "session.qdq_matmulnbits_accuracy_level=1; leave --activations out."
        )
    return QuantizationForm(layout, activations, activations)


def affine_of_options(bits: str | int, options: Mapping[str, Any]) -> Affine:
    """How to quantize to so many bits. Raises GlmExportError for what there is not."""
    size = options["group_size"]
    return Affine(
        _number(bits),
        DEFAULT_GROUP_SIZE if size is None else _number(size),
        not options["asymmetric"],
        options["method"] or DEFAULT_METHOD,
    )


def _uniform(bits: str, options: Mapping[str, Any], num_blocks: int) -> Recipe:
    head = "8" if options["lm_bits"] is None else options["lm_bits"]
    blocks = affine_of_options(bits, options)
    return uniform_recipe(blocks, None if head == KEEP else affine_of_options(head, options), num_blocks)


def _number(word: str | int) -> Any:
    """A number where it is one; whoever takes it says what was expected."""
    return int(word) if isinstance(word, str) and word.isascii() and word.isdecimal() else word
