"""The form of a bundle: what the passes made of the model, as the manifest states it and the runtime needs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from glmexport import names
from glmexport.config import ModelConfig, SpecialIds
from glmexport.errors import GlmExportError
from glmexport.interface import DTYPES, GraphSpec, graph_spec
from glmexport.recipe import FORMATS
from glmexport.vocabulary import VocabularyMap

FLOAT32, FLOAT16 = "float32", "float16"
WEIGHTS = (FLOAT32, FLOAT16)
"""How float32 matrices of the graphs are stored; float16 is cast in the graph, and holds the same numbers."""

GRAPH, RAW, SHARED = "graph", "raw", "shared"
EMBEDDING_KINDS = (GRAPH, RAW, SHARED)


class RawDtype(NamedTuple):
    """word: in options and file names. numpy: the type that holds its elements."""

    word: str
    numpy: str
    bytes: int


RAW_DTYPES = {
    "bfloat16": RawDtype("bf16", "uint16", 2),
    "float16": RawDtype("float16", "float16", 2),
    "float32": RawDtype("float32", "float32", 4),
}
"""What a raw embedding file can hold, all little-endian."""

NEAREST, TRUNCATE = "nearest-even", "truncate"
ROUNDINGS = (NEAREST, TRUNCATE)
RAW_STEM = "word_embeddings"
SLIM_PREFIX = "slim_"
ACTIVATIONS = {"int8": 4, "int16": 4, "float32": 1}
"""What a product rounds activations to -> MatMulNBits' accuracy level. int8: one integer product, as the operator does
it. int16: two, of the rounded activations and of what rounding left over (`passes.wide_activations`). float32: none; no
integer product either, which onnxruntime 1.31 computes a hundred times slower for 8-bit matrices.

By default activations are rounded finer than the weights are: int8 costs 0.6 % of a product, nothing beside 4-bit
weights and as much as 8-bit ones."""
MIN_QDQ_OPSET = 21
"""DequantizeLinear takes blocks and 4-bit integers from here on."""


@dataclass(frozen=True)
class Slim:
    """A slimmed vocabulary.

    vocabulary: old id -> new id. num_image_tokens: of the checkpoint, which is what its SentencePiece ids are off by.
    """

    vocabulary: VocabularyMap
    num_image_tokens: int


@dataclass(frozen=True)
class EmbeddingForm:
    """Where embedding rows come from.

    kind: `graph` (embedding.onnx), `raw` (one row-major little-endian file), `shared` (the rows of the quantized LM
    head). dtype, rounding and error (relative, of the whole table) speak of a raw file.
    """

    kind: str = GRAPH
    dtype: str = "float32"
    rounding: str = NEAREST


@dataclass(frozen=True)
class QuantizationForm:
    """How quantized matrices are stored (`recipe.FORMATS`) and what their products round activations to.

    int8_activations, int4_activations: for matrices of so many bits, one of `ACTIVATIONS`.
    """

    format: str
    int8_activations: str = "int16"
    int4_activations: str = "int8"

    def activations(self, bits: int) -> str:
        """What the products with a matrix of so many bits round activations to."""
        return self.int8_activations if bits == 8 else self.int4_activations


@dataclass(frozen=True)
class Form:
    """All of it; the default is what a plain split makes.

    weights: how matrices that are not quantized are stored in graphs that compute in float32. dtype: what the graphs
    compute in (`interface.DTYPES`), and so the dtype of their inputs, outputs, KV cache and weights. flavors: of the
    graphs, of `names.FLAVORS` and in their order. kv_cache: dtype of the KV cache that those of the flavor `ort` write
    into (`passes.half_cache`).
    """

    slim: Slim | None = None
    embedding: EmbeddingForm = EmbeddingForm()
    quantization: QuantizationForm | None = None
    weights: str = FLOAT32
    dtype: str = FLOAT32
    flavors: tuple[str, ...] = (names.PORTABLE,)
    kv_cache: str = FLOAT32

    @property
    def float_bytes(self) -> int:
        """Of one number of activations, and of the KV cache of portable graphs."""
        return RAW_DTYPES[self.dtype].bytes

    def cache_dtype(self, flavor: str) -> str:
        """Of the KV cache of graphs of a flavor."""
        return self.kv_cache if flavor == names.ORT else self.dtype

    def cache_float_bytes(self, flavor: str) -> int:
        """Of one number of that cache."""
        return RAW_DTYPES[self.cache_dtype(flavor)].bytes

    def spec_of(self, graph: str, config: ModelConfig, argmax: str, flavor: str) -> GraphSpec:
        """The signature of a graph of the bundle."""
        return graph_spec(graph, config, argmax, self.dtype, flavor, self.cache_dtype(flavor))

    @property
    def embedding_file(self) -> str | None:
        """Name of the raw embedding file, None where there is none."""
        if self.embedding.kind != RAW:
            return None
        prefix = SLIM_PREFIX if self.slim else ""
        return f"{prefix}{RAW_STEM}_{RAW_DTYPES[self.embedding.dtype].word}.bin"

    @property
    def vocabulary_file(self) -> str:
        """Name of the file with one piece a line."""
        return f"{SLIM_PREFIX if self.slim else ''}vocab.txt"

    def as_json(self) -> dict[str, Any]:
        """The manifest's keys about it."""
        slim = self.slim
        embedding = dataclasses.asdict(self.embedding) if self.embedding.kind == RAW else {"kind": self.embedding.kind}
        vocabulary = slim and {"num_image_tokens": slim.num_image_tokens, **slim.vocabulary.as_json()}
        return {
            "vocabulary": vocabulary,
            "embedding": embedding,
            "quantization": dataclasses.asdict(self.quantization) if self.quantization else None,
            "weights": self.weights,
            "dtype": self.dtype,
            "flavors": list(self.flavors),
            **({"kv_cache": self.kv_cache} if names.ORT in self.flavors else {}),
        }


def form_from_json(manifest: Mapping[str, Any]) -> Form:
    """The form that a manifest states. Raises ValueError, KeyError or TypeError for one that there is not."""
    weights = manifest.get("weights", FLOAT32)  # bundles from before it could be anything else do not say
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r:.80}, expected one of {', '.join(WEIGHTS)}")
    dtype = manifest.get("dtype", FLOAT32)  # likewise
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r:.80}, expected one of {', '.join(DTYPES)}")
    flavors = manifest.get("flavors", [names.PORTABLE])  # likewise
    if not isinstance(flavors, list) or not flavors or flavors != [one for one in names.FLAVORS if one in flavors]:
        raise ValueError(f"flavors is {flavors!r:.80}, expected some of {', '.join(names.FLAVORS)}")
    kv_cache = manifest.get("kv_cache", FLOAT32)  # likewise
    if kv_cache not in DTYPES or (kv_cache != FLOAT32 and names.ORT not in flavors):
        raise ValueError(f"kv_cache is {kv_cache!r:.80}, expected {FLOAT32}, or {FLOAT16} of graphs of the flavor ort")
    return Form(
        _slim(manifest["vocabulary"]),
        _embedding(manifest["embedding"]),
        _quantization(manifest["quantization"]),
        weights,
        dtype,
        tuple(flavors),
        kv_cache,
    )


def kept_special_ids(config: ModelConfig, drops_images: bool) -> dict[str, int]:
    """Name -> old id of every id with a meaning of its own that a slimmed vocabulary must keep.

    A padding id among the image rows, where these are dropped, becomes the text piece of that number: padding is hidden
    from every row, so any id does.
    """
    ids = dataclasses.asdict(config.special_ids)
    if drops_images and ids["pad"] < config.num_image_tokens:
        ids["pad"] += config.num_image_tokens
    return ids


def slimmed_config(config: ModelConfig, vocabulary: VocabularyMap) -> ModelConfig:
    """The config whose ids are those of the slimmed vocabulary. Raises GlmExportError where a special id is dropped."""
    kept = vocabulary.old_ids()
    old = kept_special_ids(config, drops_images=config.special_ids.pad not in kept)
    dropped = [name for name, old_id in old.items() if old_id not in kept]
    if dropped:
        raise GlmExportError(f"The slimmed vocabulary lacks the special id {dropped[0]} ({old[dropped[0]]}); keep it.")
    new = {name: vocabulary.new_id(old_id) for name, old_id in old.items()}
    images = int((kept < config.num_image_tokens).sum())
    return dataclasses.replace(
        config, vocab_size=vocabulary.size, num_image_tokens=images, special_ids=SpecialIds(**new)
    )


def _slim(raw: Any) -> Slim | None:
    if raw is None:
        return None
    count = raw["num_image_tokens"]
    if type(count) is not int or count < 0:
        raise ValueError(f"vocabulary.num_image_tokens is {count!r:.80}")
    return Slim(VocabularyMap.from_json({key: raw[key] for key in raw if key != "num_image_tokens"}), count)


def _embedding(raw: Any) -> EmbeddingForm:
    if raw["kind"] not in EMBEDDING_KINDS:
        raise ValueError(f"embedding.kind is {raw['kind']!r:.80}, expected one of {', '.join(EMBEDDING_KINDS)}")
    if raw["kind"] != RAW:
        return EmbeddingForm(raw["kind"])
    if raw["dtype"] not in RAW_DTYPES or raw["rounding"] not in ROUNDINGS:
        raise ValueError(f"embedding is stored as {raw['dtype']!r:.80}, rounded {raw['rounding']!r:.80}")
    return EmbeddingForm(RAW, raw["dtype"], raw["rounding"])


def _quantization(raw: Any) -> QuantizationForm | None:
    if raw is None:
        return None
    activations = [raw["int8_activations"], raw["int4_activations"]]
    if raw["format"] not in FORMATS or not all(word in ACTIVATIONS for word in activations):
        raise ValueError(f"quantization is {raw!r:.120}")
    return QuantizationForm(raw["format"], *activations)
