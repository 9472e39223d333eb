"""The whole of ChatGLM-6B as the one graph that MNN's LLM engine runs, and where in the weight file each tensor goes.

The engine gives, for `seq` tokens at a time: `input_ids`, which are embeddings already, float32 [seq, 1, hidden];
`attention_mask` int32 [1, 1, seq, total], 1 hides; `position_ids` int32 [1, 2, seq]; `logits_index` int32 [1], -1 for
the last token's logits and 0 for all. It takes `logits` [1, rows, vocab]. Keys and values stay in its attention
operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from glmexport import names
from glmexport.config import ModelConfig
from glmexport.errors import GlmExportError
from glmexport.mnn.matrix import MnnMatrix
from glmexport.mnn_llm.net import Net, Node
from glmexport.models.chatglm_6b import HIDDEN_SCORE, RESIDUAL_SCALE_BLOCKS, inverse_frequencies

ARCHITECTURE = "chatglm-6b"
LOGITS_INDEX = "logits_index"


@dataclass(frozen=True)
class StoredNorm:
    """Weight and bias of a layer norm, float32 [width] each."""

    width: int

    @property
    def total_bytes(self) -> int:
        """Of both."""
        return 8 * self.width


@dataclass(frozen=True)
class Place:
    """One tensor of the model with its bias in the weight file. name: of the checkpoint, without `.weight`."""

    name: str
    stored: MnnMatrix | StoredNorm
    offset: int
    has_bias: bool = True

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + self.stored.total_bytes


@dataclass(frozen=True)
class EngineGraph:
    """The graph without weights, and the places of all weights, in the order of the file."""

    net: Net
    places: tuple[Place, ...]


def engine_graph(config: ModelConfig, store: Callable[[str, int, int], MnnMatrix], *, corrected: bool) -> EngineGraph:
    """The graph of a model of these sizes.

    store: (name, outputs, inputs) -> how a matrix is stored. corrected: whether to add 1 to the positions of answered
    tokens, which the engine counts one too low (see `position_probe`).
    Raises GlmExportError for an architecture that the engine does not run.
    """
    if config.architecture != ARCHITECTURE:
        raise GlmExportError(f"MNN's engine is given {ARCHITECTURE} here, found {config.architecture}.")
    return _Builder(config, store).build(corrected)


class _Builder:
    def __init__(self, config: ModelConfig, store: Callable[[str, int, int], MnnMatrix]) -> None:
        self._config = config
        self._store = store
        self._net = Net()
        self._places: list[Place] = []
        self._end = 0

    def build(self, corrected: bool) -> EngineGraph:
        net, config = self._net, self._config
        embedded = net.input(names.INPUT_IDS, "float32", (-1, 1, config.hidden_size))
        hidden_places = net.input(names.ATTENTION_MASK, "int32", (1, 1, -1, -1))
        positions = net.input(names.POSITION_IDS, "int32", (1, 2, -1))
        index = net.input(LOGITS_INDEX, "int32", (1,))
        mask = net.binary("MUL", net.to_float(hidden_places), net.constant(HIDDEN_SCORE))
        turns = self._turns(positions, corrected)
        hidden = net.reshape(embedded, (-1, config.hidden_size))
        for block_id in range(config.num_blocks):
            hidden = self._block(f"transformer.layers.{block_id}", hidden, mask, turns)
        rows = net.slice(hidden, net.concat((index, net.constant((0,), "int32")), 0), (-1, -1))
        normed = self._norm("transformer.final_layernorm", rows)
        logits = self._linear("lm_head", normed, config.vocab_size, config.hidden_size, has_bias=False)
        net.name_output(net.reshape(logits, (1, -1, config.vocab_size)), names.LOGITS)
        return EngineGraph(net, tuple(self._places))

    def _turns(self, positions: Node, corrected: bool) -> tuple[Node, Node]:
        """Cosines and sines [1, seq, 1, 1, head_dim] by which queries and keys are turned."""
        net, head_dim = self._net, self._config.head_dim
        position = net.to_float(net.slice(positions, (0, 0, 0), (1, 1, -1)))
        block_position = net.to_float(net.slice(positions, (0, 1, 0), (1, 1, -1)))
        if corrected:  # block positions are 0 in the prompt, 1 at its end, and larger for what is answered
            answered = net.binary("MINIMUM", net.binary("SUB", block_position, net.constant(1.0)), net.constant(1.0))
            position = net.binary("ADD", position, net.binary("MAXIMUM", answered, net.constant(0.0)))
        speeds = net.constant(inverse_frequencies(head_dim // 2, "cpu").numpy()[None])
        first, second = (
            net.binary("MUL", net.reshape(row, (-1, 1)), speeds) for row in (position, block_position)
        )  # [seq, head_dim / 4]
        angles = net.reshape(net.concat((first, first, second, second), 1), (1, -1, 1, 1, head_dim))
        return net.unary("COS", angles), net.unary("SIN", angles)

    def _block(self, path: str, hidden: Node, mask: Node, turns: tuple[Node, Node]) -> Node:
        net, config = self._net, self._config
        size, inner = config.hidden_size, config.inner_size
        alpha = net.constant(math.sqrt(2 * RESIDUAL_SCALE_BLOCKS))
        normed = self._norm(f"{path}.input_layernorm", hidden)
        mixed = self._linear(f"{path}.attention.query_key_value", normed, 3 * size, size)
        attended = self._linear(f"{path}.attention.dense", self._attend(mixed, mask, turns), size, size)
        hidden = net.binary("ADD", net.binary("MUL", normed, alpha), attended)
        normed = self._norm(f"{path}.post_attention_layernorm", hidden)
        raised = self._linear(f"{path}.mlp.dense_h_to_4h", normed, inner, size)
        lowered = self._linear(f"{path}.mlp.dense_4h_to_h", net.unary("GELU", raised), size, inner)
        return net.binary("ADD", net.binary("MUL", normed, alpha), lowered)

    def _attend(self, mixed: Node, mask: Node, turns: tuple[Node, Node]) -> Node:
        """[seq, heads * 3 * head_dim] -> [seq, hidden]."""
        net, config = self._net, self._config
        heads, width = config.num_heads, config.head_dim
        split = net.reshape(mixed, (1, -1, heads, 3, width))
        both = net.slice(split, (0, 0, 0, 0, 0), (-1, -1, -1, 2, -1))  # queries and keys turn together
        quarters = [net.slice(both, (0, 0, 0, 0, i * width // 4), (-1, -1, -1, -1, width // 4)) for i in range(4)]
        a, b, c, d = quarters
        partner = net.concat((net.unary("NEG", b), a, net.unary("NEG", d), c), 4)
        turned = net.binary("ADD", net.binary("MUL", both, turns[0]), net.binary("MUL", partner, turns[1]))

        def head(source: Node, which: int) -> Node:
            one = net.slice(source, (0, 0, 0, which, 0), (-1, -1, -1, 1, -1))
            return net.reshape(one, (1, -1, heads, width))

        attended = net.attention(head(turned, 0), head(turned, 1), head(split, 2), mask)
        return net.reshape(attended, (-1, config.hidden_size))

    def _norm(self, name: str, value: Node) -> Node:
        place = self._put(name, StoredNorm(self._config.hidden_size))
        half = place.stored.total_bytes // 2
        return self._net.layer_norm(value, self._config.layernorm_epsilon, (place.offset, half, half))

    def _linear(self, name: str, value: Node, outputs: int, inputs: int, has_bias: bool = True) -> Node:
        stored = self._store(name, outputs, inputs)
        place = self._put(name, stored, has_bias)
        return self._net.linear(value, stored, place.offset)

    def _put(self, name: str, stored: MnnMatrix | StoredNorm, has_bias: bool = True) -> Place:
        place = Place(name, stored, self._end, has_bias)
        self._places.append(place)
        self._end = place.end
        return place
