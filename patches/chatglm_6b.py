"""ChatGLM-6B, the original: GLM blocks, two-dimensional rotary positions, prefix attention.

Facts: the original checkpoint repository (config, modeling and tokenizer files, March 2023 to v1.1.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from glmexport.config import ModelConfig, RawConfig, SpecialIds, TokenizerFacts
from glmexport.models import chatglm_6b as reference
from glmexport.patch import ModelPatch, Transform

from ._attention import MatMulAttention, SplitHeads, TensorCacheAttention
from ._in_place import BatchFirstRotary2D, GeluMLP, InPlaceAttention
from ._linear import GemmLinear, MatMulLinear
from ._modules import replace_modules
from ._rope import AngleRotary2D

NAME = "chatglm-6b"
FIRST_REVISION_IMAGE_TOKENS = 20000
PAD_PIECE_ID = 3
FORCED_PIECE_ID = 5
"""`▁`: the original's logits processor forces this piece where a logit is NaN or infinite."""


def recognise(raw: Mapping[str, Any]) -> bool:
    """ChatGLM2 and later also say `chatglm`; only the first generation has two-dimensional positions."""
    keys = ("position_encoding_2d", "inner_hidden_size")
    return raw.get("model_type") == "chatglm" and any(key in raw for key in keys) and "multi_query_attention" not in raw


def read_config(raw: Mapping[str, Any], tokenizer: TokenizerFacts) -> ModelConfig:
    """The config of either revision. Raises CheckpointError with everything that is missing or does not fit."""
    keys = RawConfig(raw, "config.json")
    keys.require("position_encoding_2d", True)
    vocab_size, hidden_size = keys.integer("vocab_size"), keys.integer("hidden_size")
    num_heads = keys.integer("num_attention_heads")
    bos, eos = keys.integer("bos_token_id", minimum=0), keys.integer("eos_token_id", minimum=0)
    image_tokens = _image_tokens(raw, bos, tokenizer)
    # the first revision's config has only bos and eos; the pieces' order is [MASK] [gMASK] [sMASK] <unused_0> <sop>
    ids = SpecialIds(
        mask=keys.integer("mask_token_id", _piece_id(tokenizer, "[MASK]", image_tokens, bos - 4), minimum=0),
        gmask=keys.integer("gmask_token_id", _piece_id(tokenizer, "[gMASK]", image_tokens, bos - 3), minimum=0),
        bos=bos,
        eos=eos,
        pad=keys.integer("pad_token_id", PAD_PIECE_ID + image_tokens, minimum=0),
        forced=FORCED_PIECE_ID + image_tokens,
    )
    config = ModelConfig(
        architecture=NAME,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_blocks=keys.integer("num_layers"),
        num_heads=num_heads,
        inner_size=keys.integer("inner_hidden_size"),
        max_positions=keys.integer("max_sequence_length"),
        layernorm_epsilon=keys.positive_float("layernorm_epsilon"),
        num_image_tokens=image_tokens,
        special_ids=ids,
    )
    keys.demand(
        hidden_size % (4 * num_heads) == 0,
        f"`hidden_size` must be a multiple of 4 * `num_attention_heads`, found {hidden_size} for {num_heads} heads",
        *("hidden_size", "num_attention_heads"),
    )
    largest = max(ids.mask, ids.gmask, ids.bos, ids.eos, ids.pad, ids.forced)
    keys.demand(
        largest < vocab_size,
        f"`vocab_size` must be above every special id, found {vocab_size} and the id {largest}",
        *("vocab_size", "bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id"),
    )
    keys.finish()
    return config


def _image_tokens(raw: Mapping[str, Any], bos: int, tokenizer: TokenizerFacts) -> int:
    """Rows before the text pieces: what the tokenizer says, else what its `<sop>` shows, else what the revision has."""
    if tokenizer.num_image_tokens is not None:
        return tokenizer.num_image_tokens
    if "<sop>" in tokenizer.piece_ids:
        return max(bos - tokenizer.piece_ids["<sop>"], 0)
    first_revision = "mask_token_id" not in raw and bos > FIRST_REVISION_IMAGE_TOKENS
    return FIRST_REVISION_IMAGE_TOKENS if first_revision else 0


def _piece_id(tokenizer: TokenizerFacts, piece: str, image_tokens: int, default: int) -> int:
    piece_id = tokenizer.piece_ids.get(piece)
    return max(default, 0) if piece_id is None else piece_id + image_tokens


def split_heads(model: nn.Module) -> nn.Module:
    """Head views become a reshape that copies the leading axes."""
    return replace_modules(model, reference.QueryKeyValueSplit, lambda m: SplitHeads(m.num_heads, m.head_dim))


def rotary_by_angle(model: nn.Module) -> nn.Module:
    """The rotary table becomes cos and sin of position times frequency."""

    def make(module: reference.RotaryEmbedding2D) -> nn.Module:
        return AngleRotary2D(reference.inverse_frequencies(module.head_dim // 2, "cpu"))

    return replace_modules(model, reference.RotaryEmbedding2D, make)


def matmul_attention(model: nn.Module) -> nn.Module:
    """Attention over views becomes two batched matrix products."""
    return replace_modules(model, reference.CoreAttention, lambda m: MatMulAttention(m.layer_id, m.head_dim))


def tensor_cache(model: nn.Module) -> nn.Module:
    """Tuple KV becomes one tensor."""
    return replace_modules(model, reference.SelfAttention, TensorCacheAttention)


def batch_first_rotary(model: nn.Module) -> nn.Module:
    """The rotary table becomes cos and sin of the positions, for heads before places."""

    def make(module: reference.RotaryEmbedding2D) -> nn.Module:
        return BatchFirstRotary2D(reference.inverse_frequencies(module.head_dim // 2, "cpu"))

    return replace_modules(model, reference.RotaryEmbedding2D, make)


def in_place_cache(model: nn.Module) -> nn.Module:
    """Tuple KV becomes two caches that are written into."""
    return replace_modules(model, reference.SelfAttention, InPlaceAttention)


def gelu(model: nn.Module) -> nn.Module:
    """The activation's formula becomes GELU."""
    return replace_modules(model, reference.MLP, GeluMLP)


def matmul_linear(model: nn.Module) -> nn.Module:
    """The blocks' linear layers multiply with weights stored [in, out]."""
    for module in model.modules():
        if isinstance(module, reference.GLMBlock):
            replace_modules(module, nn.Linear, MatMulLinear)
    return model


def gemm_head(model: nn.Module) -> nn.Module:
    """The LM head keeps its weight [vocab, hidden]: slimming the vocabulary then drops whole rows."""
    head = model.get_submodule("lm_head")
    if not isinstance(head, nn.Linear):
        raise TypeError(f"lm_head must be a Linear, found {type(head).__name__}")
    model.lm_head = GemmLinear(head)
    return model


STORED_AS_MULTIPLIED = (
    Transform("matmul-linear", "Transpose of every weight at load -> weights stored as [in, out]", matmul_linear),
    Transform("gemm-head", "Transpose of the LM head at load -> Gemm on [vocab, hidden]", gemm_head),
)
"""In both flavors, which read the same files."""

CHATGLM_6B = ModelPatch(
    name=NAME,
    title="ChatGLM-6B (first revision, 150528 rows, and v1.1.0, 130528 rows)",
    recognise=recognise,
    read_config=read_config,
    build_reference=reference.build_reference,
    run_reference_block=reference.run_reference_block,
    transforms=(
        Transform("split-heads", "head views with traced lengths -> Reshape that copies leading axes", split_heads),
        Transform(
            "rotary-by-angle", "rotary table cut at position_ids.max() -> cos, sin of the positions", rotary_by_angle
        ),
        Transform(
            "matmul-attention", "views, squeezes and a data-dependent mask -> two batched MatMul", matmul_attention
        ),
        # keeps the modules that the transforms above put in place, so it comes after them
        Transform("tensor-cache", "tuple KV -> past_key_values [2, past, batch, heads, head_dim]", tensor_cache),
        *STORED_AS_MULTIPLIED,
    ),
    in_place_transforms=(
        Transform("batch-first-rotary", "rotary table -> cos, sin of the positions, heads first", batch_first_rotary),
        # keeps the rotary that the transform above put in place, so it comes after it
        Transform("in-place-cache", "tuple KV -> TensorScatter into caches, Attention over them", in_place_cache),
        Transform("gelu", "the tanh formula -> Gelu", gelu),
        *STORED_AS_MULTIPLIED,
    ),
    embedding="transformer.word_embeddings",
    block="transformer.layers.{block_id}",
    final_norm="transformer.final_layernorm",
    head="lm_head",
    ignored_tensors=(r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq",),
)
