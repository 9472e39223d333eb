"""Reading the model's facts: types, complaints, and the config of both revisions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from checkpoints import make_config
from hypothesis import given
from hypothesis import strategies as st

from glmexport.config import ModelConfig, RawConfig, SpecialIds, TokenizerFacts
from glmexport.errors import CheckpointError
from glmexport.patch import all_patches

PATCH = all_patches()[0]
NO_TOKENIZER = TokenizerFacts(None, {})
FULL_SIZE = {
    "model_type": "chatglm",
    "vocab_size": 130528,
    "hidden_size": 4096,
    "num_layers": 28,
    "num_attention_heads": 32,
    "inner_hidden_size": 16384,
    "max_sequence_length": 2048,
    "layernorm_epsilon": 1e-05,
    "position_encoding_2d": True,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
}
FIRST_REVISION = {
    key: value for key, value in FULL_SIZE.items() if key not in ("mask_token_id", "gmask_token_id", "pad_token_id")
} | {"vocab_size": 150528, "bos_token_id": 150004, "eos_token_id": 150005}


def complaints(raw: dict[str, Any], facts: TokenizerFacts = NO_TOKENIZER) -> str:
    with pytest.raises(CheckpointError) as caught:
        PATCH.read_config(raw, facts)
    return str(caught.value)


def test_raw_config_gives_values():
    raw = RawConfig({"whole": 5, "zero": 0, "float": 0.5, "as_integer": 2, "fixed": True}, "config.json")
    assert raw.integer("whole") == 5
    assert raw.integer("absent", 9) == 9
    assert raw.integer("zero", minimum=0) == 0
    assert raw.positive_float("float") == 0.5
    assert raw.positive_float("as_integer") == 2.0
    raw.require("fixed", True)
    raw.demand(True, "never said")
    raw.finish()


def test_raw_config_reports_every_complaint_at_once():
    raw = RawConfig({"text": "5", "none": None, "low": 0, "fixed": False}, "some/config.json")
    raw.integer("text")
    raw.integer("absent")
    raw.integer("low")
    raw.positive_float("none")
    raw.require("fixed", True)
    raw.demand(False, "a and b do not fit")
    with pytest.raises(CheckpointError) as caught:
        raw.finish()
    assert str(caught.value) == (
        "some/config.json does not describe a supported model: "
        '`text` must be a whole number of at least 1, found "5"; '
        "`absent` must be a whole number of at least 1, found no such key; "
        "`low` must be a whole number of at least 1, found 0; "
        "`none` must be a positive number, found null; "
        "`fixed` must be true, found false; a and b do not fit."
    )


@pytest.mark.parametrize("value", [True, 1.5, "1", [1], {"a": 1}, -3])
def test_a_whole_number_is_nothing_else(value):
    raw = RawConfig({"key": value}, "config.json")
    raw.integer("key")
    with pytest.raises(CheckpointError, match="`key` must be a whole number"):
        raw.finish()


@pytest.mark.parametrize("value", [True, 0, -1e-5, "1e-5", float("inf"), float("nan"), [1e-5], 10**400])
def test_a_positive_number_is_nothing_else(value):
    raw = RawConfig({"key": value}, "config.json")
    raw.positive_float("key")
    with pytest.raises(CheckpointError, match="`key` must be a positive number"):
        raw.finish()


def test_the_slim_revision():
    assert PATCH.read_config(FULL_SIZE, TokenizerFacts(0, {})) == ModelConfig(
        "chatglm-6b", 130528, 4096, 28, 32, 16384, 2048, 1e-5, 0, SpecialIds(130000, 130001, 130004, 130005, 3, 5)
    )


@pytest.mark.parametrize(
    "facts",
    [
        TokenizerFacts(20000, {}),
        TokenizerFacts(None, {"[MASK]": 130000, "[gMASK]": 130001, "<sop>": 130004}),
        TokenizerFacts(None, {"<sop>": 130004}),
        NO_TOKENIZER,
    ],
    ids=["given", "derived from <sop>, ids from the pieces", "derived from <sop>", "the revision's own"],
)
def test_the_first_revision_has_only_bos_and_eos(facts):
    config = PATCH.read_config(FIRST_REVISION, facts)
    assert config.num_image_tokens == 20000
    assert config.vocab_size == 150528
    assert config.special_ids == SpecialIds(150000, 150001, 150004, 150005, 20003, 20005)


def test_other_piece_orders_are_read_from_the_tokenizer():
    facts = TokenizerFacts(20000, {"[MASK]": 129000, "[gMASK]": 129002})
    ids = PATCH.read_config(FIRST_REVISION, facts).special_ids
    assert (ids.mask, ids.gmask) == (149000, 149002)


def test_the_tokenizer_decides_between_equal_configs():
    small = {key: FIRST_REVISION[key] for key in FIRST_REVISION} | {
        "vocab_size": 1856,
        "bos_token_id": 1504,
        "eos_token_id": 1505,
    }
    assert PATCH.read_config(small, NO_TOKENIZER).num_image_tokens == 0, "too few rows for 20000 image tokens"
    assert PATCH.read_config(small, TokenizerFacts(None, {"<sop>": 1404})).num_image_tokens == 100


@pytest.mark.parametrize("image_tokens", [0, 20000])
@pytest.mark.parametrize("first_revision", [False, True])
def test_small_configs_of_both_revisions(image_tokens, first_revision):
    raw = make_config(
        vocab_size=1856 + image_tokens, image_tokens=image_tokens, tokenizer=True, first_revision=first_revision
    )
    config = PATCH.read_config(raw, TokenizerFacts(image_tokens, {}))
    first = 1500 + image_tokens
    pad = 3 + image_tokens if first_revision else 3
    assert config.special_ids == SpecialIds(first, first + 1, first + 4, first + 5, pad, 5 + image_tokens)
    assert config.num_image_tokens == image_tokens
    assert config.head_dim == 16


@pytest.mark.parametrize(("value", "found"), [(False, "found false"), (None, "found null")])
def test_one_dimensional_positions_are_refused(value, found):
    assert f"`position_encoding_2d` must be true, {found}" in complaints(FULL_SIZE | {"position_encoding_2d": value})


def test_every_wrong_key_is_named():
    text = complaints({"model_type": "chatglm", "hidden_size": "4096", "layernorm_epsilon": 0})
    for key in (
        *("position_encoding_2d", "vocab_size", "hidden_size", "num_layers", "num_attention_heads"),
        *("inner_hidden_size", "max_sequence_length", "layernorm_epsilon", "bos_token_id", "eos_token_id"),
    ):
        assert text.count(f"`{key}` must be") == 1, key
    assert "\n" not in text


@pytest.mark.parametrize(
    "key", sorted(set(FULL_SIZE) - {"model_type", "mask_token_id", "gmask_token_id", "pad_token_id"})
)
def test_a_missing_key_is_the_only_complaint(key):
    text = complaints({name: value for name, value in FULL_SIZE.items() if name != key})
    assert f"`{key}` must be" in text
    assert text.count("must be") == 1, "what follows from a missing key is not said twice"


def test_sizes_that_do_not_fit():
    assert "`hidden_size` must be a multiple of 4 * `num_attention_heads`, found 4096 for 24 heads" in complaints(
        FULL_SIZE | {"num_attention_heads": 24}
    )
    text = complaints(FULL_SIZE | {"vocab_size": 130005})
    assert "`vocab_size` must be above every special id, found 130005 and the id 130005" in text


def test_recognises_the_first_generation_only():
    assert PATCH.recognise(FULL_SIZE)
    assert PATCH.recognise(FIRST_REVISION)
    assert not PATCH.recognise(FULL_SIZE | {"model_type": "glm4"})
    assert not PATCH.recognise(FULL_SIZE | {"multi_query_attention": True})
    assert not PATCH.recognise({"model_type": "chatglm", "padded_vocab_size": 65024})


def test_the_config_is_frozen():
    config = PATCH.read_config(FULL_SIZE, NO_TOKENIZER)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(sorted(FULL_SIZE)), JSON, min_size=1, max_size=3))
def test_any_value_gives_a_config_or_one_sentence(changes):
    try:
        config = PATCH.read_config(FULL_SIZE | changes, NO_TOKENIZER)
    except CheckpointError as error:
        assert str(error).startswith("config.json does not describe a supported model: ")  # noqa: PT017
    else:
        assert config.hidden_size % (4 * config.num_heads) == 0
        assert max(dataclasses.asdict(config.special_ids).values()) < config.vocab_size
