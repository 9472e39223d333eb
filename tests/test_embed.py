"""The embedding as raw rows: every bit as the format says, found again by seek."""

from __future__ import annotations

import math
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import record_again, split_directory
from derived_bundles import (
    OPSET,
    assert_intact,
    assert_one_sentence,
    chain,
    contents,
    decoded,
    derived,
    distance,
    floats,
    glmexport,
    inode,
    manifest_of,
    place_of,
    plain_bundle,
    plain_checkpoint,
    quantize_pass,
    quantized_matrices,
    rewrite,
    seek_rows,
    steps_of,
    untouched,
    weights_of,
)
from hypothesis import given
from hypothesis import strategies as st

from glmexport.bundle import open_bundle
from glmexport.errors import BundleError, RecipeError
from glmexport.form import NEAREST, RAW, SHARED, TRUNCATE, EmbeddingForm
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.passes.slim_vocab import SlimPass
from glmexport.raw_rows import decode_rows, encode_rows
from glmexport.session import Session

TABLE = "transformer.word_embeddings.weight"
BF16 = EmbedPass(EmbeddingForm(RAW, "bfloat16"))
SHARE = EmbedPass(EmbeddingForm(SHARED))
HIDDEN = 40


@pytest.fixture(scope="session")
def table(checkpoint) -> np.ndarray:
    return weights_of(checkpoint)[TABLE]


@pytest.fixture(scope="session")
def bf16(shared, bundle) -> Path:
    return shared("odd-bf16", lambda path: derived(bundle, path, BF16))


# Rounding, bit by bit


def bits(*words: int) -> np.ndarray:
    return np.array(words, np.uint32).view(np.float32)


PATTERNS = st.one_of(
    st.integers(0, 0xFFFFFFFF),
    st.builds(lambda upper: upper << 16 | 0x8000, st.integers(0, 0xFFFF)),  # halves
    st.integers(0, 0x007FFFFF),  # denormals
    st.integers(0x7F7F0000, 0x7F80FFFF),  # the largest, infinity, NaN
    st.sampled_from([0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000, 0x7F7FFFFF]),
)


@given(st.lists(PATTERNS, min_size=1, max_size=40))
def test_nearest_even_is_torchs_rounding(patterns):
    rows = bits(*patterns)
    expected = torch.from_numpy(rows).to(torch.bfloat16)
    found = encode_rows(rows, "bfloat16", NEAREST)
    theirs = expected.view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(rows)
    np.testing.assert_array_equal(found[~nan], theirs[~nan])
    assert np.isnan(decode_rows(found, "bfloat16")[nan]).all()
    np.testing.assert_array_equal(decode_rows(found, "bfloat16"), expected.float().numpy())


@given(st.lists(PATTERNS, min_size=1, max_size=40))
def test_truncating_is_the_upper_half(patterns):
    found = encode_rows(bits(*patterns), "bfloat16", TRUNCATE)
    for ours, pattern in zip(found.tolist(), patterns, strict=True):
        nan_that_would_be_infinite = pattern & 0x7FFF0000 == 0x7F800000 and pattern & 0xFFFF
        assert ours == (pattern >> 16 | 0x40 if nan_that_would_be_infinite else pattern >> 16)


@pytest.mark.parametrize(
    ("pattern", "nearest", "truncated"),
    [
        (0x3F808000, 0x3F80, 0x3F80),  # half: down to even
        (0x3F818000, 0x3F82, 0x3F81),  # half: up to even
        (0x3F808001, 0x3F81, 0x3F80),
        (0x3F817FFF, 0x3F81, 0x3F81),
        (0xBF818000, 0xBF82, 0xBF81),  # the same below zero
        (0x3FFFFFFF, 0x4000, 0x3FFF),  # into the next power of two
        (0x7F7FFFFF, 0x7F80, 0x7F7F),  # over the largest
        (0xFF7F8000, 0xFF80, 0xFF7F),
        (0x7F7F7FFF, 0x7F7F, 0x7F7F),
        (0x00000001, 0x0000, 0x0000),
        (0x00008000, 0x0000, 0x0000),
        (0x00018000, 0x0002, 0x0001),
        (0x007FFFFF, 0x0080, 0x007F),  # the largest denormal becomes normal
        (0x80000000, 0x8000, 0x8000),  # negative zero
        (0x7F800000, 0x7F80, 0x7F80),
        (0xFF800000, 0xFF80, 0xFF80),
    ],
)
def test_cases_by_hand(pattern, nearest, truncated):
    assert encode_rows(bits(pattern), "bfloat16", NEAREST)[0] == nearest
    assert encode_rows(bits(pattern), "bfloat16", TRUNCATE)[0] == truncated
    assert decode_rows(np.array([nearest], np.uint16), "bfloat16").view(np.uint32)[0] == nearest << 16


@pytest.mark.parametrize("pattern", [0x7F800001, 0x7F80FFFF, 0xFF800001, 0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF])
@pytest.mark.parametrize("rounding", [NEAREST, TRUNCATE])
def test_a_nan_stays_a_nan_of_its_sign(pattern, rounding):
    (found,) = decode_rows(encode_rows(bits(pattern), "bfloat16", rounding), "bfloat16")
    assert np.isnan(found)
    assert np.signbit(found) == bool(pattern >> 31)


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=40))
def test_what_is_a_bfloat16_already_stays_what_it_is(patterns):
    stored = np.array(patterns, np.uint16)
    rows = decode_rows(stored, "bfloat16")
    for rounding in (NEAREST, TRUNCATE):
        again = encode_rows(rows, "bfloat16", rounding)
        number = ~np.isnan(rows)
        np.testing.assert_array_equal(again[number], stored[number])
        assert np.isnan(decode_rows(again, "bfloat16")[~number]).all()


@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=40))
def test_float16_and_float32(patterns):
    rows = bits(*patterns)
    np.testing.assert_array_equal(
        encode_rows(rows, "float16"), torch.from_numpy(rows).half().numpy(), "by torch's rounding"
    )
    assert encode_rows(rows, "float32").tobytes() == rows.tobytes()


def test_rows_of_any_strides():
    rows = np.arange(24, dtype=np.float32).reshape(4, 6) / 7
    for view in (rows.T, rows[::2, 1::2], rows[:, ::-1]):
        for dtype in ("bfloat16", "float16", "float32"):
            expected = encode_rows(np.array(view, order="C"), dtype)
            np.testing.assert_array_equal(encode_rows(view, dtype), expected)


# The file


@pytest.mark.parametrize(
    ("dtype", "rounding", "name", "pack"),
    [
        ("bf16", NEAREST, "word_embeddings_bf16.bin", None),
        ("bf16", TRUNCATE, "word_embeddings_bf16.bin", None),
        ("float16", NEAREST, "word_embeddings_float16.bin", "<40e"),
        ("float32", NEAREST, "word_embeddings_float32.bin", "<40f"),
    ],
)
def test_rows_are_found_by_seek(bundle, table, tmp_path, dtype, rounding, name, pack):
    result = glmexport("embed", bundle, "-o", tmp_path / "raw", "--dtype", dtype, "--rounding", rounding, "-q")
    assert (result.status, result.stderr) == (0, "")
    path = tmp_path / "raw" / name
    itemsize = 4 if dtype == "float32" else 2
    assert path.stat().st_size == 1897 * HIDDEN * itemsize
    assert {*contents(tmp_path / "raw")} ^ {*contents(bundle)} == {name, "embedding.onnx", "embedding.onnx.data"}
    ids = [0, 39, 40, 1500, 1896, 7]
    for row, stored in zip(ids, seek_rows(path, ids, HIDDEN, itemsize), strict=True):
        if pack:
            expected = struct.pack(pack, *table[row].tolist())
        elif rounding == NEAREST:
            expected = torch.from_numpy(table[row]).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
        else:
            halves = struct.unpack("<80H", struct.pack("<40f", *table[row].tolist()))
            expected = struct.pack("<40H", *halves[1::2])
        assert stored == expected
    assert steps_of(tmp_path / "raw") == ["split", "embed"]
    assert manifest_of(tmp_path / "raw")["embedding"] == {
        "kind": "raw",
        "dtype": {"bf16": "bfloat16"}.get(dtype, dtype),
        "rounding": rounding,
    }
    with Session(open_bundle(tmp_path / "raw")) as session:
        found = session.embed(np.array([ids, ids[::-1]]))
    assert found.shape == (len(ids), 2, HIDDEN)
    assert distance(found[:, 0], table[ids]) <= {"float32": 0, "float16": 2**-11}.get(dtype, 2**-7)
    np.testing.assert_array_equal(found[:, 1], found[::-1, 0])


def test_the_two_roundings_differ(bundle, table, tmp_path):
    """Else the test above could take one for the other: a float16 has more digits than a bfloat16."""
    nearest, cut = (encode_rows(table, "bfloat16", rounding) for rounding in (NEAREST, TRUNCATE))
    assert 0.3 < (nearest != cut).mean() < 0.7


def test_names_say_that_the_vocabulary_was_slimmed(bundle, tmp_path):
    derived(bundle, tmp_path / "raw", SlimPass(), BF16)
    (path,) = (tmp_path / "raw").glob("*.bin")
    assert path.name == "slim_word_embeddings_bf16.bin"
    assert path.stat().st_size == 1857 * HIDDEN * 2
    derived(bundle, tmp_path / "other", BF16, SlimPass())
    assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes(), "in whichever order"


def test_only_the_embedding_changes(bundle, bf16, tmp_path):
    with untouched(bundle):
        derived(bundle, tmp_path / "raw", BF16)
    for name in contents(bf16):
        if name not in ("manifest.json", "word_embeddings_bf16.bin"):
            assert inode(tmp_path / "raw", name) == inode(bundle, name)
    names = [entry["name"] for entry in manifest_of(bf16)["graphs"]]
    assert names == ["glm_block_0", "glm_block_1", "lm"]
    assert manifest_of(bf16)["tied"] is True
    assert_intact(bf16)


def test_the_chain_on_raw_rows(bundle, bf16):
    """Rows read from the file by numpy and fed to the blocks."""
    stored = np.fromfile(bf16 / "word_embeddings_bf16.bin", "<u2").astype(np.uint32) << 16
    rows = stored.view(np.float32).reshape(1897, HIDDEN)
    ours = chain(bf16, lambda piece: piece + 40, rows)
    for found, expected in zip(ours, chain(bundle, lambda piece: piece + 40), strict=True):
        assert 0 < distance(found, expected) < 0.01


def test_the_error_is_told_and_nearest_even_halves_it(bundle, table, tmp_path):
    told = {}
    for rounding in (NEAREST, TRUNCATE):
        result = glmexport("embed", bundle, "-o", tmp_path / rounding, "--rounding", rounding, "-q")
        words = result.stdout.split(", ")
        assert words[1:3] == ["bf16", f"rounded {rounding}"]
        told[rounding] = float(words[3].removeprefix("relative error "))
        found = decode_rows(np.fromfile(tmp_path / rounding / "word_embeddings_bf16.bin", "<u2"), "bfloat16")
        assert told[rounding] == pytest.approx(distance(found.reshape(table.shape), table), rel=1e-3)
    # a float16 has 3 bits more than a bfloat16: over the 8 remainders the mean square is 5.5 / 64, where cut 17.5 / 64
    assert told[TRUNCATE] / told[NEAREST] == pytest.approx(math.sqrt(17.5 / 5.5), rel=0.02)


def test_of_float32_nearest_even_halves_the_error():
    rows = np.random.default_rng(0).standard_normal((500, HIDDEN)).astype(np.float32)
    errors = [
        distance(decode_rows(encode_rows(rows, "bfloat16", rounding), "bfloat16"), rows)
        for rounding in (NEAREST, TRUNCATE)
    ]
    assert errors[1] / errors[0] == pytest.approx(2, rel=0.02)
    assert errors[0] == pytest.approx(0.0017, abs=0.0002)


def test_split_tells_it_too(checkpoint, bf16, tmp_path):
    result = glmexport("split", checkpoint, "-o", tmp_path / "b", "-q", "--opset", OPSET, "--embedding", "bf16")
    assert "embedding: word_embeddings_bf16.bin, bf16, rounded nearest-even, relative error 1." in result.stdout
    assert contents(tmp_path / "b") == contents(bf16)


# What is refused


def test_embedding_twice_is_refused(bf16, tmp_path):
    with untouched(bf16):
        result = glmexport("embed", bf16, "-o", tmp_path / "again", "--dtype", "float16")
        assert_one_sentence(result, "no embedding graph any more", "word_embeddings_bf16.bin")
        result = glmexport("embed", bf16, "-o", tmp_path / "again", "--dtype", "shared")
        assert_one_sentence(result, "no embedding graph any more")
    assert list(tmp_path.iterdir()) == []


def test_rounding_is_bfloat16s(bundle, tmp_path):
    for dtype in ("float16", "float32"):
        result = glmexport("embed", bundle, "-o", tmp_path / "raw", "--dtype", dtype, "--rounding", "truncate")
        assert_one_sentence(result, "Rounding truncate is the upper half of a float32", f"for {dtype} leave it out")
    assert list(tmp_path.iterdir()) == []


def test_unknown_words(bundle, tmp_path):
    for option, word in (("--dtype", "bfloat17"), ("--rounding", "up")):
        result = glmexport("embed", bundle, "-o", tmp_path / "raw", option, word)
        assert result.status == 2
        assert f"'{word}' is not one of" in result.stderr
        assert "Traceback" not in result.stderr


def with_table(shared, directory: Path, **values: float) -> Path:
    """A split checkpoint in float32 whose embedding holds these values in its first row."""
    source = shutil.copytree(plain_checkpoint(shared), directory / "checkpoint")
    tensors = {name: value.float() for name, value in torch.load(source / "pytorch_model.bin").items()}
    for number, value in enumerate(values.values()):
        tensors[TABLE][0, number] = value
    torch.save(tensors, source / "pytorch_model.bin")
    split_directory(source, directory / "bundle", opset=OPSET)
    return directory / "bundle"


def test_a_value_too_large_for_the_dtype(shared, tmp_path):
    source = with_table(shared, tmp_path / "source", a=70_000.0)
    with pytest.raises(RecipeError, match=r"word_embeddings\.weight holds values up to 7e\+04, which float16 cannot"):
        derived(source, tmp_path / "raw", EmbedPass(EmbeddingForm(RAW, "float16")))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    derived(source, tmp_path / "raw", BF16)
    largest = with_table(shared, tmp_path / "largest", a=float(np.finfo(np.float32).max))
    with pytest.raises(RecipeError, match=r"values up to 3\.4e\+38, which bfloat16 cannot hold"):
        derived(largest, tmp_path / "other", BF16)
    derived(largest, tmp_path / "cut", EmbedPass(EmbeddingForm(RAW, "bfloat16", TRUNCATE)))


def test_infinities_are_no_warning_of_numpys(shared, tmp_path):
    source = with_table(shared, tmp_path / "source", a=math.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        derived(source, tmp_path / "raw", BF16)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinities_and_nan_come_through(shared, tmp_path):
    source = with_table(shared, tmp_path / "source", a=math.inf, b=-math.inf, c=math.nan, d=-0.0)
    for dtype in ("bfloat16", "float16", "float32"):
        derived(source, tmp_path / dtype, EmbedPass(EmbeddingForm(RAW, dtype)))
        with Session(open_bundle(tmp_path / dtype)) as session:
            found = session.embed(np.array([[0]]))[0, 0, :4]
        np.testing.assert_array_equal(found, [math.inf, -math.inf, math.nan, 0])
        assert np.signbit(found[3])


@pytest.mark.parametrize("ids", [[-1], [1897], [0, -1897], [2**40]])
def test_ids_without_a_row(bf16, ids):
    """numpy counts negative ids from the end."""
    with (
        Session(open_bundle(bf16)) as session,
        pytest.raises(BundleError, match=r"were given, expected 0 to 1896"),
    ):
        session.embed(np.array([ids]))


def test_no_ids(bf16):
    with Session(open_bundle(bf16)) as session:
        assert session.embed(np.zeros((2, 0), np.int64)).shape == (0, 2, HIDDEN)


# Rows of the LM head


@pytest.fixture(
    scope="session",
    params=[(bits, symmetric) for bits in (8, 4) for symmetric in (True, False)],
    ids=lambda pair: f"int{pair[0]}-{'symmetric' if pair[1] else 'asymmetric'}",
)
def matmulnbits(request, shared, bundle) -> Path:
    head, symmetric = request.param
    step = quantize_pass(4, 32, head=head, symmetric=symmetric)
    return shared(f"odd-head-{head}-{symmetric}", lambda path: derived(bundle, path, step))


def assert_shared_rows_are_the_heads(quantized: Path, output: Path, table: np.ndarray) -> None:
    result = glmexport("embed", quantized, "-o", output, "--dtype", "shared", "-q")
    assert (result.status, result.stderr) == (0, "")
    (record,) = quantized_matrices(output, "lm").values()
    assert f"the embedding is the LM head's int{record['bits']} rows, relative error" in result.stdout
    assert f"relative error {record['relative_error']:.2e}" in result.stdout
    assert manifest_of(output)["embedding"] == {"kind": "shared"}
    gone = {*contents(quantized)} - {*contents(output)}
    assert gone == {"embedding.onnx", "embedding.onnx.data"}
    assert not [name for name in contents(output) if name.endswith(".bin")]
    expected = decoded(output, "lm", "lm_head.weight")
    ids = np.array([[0, 1, 39, 40, 1895, 1896], [7, 7, 300, 5, 1896, 0]])
    with Session(open_bundle(output)) as session:
        np.testing.assert_array_equal(session.embed(ids), expected[ids].transpose(1, 0, 2))
        whole = session.embed(np.arange(1897)[None])[:, 0]
    np.testing.assert_array_equal(whole, expected)
    assert distance(whole, table) == pytest.approx(record["relative_error"], rel=1e-4)


def test_shared_rows(matmulnbits, table, tmp_path):
    assert_shared_rows_are_the_heads(matmulnbits, tmp_path / "shared", table)


@pytest.mark.parametrize("group_size", [64, 128, "channel"])
def test_shared_rows_in_groups_of_other_sizes(bundle, table, tmp_path, group_size):
    derived(bundle, tmp_path / "q", quantize_pass(4, group_size, head=4, symmetric=False))
    assert_shared_rows_are_the_heads(tmp_path / "q", tmp_path / "shared", table)


def test_a_wrong_scale_is_seen_in_the_rows(bundle, tmp_path):
    """So the comparison above can fail."""
    derived(bundle, tmp_path / "shared", quantize_pass(4), SHARE)
    before = decoded(tmp_path / "shared", "lm", "lm_head.weight")
    place = place_of(tmp_path / "shared", "lm", "lm_head.weight.scales")
    values = np.frombuffer(place.read(), "<f4").copy()
    values[3 * 2 + 1] *= 2
    rewrite(place, values.tobytes())
    record_again(tmp_path / "shared", "lm.onnx.data")
    with Session(open_bundle(tmp_path / "shared")) as session:
        found = session.embed(np.arange(1897)[None])[:, 0]
    assert np.flatnonzero((found != before).any(-1)).tolist() == [3]
    np.testing.assert_array_equal(found[3, 32:], 2 * before[3, 32:])


def test_shared_rows_after_slimming(bundle, tmp_path):
    for number, steps in enumerate(
        (
            [SlimPass(), quantize_pass(8), SHARE],
            [quantize_pass(8), SlimPass(), SHARE],
            [quantize_pass(8), SHARE, SlimPass()],
        )
    ):
        target = tmp_path / str(number)
        derived(bundle, target, *steps)
        expected = decoded(target, "lm", "lm_head.weight")
        assert expected.shape == (1857, HIDDEN)
        with Session(open_bundle(target)) as session:
            np.testing.assert_array_equal(session.embed(np.arange(1857)[None])[:, 0], expected)


def test_sharing_is_refused_where_it_cannot_be(shared, bundle, tmp_path):
    assert_one_sentence(
        glmexport("embed", bundle, "-o", tmp_path / "s", "--dtype", "shared"), "quantize the head first (--lm-bits 8)"
    )
    derived(bundle, tmp_path / "float-head", quantize_pass(4, head=None))
    result = glmexport("embed", tmp_path / "float-head", "-o", tmp_path / "s", "--dtype", "shared")
    assert_one_sentence(result, "while the head is float32", "quantize the head first")
    derived(plain_bundle(shared), tmp_path / "untied", quantize_pass(4))
    result = glmexport("embed", tmp_path / "untied", "-o", tmp_path / "s", "--dtype", "shared")
    assert_one_sentence(result, "the checkpoint is not tied", "store a raw embedding instead")
    source = plain_checkpoint(shared)
    options = ["--opset", OPSET, "--embedding", "shared", "--quantize", "int4"]
    assert_one_sentence(glmexport("split", source, "-o", tmp_path / "s", *options), "the checkpoint is not tied")
    assert not (tmp_path / "s").exists()


def test_tied_is_detected_and_not_assumed(shared, bundle, tmp_path):
    assert manifest_of(bundle)["tied"] is True
    assert manifest_of(plain_bundle(shared))["tied"] is False
    derived(plain_bundle(shared), tmp_path / "raw", BF16)
    assert manifest_of(tmp_path / "raw")["tied"] is False
    np.testing.assert_array_equal(
        floats(bundle, "lm", "lm_head.weight"), floats(bundle, "embedding", "word_embeddings.weight")
    )


# Bundles whose table is not what the manifest says


@pytest.mark.parametrize("change", [-2, 2, -1])
def test_a_table_of_another_size_is_refused(bf16, tmp_path, change):
    copy = shutil.copytree(bf16, tmp_path / "copy")
    path = copy / "word_embeddings_bf16.bin"
    data = path.read_bytes() + b"xx"
    path.write_bytes(data[: len(data) - 2 + change])
    record_again(copy, path.name)
    with pytest.raises(BundleError, match="expected 151760 bytes; embed the bundle again"):
        open_bundle(copy)


def test_a_table_that_is_gone_when_it_is_mapped(bf16, tmp_path):
    copy = shutil.copytree(bf16, tmp_path / "copy")
    opened = open_bundle(copy)
    (copy / "word_embeddings_bf16.bin").unlink()
    with Session(opened) as session, pytest.raises(BundleError, match="found no such file"):
        session.embed(np.array([[1]]))


def test_shared_rows_are_not_rounded(bundle, tmp_path):
    result = glmexport("embed", bundle, "-o", tmp_path / "x", "--dtype", "shared", "--rounding", "truncate")
    assert_one_sentence(result, "leave --rounding out")
