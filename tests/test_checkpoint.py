"""Opening checkpoints: what is recognised, what the tokenizer files say, which tensors are demanded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FORMATS, GOLDEN, HUB_REPO, fill_hub_cache, make_tensors, write_checkpoint, write_weights
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from glmexport import checkpoint as checkpoint_module
from glmexport.checkpoint import Checkpoint, heads_equal
from glmexport.checkpoint import open_checkpoint as open_with_patches
from glmexport.config import ModelConfig, RawConfig, SpecialIds, TokenizerFacts
from glmexport.errors import CheckpointError
from glmexport.patch import ModelPatch


class StandIn(nn.Module):
    """Nothing but a module with the state dict of a ChatGLM-6B."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shapes = make_tensors(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_blocks=config.num_blocks,
            heads=config.num_heads,
            inner=config.inner_size,
        )
        self._tensors = {name: torch.empty(tensor.shape) for name, tensor in shapes.items()}
        assert all(tensor.is_meta for tensor in self._tensors.values()), "built without memory"

    def state_dict(self, *_args, **_kwargs):
        return self._tensors


def read_config(raw: Mapping[str, Any], facts: TokenizerFacts) -> ModelConfig:
    keys = RawConfig(raw, "config.json")
    bos = keys.integer("bos_token_id")
    image_tokens = facts.num_image_tokens or 0
    pad = keys.integer("pad_token_id", 3 + image_tokens)
    config = ModelConfig(
        architecture="stand-in",
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        num_blocks=keys.integer("num_layers"),
        num_heads=keys.integer("num_attention_heads"),
        inner_size=keys.integer("inner_hidden_size"),
        max_positions=keys.integer("max_sequence_length"),
        layernorm_epsilon=keys.positive_float("layernorm_epsilon"),
        num_image_tokens=image_tokens,
        special_ids=SpecialIds(bos - 4, bos - 3, bos, keys.integer("eos_token_id"), pad, 5 + image_tokens),
    )
    keys.finish()
    return config


def no_blocks(*_args):
    raise AssertionError("opening a checkpoint computes nothing")


STAND_IN = ModelPatch(
    name="stand-in",
    title="ChatGLM-6B",
    recognise=lambda raw: (
        raw.get("model_type") == "chatglm"
        and ("position_encoding_2d" in raw or "inner_hidden_size" in raw)
        and "multi_query_attention" not in raw
    ),
    read_config=read_config,
    build_reference=StandIn,
    run_reference_block=no_blocks,
    transforms=(),
    embedding="transformer.word_embeddings",
    block="transformer.layers.{block_id}",
    final_norm="transformer.final_layernorm",
    head="lm_head",
    ignored_tensors=(r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq",),
)
open_checkpoint = partial(open_with_patches, patches=(STAND_IN,))
SMALL = {"vocab_size": 64, "num_blocks": 1, "hidden_size": 16, "inner": 32, "tokenizer": False}


@pytest.fixture(params=["stand-in", "real"])
def opener(request):
    """`open_checkpoint` with the stand-in for the architectures, and with the real ones where they are installed."""
    if request.param == "stand-in":
        return open_checkpoint
    if importlib.util.find_spec("glmexport.patches") is None:
        pytest.skip("glmexport is not installed, so its patches package cannot be imported")
    return open_with_patches


def change_config(directory: Path, remove: tuple[str, ...] = (), **changes: object) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in remove}))


def refusal(directory: str | Path, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory, **kwargs)
    return str(caught.value)


# What opens


def test_the_golden_checkpoint(opener):
    with opener(str(GOLDEN)) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        assert checkpoint.config.num_blocks == 3
        assert checkpoint.config.special_ids == SpecialIds(1500, 1501, 1504, 1505, 3, 5)
        assert checkpoint.tokenizer_files == (GOLDEN / "tokenizer_config.json", GOLDEN / "ice_text.model")
        assert checkpoint.warnings == ()
        assert checkpoint.has_own_head
        assert not heads_equal(checkpoint)


@pytest.mark.parametrize("fmt", FORMATS)
def test_both_revisions_in_every_format(tmp_path, opener, fmt):
    slim = write_checkpoint(tmp_path / "slim", fmt=fmt)
    first = write_checkpoint(tmp_path / "first", fmt=fmt, image_tokens=200, first_revision=True)
    with opener(slim) as checkpoint:
        assert checkpoint.config.special_ids == SpecialIds(1500, 1501, 1504, 1505, 3, 5)
        assert checkpoint.config.num_image_tokens == 0
    with opener(first) as checkpoint:
        assert checkpoint.config.special_ids == SpecialIds(1700, 1701, 1704, 1705, 203, 205)
        assert checkpoint.config.num_image_tokens == 200
        assert checkpoint.config.vocab_size == 2056


def test_without_a_tokenizer_it_opens_with_a_warning(tmp_path, opener):
    directory = write_checkpoint(tmp_path, **SMALL)
    with opener(directory) as checkpoint:
        assert checkpoint.tokenizer_files == ()
        (warning,) = checkpoint.warnings
        assert "no tokenizer_config.json and no ice_text.model" in warning


@pytest.mark.parametrize("with_inv_freq", [True, False])
def test_inv_freq_is_optional(tmp_path, opener, with_inv_freq):
    opener(write_checkpoint(tmp_path, with_inv_freq=with_inv_freq, **SMALL)).close()


def test_no_weights_when_none_are_needed(tmp_path):
    directory = write_checkpoint(tmp_path, **SMALL)
    (directory / "pytorch_model.bin").unlink()
    checkpoint = open_checkpoint(directory, require_weights=False)
    assert len(checkpoint.weights) == 0
    assert checkpoint.config.vocab_size == 64


def test_facts_from_the_tokenizer_files(tmp_path):
    directory = write_checkpoint(tmp_path, image_tokens=7)
    facts, files, warnings = checkpoint_module._read_tokenizer(directory)
    assert facts.num_image_tokens == 7
    expected = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "[MASK]": 1500, "[gMASK]": 1501, "[sMASK]": 1502}
    expected |= {"<unused_0>": 1503, "<sop>": 1504, "<eop>": 1505, "<ENC>": 1506, "<dBLOCK>": 1507}
    assert facts.piece_ids == expected
    assert len(files) == 2
    assert warnings == ()


# The head


def test_an_own_head_is_read_as_it_is(tmp_path):
    with open_checkpoint(write_checkpoint(tmp_path, **SMALL)) as checkpoint:
        stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
        assert torch.equal(checkpoint.read("lm_head.weight"), stored["lm_head.weight"])
        assert not heads_equal(checkpoint)


def test_an_absent_head_is_the_embedding(tmp_path):
    with open_checkpoint(write_checkpoint(tmp_path, with_head=False, **SMALL)) as checkpoint:
        assert not checkpoint.has_own_head
        embedding = checkpoint.read("transformer.word_embeddings.weight")
        assert torch.equal(checkpoint.read("lm_head.weight"), embedding)
        assert torch.equal(checkpoint.read_rows("lm_head.weight", 3, 5), embedding[3:5])
        assert checkpoint.info("lm_head.weight").name == "transformer.word_embeddings.weight"
        assert heads_equal(checkpoint)


@pytest.mark.parametrize("slice_bytes", [1, 100, 1 << 20])
def test_heads_are_compared_in_slices(tmp_path, monkeypatch, slice_bytes):
    monkeypatch.setattr(checkpoint_module, "_SLICE_BYTES", slice_bytes)
    directory = write_checkpoint(tmp_path, tied=True, **SMALL)
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.has_own_head
        assert heads_equal(checkpoint)
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    write_weights(directory, tensors, "bin")
    with open_checkpoint(directory) as checkpoint:
        assert heads_equal(checkpoint), "the same numbers in another dtype"
    tensors["lm_head.weight"][-1, -1] += 1
    write_weights(directory, tensors, "bin")
    with open_checkpoint(directory) as checkpoint:
        assert not heads_equal(checkpoint), "one number, in the last slice"


# What is no supported checkpoint


def test_no_checkpoint_directory(tmp_path):
    assert "it has no config.json" in refusal(tmp_path)
    assert "does not exist; expected a checkpoint directory or a hub id" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "is not a directory" in refusal(tmp_path / "file")
    assert "does not exist" in refusal("nul\0byte")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 10**6, b"version https://git-lfs"]
)
def test_a_config_that_is_no_json_object(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert str(tmp_path / "config.json") in refusal(tmp_path)


def test_missing_keys_are_named_together(tmp_path):
    change_config(write_checkpoint(tmp_path, **SMALL), remove=("vocab_size", "num_layers"))
    message = refusal(tmp_path)
    assert "`vocab_size`" in message
    assert "`num_layers`" in message


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (
            {"model_type": "chatglm", "multi_query_attention": True, "padded_vocab_size": 65024, "seq_length": 32768},
            "ChatGLM2 or",
        ),
        (
            {"model_type": "chatglm", "multi_query_attention": True, "padded_vocab_size": 65024, "seq_length": 8192},
            "ChatGLM3,",
        ),
        (
            {"model_type": "chatglm", "multi_query_attention": True, "padded_vocab_size": 151552},
            "GLM-4-9B with remote code",
        ),
        ({"model_type": "chatglm", "multi_query_attention": True, "padded_vocab_size": [1]}, "an unknown generation"),
        ({"model_type": "glm"}, "GLM-4-9B or GLM-Edge"),
        ({"model_type": "glm4"}, "GLM-4-0414"),
        ({"model_type": "llama", "hidden_size": 4096}, "`model_type` 'llama'"),
        ({"model_type": ["chatglm"]}, "`model_type` a list"),
        ({"hidden_size": 4096}, "no `model_type`"),
        ({}, "no `model_type`"),
    ],
)
def test_other_models_are_named(tmp_path, raw, name):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    message = refusal(tmp_path)
    assert name in message
    assert "supported: ChatGLM-6B." in message


def test_quantized_and_p_tuning_checkpoints_by_config(tmp_path):
    write_checkpoint(tmp_path, **SMALL)
    change_config(tmp_path, quantization_bit=4)
    assert "use the float16 checkpoint it was made from" in refusal(tmp_path)
    change_config(tmp_path, quantization_bit=0, pre_seq_len=None)
    open_checkpoint(tmp_path).close()
    change_config(tmp_path, pre_seq_len=128)
    assert "P-Tuning" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("transformer.layers.0.attention.dense.weight_scale", torch.zeros(16).half(), "quantized"),
        ("transformer.prefix_encoder.embedding.weight", torch.zeros(8, 64), "P-Tuning"),
    ],
)
def test_quantized_and_p_tuning_checkpoints_by_tensors(tmp_path, name, tensor, sentence):
    write_checkpoint(tmp_path, **SMALL)
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    write_weights(tmp_path, tensors | {name: tensor}, "bin")
    assert sentence in refusal(tmp_path)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "inner_hidden_size", "num_layers", "num_attention_heads"])
@pytest.mark.parametrize("value", [10**9, 10**40])
def test_absurd_sizes_build_nothing(tmp_path, key, value):
    change_config(write_checkpoint(tmp_path, **SMALL), **{key: value})
    assert "sizes that no supported model has" in refusal(tmp_path)


def test_more_blocks_than_tensors_build_nothing(tmp_path):
    change_config(write_checkpoint(tmp_path, **SMALL), num_layers=4000)
    assert "too few for the 4000 blocks" in refusal(tmp_path)


@pytest.mark.parametrize("value", [-1, True, "0", 1.5, [], 10**40])
def test_a_bad_number_of_image_tokens(tmp_path, value):
    directory = write_checkpoint(tmp_path)
    (directory / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": value}))
    assert "num_image_tokens" in refusal(directory)


@pytest.mark.parametrize("content", [b"", b"garbage", b"version https://git-lfs.github.com/spec/v1", None])
def test_a_damaged_tokenizer_model(tmp_path, content):
    path = write_checkpoint(tmp_path) / "ice_text.model"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    assert str(path) in refusal(tmp_path)


# Tensors


def test_all_differences_are_reported_at_once(tmp_path, opener):
    write_checkpoint(tmp_path, **SMALL)
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    del tensors["transformer.final_layernorm.bias"]
    del tensors["transformer.layers.0.mlp.dense_h_to_4h.weight"]
    tensors["lm_head.weight"] = torch.zeros(63, 16).half()
    tensors["transformer.layers.0.attention.dense.weight"] = torch.zeros(16, 16, dtype=torch.int8)
    tensors["lora\ud800\n"] = torch.zeros(2, 3)
    write_weights(tmp_path, tensors, "bin")
    with pytest.raises(CheckpointError) as caught:
        opener(tmp_path)
    first, *lines = str(caught.value).split("\n")
    assert "2 missing, 1 misshapen, 1 of a wrong dtype, 1 unknown" in first
    assert lines == [
        "  missing: transformer.layers.0.mlp.dense_h_to_4h.weight [32, 16]",
        "  missing: transformer.final_layernorm.bias [16]",
        "  misshapen: lm_head.weight: found [63, 16], expected [64, 16]",
        "  of a wrong dtype: transformer.layers.0.attention.dense.weight: found int8, expected one of "
        "float16, bfloat16, float32, float64",
        "  unknown: lora\\ud800\\n [2, 3]",
    ]


def test_every_tensor_of_a_long_list_is_named(tmp_path):
    write_checkpoint(tmp_path, **SMALL)
    change_config(tmp_path, num_layers=10)
    lines = refusal(tmp_path).split("\n")
    assert len(lines) == 1 + 9 * 12
    assert all(line.startswith("  missing: transformer.layers.") for line in lines[1:])


def test_an_endless_list_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("glmexport.checkpoint._LISTED", 20)
    write_checkpoint(tmp_path, **SMALL)
    change_config(tmp_path, num_layers=10)
    lines = refusal(tmp_path).split("\n")
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == f"  missing: and {9 * 12 - 20} more"


def test_a_wrong_vocabulary_size_gives_the_shapes(tmp_path):
    change_config(write_checkpoint(tmp_path, **SMALL), vocab_size=65)
    assert "word_embeddings.weight: found [64, 16], expected [65, 16]" in refusal(tmp_path)


# The hub


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_a_hub_id_opens_from_the_cache(tmp_path, cache):
    snapshot = fill_hub_cache(cache, write_checkpoint(tmp_path / "source", fmt="safetensors-sharded"))
    for revision in (None, "main"):
        with open_checkpoint(HUB_REPO, revision) as checkpoint:
            assert checkpoint.directory == snapshot
            assert len(checkpoint.weights) > 0
            assert checkpoint.warnings == ()
    for shard in snapshot.glob("model*"):
        shard.unlink()
    open_checkpoint(HUB_REPO, require_weights=False)
    assert "has no weight file" in refusal(HUB_REPO)
    assert "revision v9" in refusal(HUB_REPO, revision="v9")
    assert "HF_HUB_OFFLINE" in refusal("zai-org/other")


def test_an_unsupported_hub_model_is_not_downloaded(tmp_path, cache, monkeypatch):
    source = write_checkpoint(tmp_path / "source")
    change_config(source, multi_query_attention=True, padded_vocab_size=65024)
    (source / "pytorch_model.bin").unlink()
    fill_hub_cache(cache, source)
    assert "ChatGLM2 or ChatGLM3" in refusal(HUB_REPO)


def test_an_existing_directory_wins_over_a_hub_id(tmp_path, cache):
    fill_hub_cache(cache, write_checkpoint(tmp_path / "source"))
    local = write_checkpoint(tmp_path / HUB_REPO, **SMALL)
    with open_checkpoint(HUB_REPO) as checkpoint:
        assert checkpoint.directory.resolve() == local
    assert "leave the revision out" in refusal(HUB_REPO, revision="main")


# Whatever comes


def test_nothing_is_written_and_no_code_runs(tmp_path, opener):
    directory = write_checkpoint(tmp_path)
    (directory / "modeling_chatglm.py").write_text("raise SystemExit('remote code was run')")

    def listing():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.iterdir()}

    before = listing()
    directory.chmod(0o555)
    try:
        with opener(directory) as checkpoint:
            heads_equal(checkpoint)
    finally:
        directory.chmod(0o755)
    assert listing() == before


VALUES = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text() | st.just([])
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_configs(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("random")
    write_checkpoint(directory, **SMALL)
    keys = sorted(json.loads((directory / "config.json").read_text()))
    change_config(directory, **data.draw(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=3)))
    try:
        open_checkpoint(directory).close()
    except CheckpointError as error:
        message = str(error)
    else:
        message = "opened"
    assert message
