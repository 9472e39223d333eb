"""Weights by name and offset, against torch.load and the safetensors library; and what damaged files are answered."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoints import FORMATS, make_tensors, write_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from glmexport import weights as weights_module
from glmexport.errors import CheckpointError
from glmexport.untrusted import read_json
from glmexport.weights import Weights, read_index

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SMALL = {"vocab_size": 24, "hidden_size": 8, "num_blocks": 1, "heads": 1, "inner": 16}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))


def save_bin(directory: Path, state: object, **kwargs) -> Path:
    path = directory / "pytorch_model.bin"
    torch.save(state, path, **kwargs)
    return path


def rewrite_zip(path: Path, change, compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again with `change(name, data)` in place of each record, None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            changed = change(name, data)
            if changed is not None:
                archive.writestr(name, changed)


def with_pickle(directory: Path, pickled: bytes) -> Path:
    path = save_bin(directory, {"a": torch.zeros(4)})
    rewrite_zip(path, lambda name, data: pickled if name.endswith("/data.pkl") else data)
    return path


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refusal(directory: Path) -> str:
    """The message with which opening is refused; it must be one that names the file."""
    with pytest.raises(CheckpointError) as caught:
        Weights.open(directory)
    assert str(directory) in str(caught.value)
    return str(caught.value)


# What is read


def test_the_golden_checkpoint_bit_by_bit(golden_checkpoint):
    expected = torch.load(golden_checkpoint / "pytorch_model.bin", weights_only=True)
    with Weights.open(golden_checkpoint) as weights:
        assert weights.names() == tuple(expected)
        assert weights.total_bytes == sum(tensor.nbytes for tensor in expected.values())
        assert weights.files == (golden_checkpoint / "pytorch_model.bin",)
        assert all(same(weights.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_and_dtype_bit_by_bit(tmp_path, fmt, dtype):
    write_weights(tmp_path, make_tensors(**SMALL, dtype=dtype, seed=3), fmt)
    expected = {}  # by the independent readers
    for path in tmp_path.iterdir():
        if path.suffix == ".bin":
            expected |= torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            expected |= load_file(path)
    with Weights.open(tmp_path) as weights:
        assert set(weights.names()) == set(expected)
        for name, tensor in expected.items():
            info = weights.info(name)
            assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
            assert info.torch_dtype == tensor.dtype
            assert same(weights.read(name), tensor)
            assert same(weights.read_rows(name, 1, 2), tensor[1:2])


def test_views_strides_and_parameters_of_a_bin(tmp_path):
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    parameter = nn.Parameter(torch.randn(3, 4))
    state = OrderedDict(
        whole=base,
        rows=base[2:4],
        transposed=base.t(),
        inner=base[1:5, 2:8],
        every_other=base[::2],
        permuted=torch.randn(2, 3, 4).permute(2, 0, 1),
        parameter=parameter,
        again=parameter,
        scalar=torch.tensor(3.5, dtype=torch.float64),
        empty=torch.zeros(0, 4),
        one_row=base.t()[:1],
        integers=torch.arange(5),
        truth=torch.tensor([True, False]),
    )
    state._metadata = OrderedDict([("", {"version": 1})])
    expected = torch.load(save_bin(tmp_path, state), weights_only=True)
    with Weights.open(tmp_path) as weights:
        assert weights.names() == tuple(state)
        assert weights.info("transposed").stride == (1, 10)
        assert weights.info("rows").stride is None
        for name, tensor in expected.items():
            read = weights.read(name)
            assert same(read, tensor.detach()), name
            assert read.is_contiguous()
            assert read.untyped_storage().nbytes() == tensor.nbytes, "memory of its own, and no more"
            if tensor.dim() and len(tensor) > 1:
                assert same(weights.read_rows(name, 1, len(tensor)), tensor.detach()[1:]), name


def test_a_module_state_dict_and_a_cuda_location(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).half()
    path = save_bin(tmp_path, model.state_dict())
    cuda = struct.pack("<I", 6) + b"cuda:1"
    rewrite_zip(path, lambda name, data: data.replace(struct.pack("<I", 3) + b"cpu", cuda))
    with Weights.open(tmp_path) as weights:
        assert all(same(weights.read(name), tensor) for name, tensor in model.state_dict().items())


def test_a_bin_without_the_markers_of_new_torch_versions(tmp_path):
    tensors = make_tensors(**SMALL)
    path = save_bin(tmp_path, tensors)
    new = ("byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")
    rewrite_zip(path, lambda name, data: None if name.endswith(new) else data)
    with Weights.open(tmp_path) as weights:
        assert all(same(weights.read(name), tensor) for name, tensor in tensors.items())


def test_read_rows_outside_the_tensor(tmp_path):
    save_file({"a": torch.zeros(4, 2), "s": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    weights = Weights.open(tmp_path)
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(ValueError, match="no rows"):
            weights.read_rows("a", start, stop)
    with pytest.raises(ValueError, match="no rows"):
        weights.read_rows("s", 0, 1)
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        weights.read("b")


def test_safetensors_are_preferred_and_an_index_to_a_single_file(tmp_path):
    for number, fmt in enumerate(("bin", "bin-sharded", "safetensors", "safetensors-sharded")):
        write_weights(tmp_path, {"a": torch.full((2,), float(number)), "b": torch.zeros(1)}, fmt, shards=2)
        with Weights.open(tmp_path) as weights:
            assert weights.read("a")[0] == number


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts the bytes read as Linux reports them")
@pytest.mark.parametrize("fmt", ["bin", "safetensors"])
def test_only_the_bytes_asked_for_are_read_and_nothing_is_mapped(tmp_path, fmt):
    big, size = 200 << 20, 1 << 20
    if fmt == "safetensors":
        header = {
            "big": {"dtype": "U8", "shape": [big], "data_offsets": [0, big]},
            "one": {"dtype": "F16", "shape": [4, size // 8], "data_offsets": [big, big + size]},
        }
        path = tmp_path / "model.safetensors"
        path.write_bytes(safetensors_bytes(header))
        os.truncate(path, path.stat().st_size + big + size)  # a sparse file
    else:
        save_bin(tmp_path, {"big": torch.zeros(big // 8, dtype=torch.uint8), "one": torch.ones(4, size // 8).half()})
        Weights.open(tmp_path)  # the first time imports parts of torch

    def status() -> tuple[int, int]:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["rchar"]), int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    read_before, memory_before = status()
    with Weights.open(tmp_path) as weights:
        tensor = weights.read("one")
        rows = weights.read_rows("one", 1, 2)
        read, memory = status()
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert read - read_before < tensor.nbytes + rows.nbytes + (1 << 18)
    assert memory - memory_before < 16 << 20


def test_threads_read_the_same_file_at_once(tmp_path):
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(32)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Weights.open(tmp_path) as weights, ThreadPoolExecutor(8) as pool:
        names = list(tensors) * 8
        assert all(same(got, tensors[name]) for name, got in zip(names, pool.map(weights.read, names), strict=True))


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_directory_stays_as_it_is_and_may_be_read_only(tmp_path, fmt):
    write_weights(tmp_path, make_tensors(**SMALL), fmt)

    def listing():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.iterdir()}

    before = listing()
    tmp_path.chmod(0o555)
    try:
        with Weights.open(tmp_path) as weights:
            for name in weights.names():
                weights.read(name)
    finally:
        tmp_path.chmod(0o755)
    assert listing() == before


def test_closed_weights_open_their_files_again(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    weights = Weights.open(tmp_path)
    weights.read("a")
    weights.close()
    assert same(weights.read("a"), torch.ones(3))
    weights.close()


# What is refused


def test_no_weight_file(tmp_path):
    assert "pytorch_model.bin.index.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", weights_module.WEIGHT_FILES)
def test_a_git_lfs_pointer_an_empty_file_a_pipe_and_a_broken_link(tmp_path, name):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n")
    assert "git lfs pull" in refusal(tmp_path)
    path.write_bytes(b"")
    assert "download it again" in refusal(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refusal(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    assert "cannot be read" in refusal(tmp_path)


def test_the_legacy_torch_format(tmp_path):
    save_bin(tmp_path, {"a": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    assert "before version 1.6" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"state_dict": {"a": torch.zeros(2)}}, "'state_dict' of type dict; expected a flat dict"),
        ({"a": torch.zeros(2), "epoch": 3}, "'epoch' of type int"),
        ({1: torch.zeros(2)}, "a int of type Tensor"),
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "expected a state dict"),
        ({"a": torch.zeros(1).expand(1000)}, "does not fit the number of its bytes"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"a": nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
        ({"a": torch.zeros([1] * 9)}, "does not fit"),
    ],
)
def test_a_bin_with_anything_but_a_flat_state_dict(tmp_path, state, sentence):
    save_bin(tmp_path, state)
    assert sentence in refusal(tmp_path).replace("FakeTensor", "Tensor")


def test_torchscript_big_endian_compressed_and_foreign_archives(tmp_path):
    path = save_bin(tmp_path, {"a": torch.zeros(100)})
    original = path.read_bytes()
    rewrite_zip(path, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert "compressed record" in refusal(tmp_path)
    path.write_bytes(original)
    rewrite_zip(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    assert "big-endian" in refusal(tmp_path)
    path.write_bytes(original)
    rewrite_zip(path, lambda name, data: None if name.endswith("data.pkl") else data)
    assert "not one that torch.save wrote" in refusal(tmp_path)
    path.write_bytes(original)
    rewrite_zip(path, lambda name, data: None if name.endswith("/data/0") else data)
    assert "truncated or corrupt" in refusal(tmp_path)
    path.write_bytes(original)
    rewrite_zip(path, lambda name, data: data[:-4] if name.endswith("/data/0") else data)
    assert "does not fit the number of its bytes" in refusal(tmp_path)
    path.write_bytes(original)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("pytorch_model/constants.pkl", b"")
    assert "TorchScript" in refusal(tmp_path)


def test_a_view_beyond_its_shortened_record(tmp_path):
    path = save_bin(tmp_path, {"last_rows": torch.zeros(6, 10)[4:]})
    rewrite_zip(path, lambda name, data: data[:-40] if name.endswith("/data/0") else data)
    assert "'last_rows' reaches beyond its data" in refusal(tmp_path)


def test_a_record_whose_own_header_disagrees_with_the_directory(tmp_path):
    path = save_bin(tmp_path, {"a": torch.zeros(100)})
    with zipfile.ZipFile(path) as archive:
        header = next(entry.header_offset for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    original = path.read_bytes()
    path.write_bytes(original[:header] + b"XX" + original[header + 2 :])
    assert "is not where the archive's directory says" in refusal(tmp_path)
    path.write_bytes(original[: header + 28] + b"\xff\xff" + original[header + 30 :])  # the length of its extra field
    assert "is not where the archive's directory says" in refusal(tmp_path)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, over the newer ones
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, protocol):
    marker = tmp_path / "marker"
    with_pickle(tmp_path, pickle.dumps({"a": Payload(marker)}, protocol))
    message = refusal(tmp_path)
    assert not marker.exists()
    assert "system" in message or protocol >= 4  # from 4 on, names come off the pickle's stack: torch refuses that


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload(marker)}))
    assert "no zip archive" in refusal(tmp_path)
    assert not marker.exists()


def test_a_pickle_that_allocates_or_blows_up_is_refused_at_once(tmp_path):
    allocates = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (1 << 44).to_bytes(6, "little") + b"\x85R."
    with_pickle(tmp_path, allocates)
    assert "builtins.bytearray" in refusal(tmp_path)
    # a tuple of twice the tuple before it, 60 times, as a key: hashing it would take 2**60 steps
    step = b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    with_pickle(tmp_path, b"\x80\x02}" + b")" + step + b"K\x01s.")
    assert "shares objects" in refusal(tmp_path)
    # the same of ordered dicts, whose sharing cannot be told from that of tensors: they are counted
    doubled = b"".join(b"ccollections\nOrderedDict\n)Rq%cX\x01\x00\x00\x00ah%cs" % (i + 1, i) for i in range(60))
    with_pickle(tmp_path, b"\x80\x02ccollections\nOrderedDict\n)Rq\x00" + doubled + b".")
    assert "shares objects" in refusal(tmp_path)


def test_a_file_that_changes_between_opening_and_reading(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    weights = Weights.open(tmp_path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="changed its size"):
        weights.read("a")
    path.unlink()
    weights.close()
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights.read("a")


ENTRY = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff" * 8, "fewer than its header announces"),
        (b"abc", "fewer than its header announces"),
        (struct.pack("<Q", 100) + b"{}", "fewer than its header announces"),
        (safetensors_bytes(b"[]"), "expected a JSON object"),
        (safetensors_bytes(b"\xff{}"), "not a JSON object"),
        (safetensors_bytes(b'{"a": NaN}'), "NaN is not JSON"),
        (safetensors_bytes(b'{"a": {}, "a": {}}'), "given twice"),
        (safetensors_bytes(b"[" * 100_000), "not a JSON object"),
        (safetensors_bytes(b'{"a": ' + b"9" * 10_000 + b"}"), "not a JSON object"),
        (safetensors_bytes({"a": 1}), "not an object with dtype"),
        (safetensors_bytes({"a": {"dtype": "F16"}}), "not an object with dtype"),
        (safetensors_bytes({"a": ENTRY | {"dtype": "F4"}}, bytes(12)), "dtype 'F4'"),
        (safetensors_bytes({"a": ENTRY | {"dtype": [1]}}, bytes(12)), "dtype a list"),
        (safetensors_bytes({"a": ENTRY | {"shape": [2, -3]}}, bytes(12)), "no lists of sizes"),
        (safetensors_bytes({"a": ENTRY | {"shape": [True, 6]}}, bytes(12)), "no lists of sizes"),
        (safetensors_bytes({"a": ENTRY | {"shape": [1.0, 6]}}, bytes(12)), "no lists of sizes"),
        (safetensors_bytes({"a": ENTRY | {"shape": [1 << 61, 1 << 61]}}, bytes(12)), "does not fit"),
        (safetensors_bytes({"a": ENTRY | {"shape": [1] * 100_000}}, bytes(12)), "no lists of sizes"),
        (safetensors_bytes({"a": ENTRY | {"data_offsets": [12, 0]}}, bytes(12)), "does not fit"),
        (safetensors_bytes({"a": ENTRY | {"data_offsets": [0]}}, bytes(12)), "no lists of sizes"),
        (safetensors_bytes({"a": ENTRY | {"data_offsets": [4, 16]}}, bytes(16)), "do not begin where"),
        (safetensors_bytes({"a": ENTRY, "b": ENTRY}, bytes(12)), "do not begin where"),
        (safetensors_bytes({"a": ENTRY}, bytes(11)), "it has"),
        (safetensors_bytes({"a": ENTRY}, bytes(13)), "it has"),
    ],
)
def test_damaged_safetensors(tmp_path, content, sentence):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert sentence in refusal(tmp_path)


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 30))
    os.truncate(path, 2 << 30)
    assert "at most" in refusal(tmp_path)
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 1 << 30)
    with pytest.raises(CheckpointError, match="at most"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "file",
    [
        "../m.bin",
        "/m.bin",
        "a/m.bin",
        "a\\m.bin",
        "C:m.bin",
        "..",
        "",
        ".bin",
        "m.py",
        "m.safetensors",
        3,
        None,
        "m\0.bin",
    ],
)
def test_an_index_that_names_other_files_than_shards_beside_it(tmp_path, file):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    assert "expected the plain name of a .bin file" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}'])
def test_an_index_without_a_weight_map(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "needs a `weight_map`" in refusal(tmp_path)


@pytest.mark.parametrize("fmt", ["bin-sharded", "safetensors-sharded"])
def test_index_and_shards_that_disagree(tmp_path, fmt):
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate("abcdef")}
    write_weights(tmp_path, tensors, fmt)
    index = next(tmp_path.glob("*.index.json"))
    weight_map = read_index(index)
    # listed under the wrong file, and not anywhere: both named
    index.write_text(json.dumps({"weight_map": weight_map | {"a": weight_map["b"], "x": weight_map["c"]}}))
    message = refusal(tmp_path)
    assert "2 tensor(s)" in message
    assert "a (" in message
    assert "x (" in message
    # in a shard and unlisted: usable
    index.write_text(json.dumps({"weight_map": {name: file for name, file in weight_map.items() if name != "a"}}))
    with Weights.open(tmp_path) as weights:
        assert same(weights.read("a"), tensors["a"])
    # shards that are not there: all named
    for name in sorted(set(weight_map.values()))[1:]:
        (tmp_path / name).unlink()
    message = refusal(tmp_path)
    assert "names 2 weight file(s)" in message
    assert "00002-of-00003" in message
    assert "00003-of-00003" in message


def test_a_name_in_two_shards_is_read_from_the_listed_one(tmp_path):
    for number in (1, 2):
        save_file(
            {"a": torch.tensor([float(number)]), f"b{number}": torch.zeros(1)}, tmp_path / f"m{number}.safetensors"
        )
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m2.safetensors", "b1": "m1.safetensors"}}))
    with Weights.open(tmp_path) as weights:
        assert weights.read("a") == 2
    index.write_text(json.dumps({"weight_map": {"b1": "m1.safetensors", "b2": "m2.safetensors"}}))
    assert "same unlisted tensors: 'a'" in refusal(tmp_path)


# Anything at all


def opens_or_refuses(directory: Path) -> None:
    with suppress(CheckpointError), Weights.open(directory) as weights:
        for name in weights.names():
            assert weights.read(name).nbytes == weights.info(name).nbytes


@pytest.fixture(scope="module")
def good() -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(12.0).reshape(3, 4).t(), "b": nn.Parameter(torch.ones(5).half())}, buffer)
    return {
        "model.safetensors": safetensors_bytes({"a": ENTRY, "__metadata__": {"format": "pt"}}, bytes(range(12))),
        "pytorch_model.bin": buffer.getvalue(),
        "model.safetensors.index.json": b'{"weight_map": {"a": "model.safetensors"}}',
    }


@FUZZ
@given(name=st.sampled_from(weights_module.WEIGHT_FILES), content=st.binary(max_size=300))
def test_random_bytes(tmp_path_factory, name, content):
    directory = tmp_path_factory.mktemp("random")
    prefix = b"PK\x03\x04" if name.endswith(".bin") and len(content) % 2 else b""
    (directory / name).write_bytes(prefix + content)
    opens_or_refuses(directory)


@settings(FUZZ, max_examples=100)
@given(data=st.data(), name=st.sampled_from(["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]))
def test_truncated_and_changed_files(tmp_path_factory, good, data, name):
    directory = tmp_path_factory.mktemp("changed")
    content = bytearray(good[name])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        (directory / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            Weights.open(directory)
        return
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    (directory / name).write_bytes(content)
    opens_or_refuses(directory)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pickletools', over odd escapes in strings
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(FUZZ, max_examples=100)
@given(data=st.data())
def test_changed_pickles(tmp_path_factory, good, data):
    directory = tmp_path_factory.mktemp("pickle")
    path = directory / "pytorch_model.bin"
    path.write_bytes(good[path.name])
    with zipfile.ZipFile(path) as archive:
        pickled = bytearray(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
    codes = st.sampled_from([ord(opcode.code) for opcode in pickletools.opcodes]) | st.integers(0, 255)
    for position in data.draw(st.lists(st.integers(0, len(pickled) - 1), min_size=1, max_size=6)):
        pickled[position] = data.draw(codes)
    rewrite_zip(path, lambda name, old: bytes(pickled) if name.endswith("data.pkl") else old)
    opens_or_refuses(directory)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F16", "U8", "F64", "X"]) | JSON,
        "shape": st.lists(st.integers(-2, 8) | st.integers(), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-2, 64), min_size=2, max_size=2) | JSON,
    }
)


@FUZZ
@given(header=st.dictionaries(st.text(max_size=8), ENTRIES | JSON, max_size=3), size=st.integers(0, 64))
def test_random_safetensors_headers(tmp_path_factory, header, size):
    directory = tmp_path_factory.mktemp("header")
    (directory / "model.safetensors").write_bytes(safetensors_bytes(header, bytes(size)))
    opens_or_refuses(directory)


@FUZZ
@given(index=JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=8), st.text() | JSON)}))
def test_random_indexes(tmp_path_factory, index):
    directory = tmp_path_factory.mktemp("index")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    opens_or_refuses(directory)


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_changed_byte_of_a_bin_file_is_found_by_its_checksum(tmp_path):
    tensors = {"table": torch.arange(600.0).reshape(30, 20), "bias": torch.ones(7)}
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path)
    with Weights.open(tmp_path) as weights:
        info = weights.info("table")
        assert info.crc32 is not None
        assert torch.equal(torch.cat(list(weights.read_bands("table", 7))), tensors["table"])
    flip_byte(path, info.offset + 333)
    with Weights.open(tmp_path) as weights:
        assert torch.equal(weights.read("bias"), tensors["bias"])
        with pytest.raises(CheckpointError, match="corrupt: the bytes of 'table' do not have the checksum"):
            weights.read("table")
        with pytest.raises(CheckpointError, match="corrupt: the bytes of 'table' do not have the checksum"):
            list(weights.read_bands("table", 7))


def test_files_saved_without_checksums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(9.0)}, tmp_path / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(before)
    with Weights.open(tmp_path) as weights:
        assert weights.info("a").crc32 is None
        assert torch.equal(weights.read("a"), torch.arange(9.0))


@pytest.mark.parametrize("protocol", [4, 5])
def test_another_pickle_protocol_is_named(tmp_path, protocol):
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    with pytest.raises(
        CheckpointError, match=f"was saved with pickle protocol {protocol}, expected at most 3; save it again"
    ):
        Weights.open(tmp_path)


@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_past_the_page_cache_the_numbers_are_the_same(tmp_path, monkeypatch, fmt):
    monkeypatch.setattr("glmexport.direct_file.CACHED_SHARE", 0.0)
    numbers = torch.arange(1_700_000, dtype=torch.float32)
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "a": numbers, "b": numbers.half().reshape(-1, 17)}
    if fmt == "bin":
        save_bin(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    with Weights.open(tmp_path) as weights:
        assert all(same(weights.read(name), tensor) for name, tensor in tensors.items())
        assert torch.equal(torch.cat(list(weights.read_bands("b", 50_000))), tensors["b"])
