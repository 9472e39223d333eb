"""The PyTorch reference of ChatGLM-6B, after the original checkpoint repository's modeling code, v1.1.0.

Everything an export is compared with is computed here, so nothing in this file makes way for an exporter. Modules are
small so that each can be replaced on its own, and `state_dict()` names are the checkpoint's.
Inside the model tensors are sequence first: hidden_states are [seq, batch, hidden].
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812  (the name PyTorch's own documentation uses)
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from glmexport.config import ModelConfig

KeyValue = tuple[Tensor, Tensor]  # key and value, each [total, batch, heads, head_dim]
Past = tuple[KeyValue, ...]  # one KeyValue a block

# The original scales the residual for 28 blocks whatever the config says, because it never passes num_layers on.
RESIDUAL_SCALE_BLOCKS = 28
HIDDEN_SCORE = -10000.0


class ChatGLMConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # the hook for subclasses is untyped
    """The original's `config.json`; the defaults are the sizes and ids of the slim revision (130528 rows).

    Without `mask_token_id` and `gmask_token_id`, as in the first revision's file, both follow from `bos_token_id`: the
    pieces stand in the order [MASK], [gMASK], [sMASK], <unused_0>, <sop>. Raises ValueError for one-dimensional
    positions and for a hidden size that heads and rotary halves cannot share evenly.
    """

    model_type = "chatglm"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
        "intermediate_size": "inner_hidden_size",
        "layer_norm_eps": "layernorm_epsilon",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    bos_token_id: int = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        # Kept, this would be saved again and point at code files that lie in the original's directory only.
        kwargs.pop("auto_map", None)
        if not self.position_encoding_2d:
            raise ValueError("`position_encoding_2d` must be true, found false: this is not a ChatGLM-6B config.")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` must be a multiple of 4 * `num_attention_heads`, found {self.hidden_size} for "
                f"{self.num_attention_heads} heads."
            )
        if self.mask_token_id is None:
            self.mask_token_id = self.bos_token_id - 4
        if self.gmask_token_id is None:
            self.gmask_token_id = self.bos_token_id - 3
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


def reference_config(config: ModelConfig) -> ChatGLMConfig:
    """The transformers config of the model that `config` describes, with a head of its own (never tied)."""
    return ChatGLMConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_blocks,
        num_attention_heads=config.num_heads,
        inner_hidden_size=config.inner_size,
        max_sequence_length=config.max_positions,
        layernorm_epsilon=config.layernorm_epsilon,
        bos_token_id=config.special_ids.bos,
        eos_token_id=config.special_ids.eos,
        pad_token_id=config.special_ids.pad,
        mask_token_id=config.special_ids.mask,
        gmask_token_id=config.special_ids.gmask,
    )


def inverse_frequencies(dim: int, device: torch.device | str) -> Tensor:
    """Rotation speeds of a rotary of width `dim`: float32 [dim / 2], each a float16 value.

    The original rounds them to float16 before anything else, and its weights were trained with that rounding.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return (1.0 / 10000.0**exponents).half().float()


class RotaryEmbedding(nn.Module):
    """Cosine and sine of every position; holds no tensor, so it needs no care when a model leaves the meta device."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions 0..length-1, each [length, 1, dim], of the dtype and device of `like`."""
        # Angles stay float32 in a float16 model too: near position 2000 float16 steps by one radian.
        positions = torch.arange(length, dtype=torch.float32, device=like.device)
        angles = torch.outer(positions, inverse_frequencies(self.dim, like.device))
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the two halves of the last axis."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Turn `x` [seq, batch, heads, dim] by `position_ids` [seq, batch], looked up in tables [length, 1, dim]."""
    cos = F.embedding(position_ids, cos.squeeze(1)).unsqueeze(2)  # [seq, batch, 1, dim]
    sin = F.embedding(position_ids, sin.squeeze(1)).unsqueeze(2)
    return x * cos + rotate_half(x) * sin


class RotaryEmbedding2D(nn.Module):
    """Turns the first half of each head by the position and the second half by the block position."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.tables = RotaryEmbedding(head_dim // 2)

    def forward(self, query: Tensor, key: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key, turned, each [seq, batch, heads, head_dim]; position_ids is int64 [batch, 2, seq]."""
        query_halves, key_halves = query.chunk(2, dim=-1), key.chunk(2, dim=-1)
        cos, sin = self.tables(query_halves[0], int(position_ids.max()) + 1)
        places = [position_ids[:, axis, :].transpose(0, 1).contiguous() for axis in (0, 1)]  # each [seq, batch]
        queries = [apply_rotary(half, cos, sin, place) for half, place in zip(query_halves, places, strict=True)]
        keys = [apply_rotary(half, cos, sin, place) for half, place in zip(key_halves, places, strict=True)]
        return torch.cat(queries, dim=-1), torch.cat(keys, dim=-1)


class QueryKeyValueSplit(nn.Module):
    """Takes apart what `query_key_value` computes: per head, query, key and value lie side by side."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim

    def forward(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[seq, batch, heads * 3 * head_dim] -> query, key and value, each [seq, batch, heads, head_dim]."""
        mixed = mixed.view(*mixed.size()[:-1], self.num_heads, 3 * self.head_dim)
        query, key, value = mixed.chunk(3, dim=-1)
        return query, key, value


class CoreAttention(nn.Module):
    """Softmax attention over views to [seq, batch * heads, head_dim], with the original's guard against overflow."""

    def __init__(self, layer_id: int, head_dim: int) -> None:
        super().__init__()
        self.layer_id, self.head_dim = layer_id, head_dim

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> Tensor:
        """Query [seq, batch, heads, head_dim], key and value [total, batch, heads, head_dim] -> [seq, batch, hidden].

        attention_mask: bool [batch, 1, seq, total], True hides.
        """
        seq, batch, heads, head_dim = query.size()
        total = key.size(0)
        # Dividing early by the block's number keeps q·k within float16; the float32 softmax input gets it back.
        guard = float(self.layer_id + 1)
        query = query / (math.sqrt(head_dim) * guard)

        query = query.view(seq, batch * heads, head_dim)
        key = key.view(total, batch * heads, head_dim)
        nothing = torch.zeros(1, 1, 1, dtype=query.dtype, device=query.device)
        scores = torch.baddbmm(nothing, query.transpose(0, 1), key.permute(1, 2, 0), beta=0.0, alpha=1.0)
        scores = scores.view(batch, heads, seq, total)
        if attention_mask.any():
            scores = scores.masked_fill(attention_mask, HIDDEN_SCORE)
        weights = F.softmax(scores.float() * guard, dim=-1).to(value.dtype)

        # The values of a prefill are a slice of the mixed projection, which no view can flatten.
        value = value.reshape(total, batch * heads, head_dim)
        context = torch.bmm(weights.view(batch * heads, seq, total), value.transpose(0, 1))
        context = context.view(batch, heads, seq, head_dim).permute(2, 0, 1, 3).contiguous()
        return context.view(seq, batch, heads * head_dim)


class SelfAttention(nn.Module):
    """Attention of one block; only the two linear layers hold tensors."""

    def __init__(self, config: ChatGLMConfig, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.split_heads = QueryKeyValueSplit(self.num_heads, self.head_dim)
        self.rotary_emb = RotaryEmbedding2D(self.head_dim)
        self.core_attention = CoreAttention(layer_id, self.head_dim)

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, attention_mask: Tensor, layer_past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """(output [seq, batch, hidden], (key, value) of all places so far); arguments as in `GLMBlock.forward`."""
        query, key, value = self.split_heads(self.query_key_value(hidden_states))
        query, key = self.rotary_emb(query, key, position_ids)
        if layer_past is not None:
            key = torch.cat((layer_past[0], key), dim=0)
            value = torch.cat((layer_past[1], value), dim=0)
        context = self.core_attention(query, key, value, attention_mask)
        return self.dense(context), (key, value)


class MLP(nn.Module):
    """Up, tanh-approximated GELU, down; not gated."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[seq, batch, hidden] -> [seq, batch, hidden]."""
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(hidden_states)))  # type: ignore[no-any-return]

    def activation(self, x: Tensor) -> Tensor:
        """GELU by its tanh approximation, elementwise."""
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * x * (1.0 + 0.044715 * x * x)))


class GLMBlock(nn.Module):
    """One block; both residuals start from the normalised input, scaled by `alpha`."""

    def __init__(self, config: ChatGLMConfig, layer_id: int) -> None:
        super().__init__()
        self.alpha = math.sqrt(2 * RESIDUAL_SCALE_BLOCKS)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_id)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, attention_mask: Tensor, layer_past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """(hidden_states [seq, batch, hidden], (key, value) each [total, batch, heads, head_dim]).

        hidden_states: [seq, batch, hidden]. position_ids: int64 [batch, 2, seq], positions and block positions.
        attention_mask: bool [batch, 1, seq, total], True hides.
        layer_past: (key, value) each [past, batch, heads, head_dim], or None for no past.
        """
        normed = self.input_layernorm(hidden_states)
        attended, present = self.attention(normed, position_ids, attention_mask, layer_past)
        hidden_states = normed * self.alpha + attended
        normed = self.post_attention_layernorm(hidden_states)
        return normed * self.alpha + self.mlp(normed), present


class ChatGLMModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLMBlock(config, layer_id) for layer_id in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, past_key_values: Past | None = None
    ) -> tuple[Tensor, Past, tuple[Tensor, ...]]:
        """(final hidden [seq, batch, hidden], presents, all hidden states) of input_ids int64 [batch, seq].

        All hidden states are blocks + 1 tensors [seq, batch, hidden]: the embedding, then each block's output, the last
        one after the final norm. The other arguments are those of `GLMBlock.forward`, with one past a block.
        """
        hidden_states = self.word_embeddings(input_ids).transpose(0, 1)
        pasts = past_key_values or (None,) * len(self.layers)
        presents: list[KeyValue] = []
        steps = [hidden_states]
        for block, layer_past in zip(self.layers, pasts, strict=True):
            hidden_states, present = block(hidden_states, position_ids, attention_mask, layer_past)
            presents.append(present)
            steps.append(hidden_states)
        steps[-1] = self.final_layernorm(hidden_states)
        return steps[-1], tuple(presents), tuple(steps)


class ChatGLMForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]  # its hook
    """ChatGLM-6B with its head; `from_pretrained`, `save_pretrained` and `generate` work without remote code.

    The head is the checkpoint's own. It is tied to the embedding only on request (`tie_word_embeddings=True`), which is
    what a checkpoint without `lm_head.weight` needs.
    """

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    # transformers declares these as instance variables, so ClassVar is refused there.
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"attention\.rotary_emb\.inv_freq$"]  # noqa: RUF012
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.transformer.word_embeddings

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Past | Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast | tuple[object, ...]:
        """Logits float32 [batch, seq, vocab], and what else was asked for.

        input_ids: int64 [batch, seq]. position_ids: int64 [batch, 2, seq]; needed with a past, else `get_position_ids`.
        attention_mask: bool [batch, 1, seq, total] where True hides, or [batch, total] where 0 is padding on the left.
        past_key_values: a Cache (keys [batch, heads, total, head_dim], extended in place and returned) or the
            original's tuples, which come back as tuples; `()` starts with tuples, None with a new Cache.
        labels: int64 [batch, seq], -100 ignored; the loss compares each with the logits one place before.
        output_hidden_states: return those of `ChatGLMModel.forward`, sequence first as in the original.
        logits_to_keep: compute only this many logits from the end; 0 is all.
        Raises ValueError for shapes that do not fit and for ids without the special tokens that give the positions.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        past = tuples_of_cache(past_key_values) if isinstance(past_key_values, Cache) else past_key_values
        past_length = past[0][0].size(0) if past else 0
        mask = self._checked_mask(input_ids, attention_mask, past_length)
        position_ids = self._checked_positions(input_ids, position_ids, attention_mask, past_length)

        hidden_states, presents, steps = self.transformer(input_ids, position_ids, mask, past)
        logits = self.lm_head(hidden_states[-logits_to_keep:]).permute(1, 0, 2).contiguous().float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        if use_cache and isinstance(past_key_values, Cache):
            append_to_cache(past_key_values, presents, past_length)
        kept = past_key_values if isinstance(past_key_values, Cache) else presents
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=kept if use_cache else None,
            hidden_states=steps if output_hidden_states else None,
        )
        return result.to_tuple() if return_dict is False else result

    def _checked_positions(
        self, input_ids: Tensor, given: Tensor | None, mask: Tensor | None, past_length: int
    ) -> Tensor:
        if given is not None:
            expected = (input_ids.size(0), 2, input_ids.size(1))
            if given.shape != expected:
                raise ValueError(f"position_ids must have shape {expected}, found {tuple(given.shape)}.")
            return given
        if past_length:
            raise ValueError("position_ids must be given with a past, because input_ids does not hold the prompt then.")
        if mask is not None and mask.dim() == 4:
            mask = ~mask[:, 0].all(dim=1)  # padding is what no row sees
        return self.get_position_ids(input_ids, mask)

    def _checked_mask(self, input_ids: Tensor, given: Tensor | None, past_length: int) -> Tensor:
        batch, seq = input_ids.shape
        total = past_length + seq
        if given is not None and given.dim() == 4:
            if given.dtype != torch.bool or given.shape != (batch, 1, seq, total):
                raise ValueError(
                    f"attention_mask must be bool {(batch, 1, seq, total)} (True hides) or {(batch, total)} (0 is "
                    f"padding), found {given.dtype} {tuple(given.shape)}."
                )
            return given
        if not past_length:
            return self.get_masks(input_ids, given)
        # With a past, all new places come after the context, so only the later ones among themselves are hidden.
        return hidden_places(input_ids.new_zeros(batch), padding_free(given, input_ids, total), seq)

    def get_masks(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, query_length: int | None = None
    ) -> Tensor:
        """The mask of whole sequences, bool [batch, 1, query_length, seq], True hides: context for all, then causal.

        input_ids: int64 [batch, seq]. attention_mask: [batch, seq], 0 for padding on the left, which nobody sees.
        query_length: how many of the last rows are wanted, all by default. Raises ValueError like `get_position_ids`.
        """
        context_lengths, _, real = self._landmarks(input_ids, attention_mask)
        return hidden_places(context_lengths, real, input_ids.size(1) if query_length is None else query_length)

    def get_position_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Positions and block positions of whole sequences, int64 [batch, 2, seq]; arguments as in `get_masks`.

        The context counts from 0 where the padding ends. From <sop> on, every place has the position of the context's
        first [gMASK], else [MASK], and block positions count from 1. Raises ValueError for rows without these tokens
        and for padding anywhere but on the left.
        """
        context_lengths, mask_places, real = self._landmarks(input_ids, attention_mask)
        places = torch.arange(input_ids.size(1), device=input_ids.device)
        positions = torch.where(places >= context_lengths[:, None], mask_places[:, None], places)
        positions = positions - (~real).sum(dim=1, keepdim=True)
        return torch.stack((positions, places - context_lengths[:, None] + 1), dim=1).clamp(min=0)

    def _landmarks(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Index of <sop> [batch], index of the mask token [batch], and which places are not padding [batch, seq]."""
        sop_id, gmask_id, mask_id = self.config.bos_token_id, self.config.gmask_token_id, self.config.mask_token_id
        real = padding_free(attention_mask, input_ids, input_ids.size(1))
        sop = real & (input_ids == sop_id)
        context_lengths = sop.int().argmax(dim=1)
        # A mask token that the model itself writes after <sop> must not move the positions.
        in_context = real & (torch.arange(input_ids.size(1), device=input_ids.device) < context_lengths[:, None])
        gmask, mask = in_context & (input_ids == gmask_id), in_context & (input_ids == mask_id)
        chosen = torch.where(gmask.any(dim=1, keepdim=True), gmask, mask)
        complete = sop.any(dim=1) & chosen.any(dim=1)
        if not complete.all():
            raise ValueError(
                f"Rows {(~complete).nonzero().flatten().tolist()} of input_ids are no prompts: each needs [gMASK] "
                f"({gmask_id}) or [MASK] ({mask_id}) and, after it, <sop> ({sop_id})."
            )
        return context_lengths, chosen.int().argmax(dim=1), real

    def prepare_inputs_for_generation(  # type: ignore[override]  # the base class takes more than this model has
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: object,
    ) -> dict[str, object]:
        """Arguments of `forward` for the next step of `generate()`; input_ids is the whole sequence [batch, total].

        Raises ValueError for sequences that `get_position_ids` refuses and for position_ids [batch, 2, seq], both of
        whose rows `generate()` would count up.
        """
        # Two-dimensional position_ids are what generate() itself counts for other models; they mean nothing here.
        if position_ids is not None and position_ids.dim() == 3:
            raise ValueError("generate() takes no position_ids for this model: they follow from input_ids.")
        input_ids = input_ids.to(self.device)
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        passed_on = ("use_cache", "output_hidden_states", "logits_to_keep")
        return {
            "input_ids": input_ids[:, start:].contiguous(),
            "position_ids": self.get_position_ids(input_ids, attention_mask)[:, :, start:],
            "attention_mask": self.get_masks(input_ids, attention_mask, input_ids.size(1) - start),
            "past_key_values": past_key_values,
            **{name: kwargs[name] for name in passed_on if name in kwargs},
        }


def padding_free(attention_mask: Tensor | None, input_ids: Tensor, total: int) -> Tensor:
    """Which places are not padding, bool [batch, total]; ValueError for another shape or padding not on the left."""
    batch = input_ids.size(0)
    if attention_mask is None:
        return torch.ones(batch, total, dtype=torch.bool, device=input_ids.device)
    if attention_mask.shape != (batch, total):
        raise ValueError(f"A padding mask must have shape {(batch, total)}, found {tuple(attention_mask.shape)}.")
    real = attention_mask.to(device=input_ids.device, dtype=torch.bool)
    if (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError("Padding must be on the left of every row, found a 0 of the attention_mask after a 1.")
    return real


def hidden_places(context_lengths: Tensor, real: Tensor, query_length: int) -> Tensor:
    """What the last `query_length` rows may not see, bool [batch, 1, query_length, total]: later places and padding.

    context_lengths: int64 [batch], places before them are seen by every row. real: bool [batch, total], not padding.
    """
    places = torch.arange(real.size(1), device=real.device)
    later = places > places[real.size(1) - query_length :, None]  # [query_length, total]
    after_context = places >= context_lengths[:, None]  # [batch, total]
    return ((later & after_context[:, None]) | ~real[:, None])[:, None]


def tuples_of_cache(cache: Cache) -> Past:
    """The keys and values of a cache as the original's tuples, none for an empty cache.

    Raises ValueError unless it is a cache that only grows: others do not keep all places where they can be read.
    """
    layers: list[Any] = cache.layers  # some of the kinds it is declared with have no keys
    if not isinstance(cache, DynamicCache) or cache.offloading or {type(layer) for layer in layers} - {DynamicLayer}:
        raise ValueError(
            f"past_key_values must be tuples or a plain DynamicCache, found another {type(cache).__name__}."
        )
    if cache.get_seq_length() == 0:
        return ()
    return tuple((layer.keys.permute(2, 0, 1, 3), layer.values.permute(2, 0, 1, 3)) for layer in layers)


def append_to_cache(cache: Cache, presents: Past, past_length: int) -> None:
    """Append what `presents` holds beyond `past_length` to a cache, in the layout that beam search reorders."""
    for block_id, (key, value) in enumerate(presents):
        cache.update(key[past_length:].permute(1, 2, 0, 3), value[past_length:].permute(1, 2, 0, 3), block_id)


def build_reference(config: ModelConfig) -> ChatGLMForConditionalGeneration:
    """The unpatched float32 reference, in eval mode, on torch's current default device (`meta` included).

    Its parameters are not initialised: load weights before use.
    """
    device = torch.get_default_device()
    # Made on meta and then only allocated, because random values for 6 billion parameters take minutes.
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(reference_config(config))
    nn.Module.to(model, torch.float32).to_empty(device=device)
    model.train(False)
    return model


def run_reference_block(
    block: nn.Module, block_id: int, hidden: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one unpatched block with stacked keys and values, as `ModelPatch.run_reference_block` documents.

    `block_id` is not needed: a `GLMBlock` knows its own.
    """
    layer_past = (past[0], past[1]) if past.size(1) else None
    hidden, (key, value) = block(hidden, position_ids, attention_mask, layer_past)
    return hidden, torch.stack((key, value))
