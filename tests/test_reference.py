"""The PyTorch reference against what the original v1.1.0 code computes on the golden checkpoint."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from glmexport.config import ModelConfig, SpecialIds
from glmexport.models import chatglm_6b
from glmexport.models.chatglm_6b import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    RotaryEmbedding,
    build_reference,
    reference_config,
    run_reference_block,
)

CASES = ("short", "one", "long", "mask", "batch", "far")
TOLERANCE = 1e-4  # float32 sums in another order; the original itself is met to about 1e-5
CONFIG = ModelConfig("chatglm_6b", 1856, 64, 3, 4, 256, 2048, 1e-5, 0, SpecialIds(1500, 1501, 1504, 1505, 3, 5))


class Run(NamedTuple):
    """What a model computes on one golden case: the prompt, then the golden tokens one at a time on a real past."""

    hidden_states: np.ndarray
    prefill_logits: np.ndarray
    decode_logits: np.ndarray
    presents: tuple


@pytest.fixture(scope="module")
def model(golden_checkpoint):
    return ChatGLMForConditionalGeneration.from_pretrained(golden_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def runs(model, golden):
    return {case: run_case(model, golden, case) for case in CASES}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tensor(golden, name):
    return torch.from_numpy(golden[name])


def padding_mask(golden, case):
    """What a tokenizer returns beside the ids: only `batch` is padded."""
    return (tensor(golden, f"{case}.input_ids") != 3).long() if case == "batch" else None


def golden_mask(golden, case):
    if case != "far":
        return tensor(golden, f"{case}.attention_mask")
    seq = golden["far.input_ids"].shape[1]
    mask = torch.zeros(1, 1, seq, seq, dtype=torch.bool)
    mask[..., :-1, -1] = True  # all see the context, only the last row sees <sop>
    return mask


def greedy_tokens(golden, case):
    """[steps, batch]."""
    tokens = tensor(golden, f"{case}.greedy")
    return tokens.reshape(len(tokens), -1)


def run_case(model, golden, case, mask=None):
    mask = golden_mask(golden, case) if mask is None else mask
    ids, positions = tensor(golden, f"{case}.input_ids"), tensor(golden, f"{case}.position_ids")
    with torch.no_grad():
        out = model(ids, positions, mask, past_key_values=(), use_cache=True, output_hidden_states=True)
        prefill, past, decode = out, out.past_key_values, []
        row = mask[:, :, -1:]
        steps = tensor(golden, f"{case}.decode_position_ids").reshape(-1, len(ids), 2, 1)
        for tokens, step_positions in zip(greedy_tokens(golden, case), steps, strict=True):
            row = torch.cat((row, torch.zeros_like(row[..., :1])), dim=-1)
            out = model(tokens[:, None], step_positions, row, past_key_values=past, use_cache=True)
            past = out.past_key_values
            decode.append(out.logits[:, -1].numpy())
    hidden_states = torch.stack(prefill.hidden_states).numpy()
    return Run(hidden_states, prefill.logits.numpy(), np.stack(decode), past)


def error(found, expected):
    """Largest difference; fails on another shape."""
    assert found.shape == expected.shape
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max())


def prefill_error(run, golden, case):
    return error(run.prefill_logits, golden[f"{case}.prefill_logits"])


# --- what the original computes ---


@pytest.mark.parametrize("case", [case for case in CASES if case != "far"])
def test_hidden_states_equal_the_original(runs, golden, case):
    real = (golden[f"{case}.input_ids"].T != 3)[None, :, :, None]  # padded places carry no meaning
    assert error(runs[case].hidden_states * real, golden[f"{case}.hidden_states"] * real) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_prefill_logits_equal_the_original(runs, golden, case):
    expected = golden[f"{case}.prefill_logits"]
    found = runs[case].prefill_logits
    if expected.ndim == 2:
        found = found[:, -1]
    elif case == "batch":
        real = golden["batch.input_ids"] != 3
        found, expected = found[real], expected[real]
    assert error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_decode_logits_and_greedy_tokens_equal_the_original(runs, golden, case):
    expected = golden[f"{case}.decode_logits"]
    assert error(runs[case].decode_logits.reshape(expected.shape), expected) <= TOLERANCE
    chosen = np.concatenate((runs[case].prefill_logits[None, :, -1], runs[case].decode_logits[:-1])).argmax(-1)
    assert np.array_equal(chosen, greedy_tokens(golden, case).numpy())


@pytest.mark.parametrize("case", ["short", "one", "long", "mask"])
def test_last_keys_and_values_equal_the_original(runs, golden, case):
    assert error(torch.stack(runs[case].presents[-1]), golden[f"{case}.presents_last"]) <= TOLERANCE


def test_first_keys_and_values_of_the_batch_equal_the_original(runs, golden):
    expected = golden["batch.presents0"]
    found = torch.stack(runs["batch"].presents[0])[:, : expected.shape[1]].numpy()
    real = (golden["batch.input_ids"].T != 3)[None, :, :, None, None]
    assert error(found * real, expected * real) <= TOLERANCE


@pytest.mark.parametrize("case", ["short", "batch"])
def test_blocks_run_one_by_one_with_stacked_past(model, golden, case):
    mask, positions = golden_mask(golden, case), tensor(golden, f"{case}.position_ids")
    batch, seq = golden[f"{case}.input_ids"].shape
    hidden = tensor(golden, f"{case}.hidden_states")[0]
    block = model.transformer.layers[0]
    whole, presents = run_reference_block(block, 0, hidden, mask, positions, torch.zeros(2, 0, batch, 4, 16))
    assert presents.shape == (2, seq, batch, 4, 16)
    real = (golden[f"{case}.input_ids"].T != 3)[:, :, None]
    assert error(whole.numpy() * real, golden[f"{case}.hidden_states"][1] * real) <= TOLERANCE
    # The last row is the only one after the context, so it may come later, on the others' keys and values.
    last, longer = run_reference_block(
        block, 0, hidden[-1:], mask[:, :, -1:], positions[:, :, -1:], presents[:, :-1].contiguous()
    )
    assert error(last.numpy(), whole[-1:].numpy()) <= TOLERANCE
    assert error(longer.numpy(), presents.numpy()) <= TOLERANCE


def test_float16_model_chooses_the_same_tokens(golden_checkpoint, golden):
    model = ChatGLMForConditionalGeneration.from_pretrained(golden_checkpoint)
    assert model.dtype == torch.float16
    run = run_case(model, golden, "short")
    assert run.prefill_logits.dtype == np.float32
    assert 0 < prefill_error(run, golden, "short") < 0.1


# --- masks and positions ---


@pytest.mark.parametrize("case", CASES)
def test_masks_and_positions_follow_from_the_ids(model, golden, case):
    ids, padding = tensor(golden, f"{case}.input_ids"), padding_mask(golden, case)
    assert torch.equal(model.get_masks(ids, padding), golden_mask(golden, case))
    assert torch.equal(model.get_position_ids(ids, padding), tensor(golden, f"{case}.position_ids"))


@pytest.mark.parametrize("case", ["mask", "batch"])
def test_masks_and_positions_of_decode_steps_follow_from_the_ids(model, golden, case):
    ids, padding = tensor(golden, f"{case}.input_ids"), padding_mask(golden, case)
    seq, tokens = ids.shape[1], greedy_tokens(golden, case).T
    longer = torch.cat((ids, tokens), dim=1)
    if padding is not None:
        padding = torch.cat((padding, torch.ones_like(tokens)), dim=1)
    expected = tensor(golden, f"{case}.decode_position_ids").reshape(-1, len(ids), 2)
    assert torch.equal(model.get_position_ids(longer, padding)[:, :, seq:].permute(2, 0, 1), expected)
    last_row = model.get_masks(longer, padding, query_length=1)
    assert last_row.shape == (len(ids), 1, 1, longer.shape[1])
    hidden = torch.zeros_like(last_row) if padding is None else (padding == 0)[:, None, None]
    assert torch.equal(last_row, hidden)


@pytest.mark.parametrize("written", [1500, 1501, 1504])
def test_special_tokens_written_by_the_model_move_nothing(model, golden, written):
    ids = tensor(golden, "mask.input_ids")
    longer = torch.cat((ids, torch.tensor([[written, 7]])), dim=1)
    assert torch.equal(model.get_position_ids(longer)[:, :, : ids.shape[1]], tensor(golden, "mask.position_ids"))
    assert model.get_position_ids(longer)[0, :, -1].tolist() == [5, 3]


def test_padded_batch_needs_only_the_two_dimensional_mask(model, golden, runs):
    ids, padding = tensor(golden, "batch.input_ids"), padding_mask(golden, "batch")
    from_ids = model(ids, attention_mask=padding).logits.numpy()
    assert np.array_equal(from_ids, runs["batch"].prefill_logits)
    from_mask = model(ids, attention_mask=golden_mask(golden, "batch")).logits.numpy()
    assert np.array_equal(from_mask, from_ids)


def test_decode_with_a_two_dimensional_mask(model, golden, runs):
    ids, padding = tensor(golden, "batch.input_ids"), padding_mask(golden, "batch")
    out = model(ids, attention_mask=padding, use_cache=True)
    tokens = greedy_tokens(golden, "batch").T[:, :2]
    steps = tensor(golden, "batch.decode_position_ids")[:2, :, :, 0].permute(1, 2, 0)  # two tokens at once
    longer = torch.cat((padding, torch.ones_like(tokens)), dim=1)
    logits = model(tokens, steps, longer, past_key_values=out.past_key_values).logits
    assert error(logits.transpose(0, 1).numpy(), runs["batch"].decode_logits[:2]) <= TOLERANCE


@pytest.mark.parametrize(
    "ids", [[[5, 6, 1504]], [[5, 6, 1501]], [[5, 1504, 1501]], [[5, 1501, 1504], [5, 6, 7]]], ids=str
)
def test_rows_that_are_no_prompt_are_refused(model, ids):
    with pytest.raises(ValueError, match=rf"Rows \[{len(ids) - 1}\] of input_ids are no prompts"):
        model(torch.tensor(ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "on the left"),
        ({"attention_mask": torch.ones(1, 3)}, "must have shape"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "must be bool"),
        ({"attention_mask": torch.zeros(1, 1, 4, 5, dtype=torch.bool)}, "must be bool"),
        ({"position_ids": torch.arange(4)[None]}, "position_ids must have shape"),
        ({"past_key_values": ((torch.zeros(1, 1, 4, 16),) * 2,) * 3}, "position_ids must be given with a past"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[5, 6, 1501, 1504]]), **arguments)


# --- generate() ---


@pytest.mark.parametrize("case", CASES)
def test_generate_equals_the_original_greedily(model, golden, case):
    ids, expected = tensor(golden, f"{case}.input_ids"), greedy_tokens(golden, case).T
    found = model.generate(
        ids, attention_mask=padding_mask(golden, case), do_sample=False, max_new_tokens=expected.shape[1]
    )
    assert torch.equal(found[:, ids.shape[1] :], expected)


@pytest.mark.parametrize("case", ["short", "batch"])
def test_generate_without_a_cache_equals_the_original(model, golden, case):
    ids, expected = tensor(golden, f"{case}.input_ids"), greedy_tokens(golden, case).T
    padding = padding_mask(golden, case)
    found = model.generate(
        ids, attention_mask=padding, do_sample=False, max_new_tokens=expected.shape[1], use_cache=False
    )
    assert torch.equal(found[:, ids.shape[1] :], expected)


def test_beam_search_is_the_same_with_and_without_a_cache(model, golden):
    ids, padding = tensor(golden, "batch.input_ids"), padding_mask(golden, "batch")
    settings = {"attention_mask": padding, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6}
    beams = [
        model.generate(ids, do_sample=False, use_cache=use_cache, **settings).tolist() for use_cache in (True, False)
    ]
    assert beams[0] == beams[1]
    assert len({tuple(beam) for beam in beams[0]}) == 6


def test_sampling_draws_different_answers(model, golden):
    torch.manual_seed(0)
    ids = tensor(golden, "short.input_ids")
    found = model.generate(ids, do_sample=True, top_p=0.7, temperature=0.95, num_return_sequences=4, max_new_tokens=4)
    assert found.shape == (4, 9)
    assert len({tuple(row) for row in found.tolist()}) > 1


def test_generate_continues_from_a_returned_cache(model, golden):
    ids, expected = tensor(golden, "short.input_ids"), greedy_tokens(golden, "short").T
    first = model.generate(ids, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, DynamicCache)
    assert first.past_key_values.layers[0].keys.shape == (1, 4, 7, 16)  # the newest token is not in it yet
    found = model.generate(first.sequences, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=5)
    assert torch.equal(found[:, 5:], expected)


def test_prompt_lookup_finds_the_greedy_answer(model, golden):
    ids, expected = tensor(golden, "long.input_ids"), greedy_tokens(golden, "long").T
    found = model.generate(ids, do_sample=False, max_new_tokens=24, prompt_lookup_num_tokens=3)
    assert torch.equal(found[:, ids.shape[1] :], expected)


def test_generate_stops_at_the_end_token_and_pads(model, golden):
    ids, padding = tensor(golden, "batch.input_ids"), padding_mask(golden, "batch")
    end = int(greedy_tokens(golden, "batch")[1, 0])  # the first row writes it second, the other row never
    found = model.generate(ids, attention_mask=padding, do_sample=False, max_new_tokens=5, eos_token_id=end)
    assert found[0, 11:].tolist() == [*greedy_tokens(golden, "batch")[:2, 0].tolist(), 3, 3, 3]
    assert found[1, 11:].tolist() == greedy_tokens(golden, "batch")[:, 1].tolist()


def test_generate_refuses_what_it_cannot_follow(model, golden):
    ids, positions = tensor(golden, "short.input_ids"), tensor(golden, "short.position_ids")
    with pytest.raises(ValueError, match="takes no position_ids"):
        model.generate(ids, position_ids=positions, max_new_tokens=1)
    with pytest.raises(ValueError, match="plain DynamicCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))


# --- loading and saving ---


def test_stored_frequencies_are_the_computed_ones(golden_checkpoint):
    stored = torch.load(golden_checkpoint / "pytorch_model.bin")
    computed = chatglm_6b.inverse_frequencies(8, torch.device("cpu"))
    for block_id in range(3):
        name = f"transformer.layers.{block_id}.attention.rotary_emb.inv_freq"
        assert torch.equal(stored[name].float(), computed)


def test_save_and_load_is_a_round_trip(model, golden, runs, tmp_path):
    model.save_pretrained(tmp_path)
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    changed = {"architectures": [type(model).__name__], "_name_or_path": again.config.name_or_path}
    assert again.config.to_dict() == {**model.config.to_dict(), **changed}
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    logits = again(tensor(golden, "short.input_ids")).logits.numpy()
    assert np.array_equal(logits, runs["short"].prefill_logits)


def test_a_head_of_its_own_stays(model, golden_checkpoint, golden, tmp_path):
    other = ChatGLMForConditionalGeneration.from_pretrained(golden_checkpoint, dtype=torch.float32)
    other.lm_head.weight.mul_(2.0)
    other.save_pretrained(tmp_path)
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, other.lm_head.weight)
    assert torch.equal(again.transformer.word_embeddings.weight, model.transformer.word_embeddings.weight)
    assert again.lm_head.weight is not again.transformer.word_embeddings.weight


def test_a_checkpoint_without_a_head_is_tied_on_request(golden_checkpoint, tmp_path):
    weights = torch.load(golden_checkpoint / "pytorch_model.bin")
    del weights["lm_head.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((golden_checkpoint / "config.json").read_bytes())
    tied = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, tie_word_embeddings=True, dtype=torch.float32)
    assert tied.lm_head.weight is tied.transformer.word_embeddings.weight
    assert torch.equal(tied.lm_head.weight, weights["transformer.word_embeddings.weight"].float())


def test_first_revision_config_gets_its_mask_ids():
    config = ChatGLMConfig(vocab_size=150528, bos_token_id=150004, eos_token_id=150005)
    assert (config.mask_token_id, config.gmask_token_id) == (150000, 150001)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (28, 2048)


@pytest.mark.parametrize("setting", [{"position_encoding_2d": False}, {"hidden_size": 4100}])
def test_configs_of_other_models_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        ChatGLMConfig(**setting)


# --- build_reference ---


def test_meta_reference_has_the_tensors_of_the_checkpoint(golden_checkpoint):
    with torch.device("meta"):
        built = build_reference(CONFIG)
    stored = torch.load(golden_checkpoint / "pytorch_model.bin")
    expected = {name: tensor.shape for name, tensor in stored.items() if not name.endswith("inv_freq")}
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == expected
    assert all(tensor.is_meta and tensor.dtype == torch.float32 for tensor in built.state_dict().values())
    assert not list(built.buffers())
    assert not built.training


def test_meta_reference_computes_once_it_has_weights(model, golden, runs):
    with torch.device("meta"):
        built = build_reference(CONFIG)
    built.load_state_dict(model.state_dict(), assign=True)
    assert np.array_equal(built(tensor(golden, "short.input_ids")).logits.numpy(), runs["short"].prefill_logits)


def test_reference_is_allocated_on_the_default_device(model, golden, runs):
    built = build_reference(CONFIG)
    assert built.device == torch.device("cpu")
    built.load_state_dict(model.state_dict())
    assert np.array_equal(built(tensor(golden, "short.input_ids")).logits.numpy(), runs["short"].prefill_logits)


def test_reference_config_agrees_with_the_file(model):
    config = reference_config(CONFIG)
    for key in ("vocab_size", "num_layers", "inner_hidden_size", "mask_token_id", "gmask_token_id", "pad_token_id"):
        assert getattr(config, key) == getattr(model.config, key)
    assert config.tie_word_embeddings is False


def test_full_size_reference_on_meta_has_the_published_size():
    ids = SpecialIds(130000, 130001, 130004, 130005, 3, 5)
    with torch.device("meta"):
        built = build_reference(ModelConfig("chatglm_6b", 130528, 4096, 28, 32, 16384, 2048, 1e-5, 0, ids))
    block = sum(parameter.numel() for parameter in built.transformer.layers[27].parameters())
    assert round(block / 1e6, 1) == 201.4
    assert len(built.transformer.layers) == 28


# --- the rest of forward ---


def test_cache_and_tuples_hold_the_same(model, golden):
    ids = tensor(golden, "batch.input_ids")
    cache = model(ids, attention_mask=padding_mask(golden, "batch")).past_key_values
    tuples = model(ids, attention_mask=padding_mask(golden, "batch"), past_key_values=()).past_key_values
    for layer, (key, value) in zip(cache.layers, tuples, strict=True):
        assert torch.equal(layer.keys, key.permute(1, 2, 0, 3))
        assert torch.equal(layer.values, value.permute(1, 2, 0, 3))
    assert model(ids, use_cache=False).past_key_values is None


def test_loss_is_that_of_the_next_token(model, golden, runs):
    ids = tensor(golden, "short.input_ids")
    labels = torch.full_like(ids, -100)
    labels[0, -1] = 7
    expected = -torch.log_softmax(torch.from_numpy(runs["short"].prefill_logits)[0, -2], dim=-1)[7]
    assert float(model(ids, labels=labels).loss) == pytest.approx(float(expected), rel=1e-5)
    assert len(model(ids, labels=labels, use_cache=False, return_dict=False)) == 2


def test_logits_to_keep_are_the_last_ones(model, golden, runs):
    found = model(tensor(golden, "long.input_ids"), logits_to_keep=2).logits.numpy()
    assert error(found, runs["long"].prefill_logits[:, -2:]) <= TOLERANCE


def test_float16_table_keeps_far_angles():
    exact = [table.half() for table in RotaryEmbedding(8)(torch.zeros(1), 2048)]
    found = RotaryEmbedding(8)(torch.zeros(1, dtype=torch.float16), 2048)
    assert all(torch.equal(*pair) for pair in zip(found, exact, strict=True))


# --- that these checks can fail ---


def test_exact_frequencies_would_be_noticed(model, golden, monkeypatch):
    monkeypatch.setattr(
        chatglm_6b, "inverse_frequencies", lambda dim, device: 10000.0 ** -(torch.arange(0, dim, 2) / dim)
    )
    assert prefill_error(run_case(model, golden, "long"), golden, "long") > 1e-3


def test_alpha_of_the_actual_block_count_would_be_noticed(model, golden, monkeypatch):
    for block in model.transformer.layers:
        monkeypatch.setattr(block, "alpha", math.sqrt(2 * 3))
    assert prefill_error(run_case(model, golden, "short"), golden, "short") > 1e-1


def test_an_inverted_mask_would_be_noticed(model, golden):
    run = run_case(model, golden, "short", mask=~golden_mask(golden, "short"))
    assert prefill_error(run, golden, "short") > 1e-1


def test_swapped_positions_would_be_noticed(model, golden):
    swapped = {**golden, "short.position_ids": golden["short.position_ids"][:, ::-1].copy()}
    assert prefill_error(run_case(model, swapped, "short"), golden, "short") > 1e-3


def test_a_plain_causal_mask_would_be_noticed(model, golden):
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)[None, None]
    assert prefill_error(run_case(model, golden, "short", mask=causal), golden, "short") > 1e-2


def test_a_shifted_decode_position_would_be_noticed(model, golden):
    shifted = {**golden, "long.decode_position_ids": golden["long.decode_position_ids"] + 1}
    assert error(run_case(model, shifted, "long").decode_logits[:, 0], golden["long.decode_logits"]) > 1e-3
