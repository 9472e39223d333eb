"""What `import glmexport` offers to programs: `split`, `Session` and `generate`, with plain arguments.

import glmexport

glmexport.split("chatglm-6b/", "int4/", slim=True, embedding="bf16", quantize="int4")
with glmexport.Session("int4/", memory_limit=2_000_000_000) as session:
    for piece in glmexport.generate(session, "你好"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glmexport.affine import Affine
from glmexport.bundle import Bundle, open_bundle
from glmexport.chat import Round, chat_prompt
from glmexport.errors import GlmExportError, RecipeError
from glmexport.form import FLOAT32, GRAPH, RAW, RAW_DTYPES, SHARED, WEIGHTS, EmbeddingForm, QuantizationForm
from glmexport.generation import Generation
from glmexport.generation import generate as generate_with
from glmexport.interface import DEFAULT_OPSET, DTYPES
from glmexport.names import PORTABLE
from glmexport.recipe import DEFAULT_GROUP_SIZE, DEFAULT_METHOD, FORMATS, uniform_recipe
from glmexport.sampling import Sampling
from glmexport.session import Session

if TYPE_CHECKING:
    from glmexport.passes import Pass

__all__ = ["Session", "generate", "split"]

_BITS = {"int8": 8, "int4": 4}
_HEAD_BITS = 8


def split(
    checkpoint: Path | str,
    output: Path | str,
    *,
    revision: str | None = None,
    opset: int = DEFAULT_OPSET,
    slim: bool = False,
    embedding: str = "graph",
    quantize: str | None = None,
    group_size: int | str = DEFAULT_GROUP_SIZE,
    weights: str = FLOAT32,
    dtype: str = FLOAT32,
    flavor: str = PORTABLE,
    kv_cache_dtype: str = FLOAT32,
    force: bool = False,
    notice: Callable[[str], None] = lambda sentence: None,
) -> Bundle:
    """Export a checkpoint directory or hub id to a bundle, as `glmexport split` does; needs torch.

    slim: drop the image-token rows. embedding: `graph`, `bf16`, `float16`, `float32` or `shared` (with the quantized
    head). quantize: None, `int8` or `int4`; the LM head gets 8 bits. group_size: weights that share a scale, or
    `channel`. weights: `float32`, or `float16` to halve what is not quantized, where that loses nothing. dtype: what
    the graphs compute in, `float32`, or `float16` for GPUs. flavor: `portable`, `ort` (graphs that write into their KV
    cache, for onnxruntime) or `both`. kv_cache_dtype: of that cache, `float32` or `float16`. force: replace an existing
    bundle. notice: takes sentences for the user.
    Raises GlmExportError; nothing is left behind then.
    """
    from glmexport.checkpoint import open_checkpoint
    from glmexport.splitter import SplitOptions
    from glmexport.splitter import split as split_checkpoint

    with open_checkpoint(checkpoint, revision) as source:
        passes = passes_of(slim, embedding, quantize, group_size, weights, source.config.num_blocks, kv_cache_dtype)
        options = SplitOptions(opset, passes=passes, dtype=dtype, flavor=flavor)
        split_checkpoint(source, Path(output), options, force=force, notice=notice)
    return open_bundle(Path(output))


def generate(
    session: Session,
    prompt: str | Sequence[int],
    *,
    history: Sequence[Round] = (),
    greedy: bool = False,
    temperature: float = Sampling.temperature,
    top_k: int = Sampling.top_k,
    top_p: float = Sampling.top_p,
    repetition_penalty: float = Sampling.repetition_penalty,
    seed: int | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    special: bool = False,
) -> Generation:
    """Continue a prompt: iterate over the result for pieces of text as they come, or ask for its `text`; then `ids`.

    prompt: text; or ids int, `[gMASK]` and `<sop>` among them. history: earlier rounds (query, answer) of a chat, for a
    prompt in the chat format. greedy to seed are those of `glmexport.sampling.Sampling`, the last three those of
    `glmexport.generation.generate`. Raises GlmExportError.
    """
    if history and not isinstance(prompt, str):
        raise GlmExportError("A history goes with a text; ids are the whole prompt.")
    sampling = Sampling(greedy, temperature, top_k, top_p, repetition_penalty, seed)
    text = chat_prompt(prompt, history) if isinstance(prompt, str) else prompt
    return generate_with(session, text, sampling=sampling, max_tokens=max_tokens, stop=stop, special=special)


def passes_of(
    slim: bool,
    embedding: str,
    quantize: str | None,
    group_size: int | str,
    weights: str,
    num_blocks: int,
    kv_cache_dtype: str = FLOAT32,
) -> tuple[Pass, ...]:
    """The passes that `split` is asked for, in their order (see `glmexport.passes`). Raises RecipeError."""
    # here: what runs a bundle needs none of them
    from glmexport.passes.half_cache import HalfCachePass
    from glmexport.passes.half_weights import HalfWeightsPass
    from glmexport.passes.quantize_weights import QuantizePass
    from glmexport.passes.raw_embedding import EmbedPass
    from glmexport.passes.slim_vocab import SlimPass

    words = {row.word: dtype for dtype, row in RAW_DTYPES.items()}
    if weights not in WEIGHTS:
        raise RecipeError(f"weights is {weights!r:.40}, expected one of {', '.join(WEIGHTS)}.")
    if kv_cache_dtype not in DTYPES:
        raise RecipeError(f"kv_cache_dtype is {kv_cache_dtype!r:.40}, expected one of {', '.join(DTYPES)}.")
    if embedding not in (GRAPH, SHARED, *words) or quantize not in (None, *_BITS):
        raise RecipeError(
            f"embedding is {embedding!r:.40} and quantize {quantize!r:.40}, expected one of {GRAPH}, "
            f"{', '.join(words)}, {SHARED} and of None, {', '.join(_BITS)}."
        )
    passes: list[Pass] = [HalfCachePass()] if kv_cache_dtype != FLOAT32 else []
    if slim:
        passes.append(SlimPass())
    if embedding in words:
        passes.append(EmbedPass(EmbeddingForm(RAW, words[embedding])))
    if quantize is not None:
        affine, head = (Affine(bits, group_size, True, DEFAULT_METHOD) for bits in (_BITS[quantize], _HEAD_BITS))
        passes.append(QuantizePass(uniform_recipe(affine, head, num_blocks), QuantizationForm(FORMATS[0])))
    if embedding == SHARED:
        passes.append(EmbedPass(EmbeddingForm(SHARED)))
    if weights != FLOAT32:
        passes.append(HalfWeightsPass())
    return tuple(passes)
