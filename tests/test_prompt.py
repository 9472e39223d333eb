"""Masks and positions against the original's golden data and against a slow version, element by element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmexport.config import SpecialIds
from glmexport.errors import GlmExportError
from glmexport.prompt import prepare_prompt

IDS = SpecialIds(mask=1500, gmask=1501, bos=1504, eos=1505, pad=3, forced=5)
TEXT = st.lists(st.integers(4, 1400), max_size=9)


def rows_of(golden: dict[str, np.ndarray], case: str) -> list[list[int]]:
    """The unpadded rows of a golden case."""
    rows = golden[f"{case}.input_ids"].tolist()
    if case == "batch":
        rows = [[token for token in row if token != IDS.pad] for row in rows]
    return rows


@pytest.mark.parametrize("case", ["short", "one", "long", "mask", "batch", "far"])
def test_prompts_equal_the_original(golden, case):
    prompt = prepare_prompt(rows_of(golden, case), IDS)
    np.testing.assert_array_equal(prompt.input_ids, golden[f"{case}.input_ids"])
    pad = prompt.pad_lengths[:, None, None]
    real = np.broadcast_to(np.arange(prompt.input_ids.shape[1]) >= pad, prompt.position_ids.shape)
    np.testing.assert_array_equal(prompt.position_ids[real], golden[f"{case}.position_ids"][real])
    if case == "far":  # its mask is not stored: all see the context, only the last row sees <sop>
        assert not prompt.attention_mask[..., :-1].any()
        assert prompt.attention_mask[0, 0, :, -1].tolist() == [True] * 1981 + [False]
        return
    expected = golden[f"{case}.attention_mask"]
    for row, pads in enumerate(prompt.pad_lengths):  # what padding itself sees carries no meaning
        np.testing.assert_array_equal(prompt.attention_mask[row, :, pads:], expected[row, :, pads:])
    assert prompt.attention_mask.dtype == np.bool_
    assert prompt.position_ids.dtype == np.int64


@pytest.mark.parametrize("case", ["short", "one", "long", "mask", "batch", "far"])
def test_decode_steps_equal_the_original(golden, case):
    prompt = prepare_prompt(rows_of(golden, case), IDS)
    batch, seq = prompt.input_ids.shape
    expected = golden[f"{case}.decode_position_ids"].reshape(-1, batch, 2, 1)
    for step, positions in enumerate(expected):
        mask, found = prompt.decode_step(step)
        np.testing.assert_array_equal(found, positions)
        assert mask.shape == (batch, 1, 1, seq + step + 1)
        assert mask.sum(axis=-1).ravel().tolist() == prompt.pad_lengths.tolist(), "only padding is hidden"


@st.composite
def prompt_row(draw: st.DrawFn) -> list[int]:
    """`tokens token tokens <sop> answer` with [gMASK] or [MASK] as the token; the answer may hold any id but <sop>."""
    token = draw(st.sampled_from([IDS.gmask, IDS.mask]))
    return [*draw(TEXT), token, *draw(TEXT), IDS.bos, *draw(TEXT)]


def slow_prompt(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The rules of the original, one element at a time: (mask, positions)."""
    seq = max(map(len, rows))
    mask = np.zeros((len(rows), 1, seq, seq), bool)
    positions = np.zeros((len(rows), 2, seq), np.int64)
    for b, row in enumerate(rows):
        pad = seq - len(row)
        context = next(i for i, token in enumerate(row) if token == IDS.bos)
        wanted = IDS.gmask if IDS.gmask in row else IDS.mask
        place_of_mask = next(i for i, token in enumerate(row) if token == wanted)
        for place in range(len(row)):
            in_context = place < context
            positions[b, 0, pad + place] = place if in_context else place_of_mask
            positions[b, 1, pad + place] = 0 if in_context else place - context + 1
        for looks in range(seq):
            for seen in range(seq):
                is_padding = seen < pad
                is_context = pad <= seen < pad + context
                mask[b, 0, looks, seen] = is_padding or (not is_context and seen > looks)
    return mask, positions


@settings(deadline=None)
@given(st.lists(prompt_row(), min_size=1, max_size=4))
def test_masks_and_positions_follow_the_rules(rows):
    prompt = prepare_prompt(rows, IDS)
    mask, positions = slow_prompt(rows)
    np.testing.assert_array_equal(prompt.attention_mask, mask)
    np.testing.assert_array_equal(prompt.position_ids, positions)
    for found, row in zip(prompt.input_ids.tolist(), rows, strict=True):
        assert found == [IDS.pad] * (len(found) - len(row)) + row


@settings(deadline=None)
@given(st.lists(prompt_row(), min_size=1, max_size=3), st.lists(st.integers(4, 1400), min_size=1, max_size=4))
def test_a_decode_step_is_the_last_row_of_the_longer_prompt(rows, answer):
    prompt = prepare_prompt(rows, IDS)
    for generated in range(len(answer)):
        mask, positions = prompt.decode_step(generated)
        longer_mask, longer_positions = slow_prompt([row + answer[: generated + 1] for row in rows])
        np.testing.assert_array_equal(mask, longer_mask[:, :, -1:])
        np.testing.assert_array_equal(positions, longer_positions[:, :, -1:])


@settings(deadline=None)
@given(prompt_row(), st.integers(1, 7))
def test_padding_moves_a_row_and_changes_nothing_else(row, pad):
    alone = prepare_prompt([row], IDS)
    longer = [*([7] * (len(row) + pad - 2)), IDS.gmask, IDS.bos]
    padded = prepare_prompt([row, longer], IDS)
    np.testing.assert_array_equal(padded.attention_mask[0, 0, pad:, pad:], alone.attention_mask[0, 0])
    assert padded.attention_mask[0, 0, :, :pad].all()
    np.testing.assert_array_equal(padded.position_ids[0, :, pad:], alone.position_ids[0])


@pytest.mark.parametrize(
    "row", [[], [5, 6], [5, IDS.gmask], [5, IDS.mask], [5, IDS.bos], [IDS.eos, IDS.bos, 9, 9, 9, 9, 9, 9, 9, 9]]
)
def test_a_row_that_is_no_prompt_is_named(row):
    with pytest.raises(GlmExportError, match=r"Prompt 1 needs .*1501, 1500.*1504.*found \["):
        prepare_prompt([[IDS.gmask, IDS.bos], row], IDS)
