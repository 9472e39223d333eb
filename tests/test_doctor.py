"""What a computer has is read from texts put in its place; what a model needs is held against numbers by hand."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from derived_bundles import assert_one_sentence, derived, glmexport, quantize_pass

from glmexport import doctor, machine
from glmexport.bundle import open_bundle
from glmexport.doctor import (
    CHATGLM_6B,
    FITS,
    PROCESS_BYTES,
    STREAMS,
    TOO_LARGE,
    UNKNOWN,
    FormNeeds,
    advise,
    bundle_needs,
    examine,
    form_needs,
    judge,
    memory_limit,
)
from glmexport.form import RAW, EmbeddingForm
from glmexport.machine import Cpu, Memory, read_bandwidth, read_cpu, read_memory
from glmexport.passes.raw_embedding import EmbedPass

GB = 10**9
MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:   12000000 kB\nHugePages_Total: 0\n"
SERVER = (
    "processor\t: 0\nvendor_id\t: X\nmodel name\t: Server 9000\nflags\t\t: fpu avx avx2 avx512f avx512_vnni\n\n"
    "processor\t: 1\nmodel name\t: Server 9000\nflags\t\t: fpu avx avx2 avx512f avx512_vnni\n"
)
LAPTOP = "processor\t: 0\nmodel name\t: Laptop: the 12th\nflags\t\t: fpu avx avx2 avx_vnni\n"
OLD = "processor\t: 0\nmodel name\t: Old 3000\nflags\t\t: fpu sse4_2 avx avx2_but_not_quite\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\n\nHardware\t: Board 5\n"


def system(root: Path, **files: str) -> Path:
    """A root directory with these files; `__` stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return root


def cgroup(root: Path, own: str, **groups: dict[str, str]) -> Path:
    """A root with MEMINFO and control groups (`top`, or `__` for a slash); own: the text of /proc/self/cgroup."""
    system(root, proc__meminfo=MEMINFO, proc__self__cgroup=own)
    for name, files in groups.items():
        directory = root / "sys/fs/cgroup" / name.removeprefix("top").replace("__", "/").lstrip("/")
        directory.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (directory / file).write_text(text, "utf-8")
    return root


# The processor


@pytest.mark.parametrize(
    ("text", "model", "features", "products"),
    [
        (SERVER, "Server 9000", {"AVX2": True, "AVX512F": True, "AVX512-VNNI": True, "AVX-VNNI": False}, True),
        (LAPTOP, "Laptop: the 12th", {"AVX2": True, "AVX512F": False, "AVX512-VNNI": False, "AVX-VNNI": True}, True),
        (OLD, "Old 3000", {"AVX2": False, "AVX512F": False, "AVX512-VNNI": False, "AVX-VNNI": False}, False),
        (ARM, "Board 5", {"dotprod": True, "i8mm": True}, True),
        (ARM.replace(" asimddp i8mm", ""), "Board 5", {"dotprod": False, "i8mm": False}, False),
        ("processor: 0\n", None, {}, None),
        ("", None, {}, None),
    ],
)
def test_features_of_a_processor(tmp_path, text, model, features, products):
    cpu = read_cpu(system(tmp_path, proc__cpuinfo=text))
    assert (cpu.model, cpu.features, cpu.integer_products) == (model, features, products)
    assert cpu.cores >= 1


def test_a_computer_without_proc_is_unknown(tmp_path):
    assert read_cpu(tmp_path).model is None
    assert read_memory(tmp_path) == Memory(None, None, None)


@pytest.mark.parametrize(
    ("machine", "answers", "features", "products"),
    [
        ("arm64", {"arm.FEAT_DotProd": "1", "arm.FEAT_I8MM": "0"}, {"dotprod": True, "i8mm": False}, True),
        (
            "x86_64",
            {"avx2_0": "1", "avx512f": "0", "avx512vnni": "0"},
            {"AVX2": True, "AVX512F": False, "AVX512-VNNI": False},
            False,
        ),
        ("x86_64", {"avx2_0": "1"}, {"AVX2": True, "AVX512F": None, "AVX512-VNNI": None}, None),
        ("sparc", {}, {}, None),
    ],
)
def test_macos_is_asked_by_sysctl(monkeypatch, machine, answers, features, products):
    table = {f"hw.optional.{key}": value for key, value in answers.items()}
    table |= {"machdep.cpu.brand_string": "M7", "hw.memsize": "17179869184", "kern.memorystatus_level": "50"}
    monkeypatch.setattr(platform, "machine", lambda: machine)
    cpu = read_cpu(sysctl=table.get)
    assert (cpu.model, cpu.features, cpu.integer_products) == ("M7", features, products)
    assert read_memory(sysctl=table.get) == Memory(17179869184, 8589934592)
    assert read_memory(sysctl=lambda name: None) == Memory(None, None)


def test_sysctl_that_is_not_there_says_nothing():
    assert machine._sysctl("no.such.value") is None


# Memory


def test_memory_of_linux(tmp_path):
    assert read_memory(system(tmp_path, proc__meminfo=MEMINFO)) == Memory(16_384_000_000, 12_288_000_000)


STAT = "anon 1\nfile 3\nactive_file 7\ninactive_file 500\n"


@pytest.mark.parametrize(
    ("own", "groups", "available", "limit"),
    [
        # version 2: the process's own group, its parent, the top of a container
        ("0::/a/b\n", {"a__b": {"memory.max": "4000", "memory.current": "1000", "memory.stat": STAT}}, 3500, 4000),
        ("0::/a/b\n", {"a__b": {"memory.max": "max"}, "a": {"memory.max": "5000", "memory.current": "5600"}}, 0, 5000),
        ("0::/not/here\n", {"top": {"memory.max": "9000", "memory.current": "2000"}}, 7000, 9000),
        (
            "0::/a\n",
            {
                "a": {"memory.max": "8000", "memory.current": "1000"},
                "top": {"memory.max": "9000", "memory.current": "8500"},
            },
            500,
            8000,
        ),
        ("0::/\n", {"top": {"memory.max": "max\n", "memory.current": "7"}}, 12_288_000_000, None),
        # a limit above what the machine has is none
        ("0::/\n", {"top": {"memory.max": "99000000000", "memory.current": "0"}}, 12_288_000_000, None),
        # version 1
        (
            "9:name=systemd:/\n4:cpu,memory:/x\n0::/\n",
            {"memory__x": {"memory.limit_in_bytes": "6000\n", "memory.usage_in_bytes": "1000\n"}},
            5000,
            6000,
        ),
        (
            "4:memory:/docker/host-only\n",
            {
                "memory": {
                    "memory.limit_in_bytes": "6000",
                    "memory.usage_in_bytes": "5000",
                    "memory.stat": "inactive_file 1\ntotal_inactive_file 900\n",
                }
            },
            1900,
            6000,
        ),
        ("4:memory:/\n", {"memory": {"memory.limit_in_bytes": str(2**63 - 4096)}}, 12_288_000_000, None),
        ("nonsense\n4:memory\n\n", {}, 12_288_000_000, None),
    ],
)
def test_a_cgroup_limits_memory(tmp_path, own, groups, available, limit):
    assert read_memory(cgroup(tmp_path, own, **groups)) == Memory(16_384_000_000, available, limit)


@pytest.mark.parametrize(("available", "expected"), [(None, None), (20 * GB, 16 * GB), (1_000_000_001, 800_000_000)])
def test_the_recommended_limit_is_a_round_part(available, expected):
    assert memory_limit(available) == expected


# Bandwidth


@pytest.mark.parametrize(("threads", "available"), [(1, 1 << 24), (2, 1 << 24), (3, 0)])
def test_bandwidth_is_read_even_without_time(threads, available):
    assert read_bandwidth(threads, available, seconds=0.0) > 1e6


# What a model needs

BLOCK_WEIGHTS = 12 * 4096**2
BLOCK_REST = 3 * 4096 + 4096 + 16384 + 4096 + 4 * 4096  # biases and two norms
HEAD_WEIGHTS = 130528 * 4096
KV = 28 * 2 * 2048 * 4096 * 4


def needs(name: str) -> FormNeeds:
    (form,) = [form for form in form_needs(CHATGLM_6B) if form.name.startswith(name)]
    return form


def test_float32_by_hand():
    form = needs("float32")
    assert form.per_token == 4 * (28 * (BLOCK_WEIGHTS + BLOCK_REST) + HEAD_WEIGHTS + 2 * 4096) == 24_693_145_600
    assert form.disk == form.per_token + 4 * HEAD_WEIGHTS == 26_831_716_352
    assert form.memory == form.disk + KV == 28_710_764_544
    assert form.largest == 4 * (HEAD_WEIGHTS + 2 * 4096) + KV
    assert 2 * needs("float16").disk == form.disk


def test_int4_by_hand():
    block = BLOCK_WEIGHTS // 2 + BLOCK_WEIGHTS // 32 * 4 + 4 * BLOCK_REST
    head = HEAD_WEIGHTS + HEAD_WEIGHTS // 32 * 4 + 4 * 2 * 4096
    form = needs("int4 group 32")
    assert block == 126_042_112, "128 bytes less than the measured file, which holds some constants"
    assert form.per_token == 28 * block + head == 4_130_684_928
    assert form.disk == form.per_token + 2 * HEAD_WEIGHTS
    scales = 28 * BLOCK_WEIGHTS // 32 * 4 + HEAD_WEIGHTS // 32 * 4
    assert form.memory == form.per_token + scales + KV, "the bfloat16 embedding is mapped, not held"
    assert 4.80e9 < form.per_token + scales < 1.03 * 4.80e9, "what onnxruntime was measured to hold"
    assert form.largest == head + KV


def test_group_128_by_hand():
    head = HEAD_WEIGHTS + HEAD_WEIGHTS // 128 * 4 + 4 * 2 * 4096
    small = 28 * 4 * BLOCK_REST
    scales = 28 * BLOCK_WEIGHTS // 128 * 4
    assert needs("int8 group 128").per_token == 28 * BLOCK_WEIGHTS + scales + small + head
    assert needs("int4 group 128").per_token == 14 * BLOCK_WEIGHTS + scales + small + head


def test_the_model_is_the_references():
    from glmexport.models.chatglm_6b import ChatGLMConfig, reference_config

    ours, default = reference_config(CHATGLM_6B), ChatGLMConfig()
    for field in ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size"):
        assert getattr(ours, field) == getattr(default, field)
    for field in ("max_sequence_length", "bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id"):
        assert getattr(ours, field) == getattr(default, field)


def test_the_sizes_are_those_of_real_bundles(bundle, tmp_path):
    """Parameters and quantized matrices as the manifests count them; graph files and padding come on top."""
    opened = open_bundle(bundle)
    plain = form_needs(opened.config)[0]
    counts = {entry["name"]: 4 * entry["parameters"] for entry in opened.graphs}
    assert sum(counts.values()) == plain.disk
    assert sum(counts.values()) - counts["embedding"] == plain.per_token
    derived(bundle, tmp_path / "int4", EmbedPass(EmbeddingForm(RAW, "bfloat16")), quantize_pass(4, 32))
    int4 = open_bundle(tmp_path / "int4")
    form = next(form for form in form_needs(int4.config) if form.name == "int4 group 32")
    stored = sum(record["bytes"] for entry in int4.graphs for record in entry["matrices"].values())
    matrices = opened.config.num_blocks * (4 * 40 * 40 + 2 * 300 * 40) + opened.config.vocab_size * 40
    assert form.per_token == stored + plain.per_token - 4 * matrices
    real = bundle_needs(int4)
    assert real.per_token > form.per_token
    assert real.disk == real.per_token + int4.files["word_embeddings_bf16.bin"].bytes
    assert bundle_needs(opened).disk > plain.disk
    scales = real.memory - real.per_token - form.memory + form.per_token
    assert abs(scales) < 0.1 * (form.memory - form.per_token), "widths that no group divides are a little more"


# What follows


def form_of(memory: int, largest: int = 10, per_token: int = 100) -> FormNeeds:
    return FormNeeds("form", 50, memory, largest, per_token)


@pytest.mark.parametrize(
    ("available", "verdict", "speed"),
    [
        (1000 + PROCESS_BYTES, FITS, 5.0),
        (999 + PROCESS_BYTES, STREAMS, None),
        (10 + PROCESS_BYTES, STREAMS, None),
        (9 + PROCESS_BYTES, TOO_LARGE, None),
        (None, UNKNOWN, 5.0),
    ],
)
def test_a_form_fits_streams_or_neither(available, verdict, speed):
    report = judge(form_of(1000), available, 500.0)
    assert (report.verdict, report.tokens_per_second) == (verdict, speed)
    assert judge(form_of(1000), available, None).tokens_per_second is None


def advice(**changes) -> str:
    """All sentences about a computer that lacks nothing but what is changed."""
    available = changes.pop("available", 64 * GB)
    forms = tuple(judge(form, available, None) for form in form_needs(CHATGLM_6B))
    facts = {
        "cpu": Cpu("x", 2, {"AVX2": True, "AVX512-VNNI": True, "AVX-VNNI": False}),
        "memory": Memory(64 * GB, available),
        "disk_free": 100 * GB,
        "forms": forms,
        "versions": {"torch": "2"},
        "providers": ("AzureExecutionProvider", "CPUExecutionProvider"),
    }
    return "\n".join(advise(**{**facts, **changes}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"cpu": Cpu("x", 2, {"AVX2": True, "AVX512-VNNI": False, "AVX-VNNI": False})},
            "neither AVX512-VNNI nor AVX-VNNI: int8 products",
        ),
        ({"cpu": Cpu("x", 2, {"dotprod": False, "i8mm": False})}, "has no dotprod: int8 products"),
        ({"cpu": Cpu("x", 2, {"AVX2": False, "AVX-VNNI": True})}, "no AVX2"),
        ({"available": 16 * GB}, "What does not fit runs with --memory-limit 12.8GB"),
        ({"available": 4 * GB}, "too small to hold any form: run with --memory-limit 3.2GB"),
        ({"available": 2 * GB}, "too small even for the largest graph"),
        ({"available": None, "memory": Memory(None, None)}, "available is unknown"),
        ({"memory": Memory(64 * GB, 64 * GB, 8 * GB)}, "A cgroup allows 8.00 GB"),
        ({"disk_free": 10 * GB}, "The largest form, 26.83 GB, does not fit on the disk"),
        ({"disk_free": 4 * GB}, "No form fits on the disk here (4.00 GB free)"),
        ({"versions": {"torch": None}}, "torch is not installed"),
        ({"providers": ("CUDAExecutionProvider", "CPUExecutionProvider")}, "--gpu-memory SIZE"),
    ],
)
def test_advice(changes, sentence):
    text = advice(**changes)
    assert sentence in text
    assert all(line.endswith(".") for line in text.splitlines())


def test_a_computer_that_lacks_nothing_gets_no_advice():
    assert advice() == ""
    assert advice(cpu=Cpu(None, 1, {})) == ""


# All of it


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return examine(bandwidth=False)


def test_this_computer_is_examined(report):
    import onnxruntime

    assert report.versions["onnxruntime"] == onnxruntime.__version__
    assert report.versions["Python"] == platform.python_version()
    assert "CPUExecutionProvider" in report.providers
    assert report.bandwidth is None
    assert report.kv_cache == KV
    assert [form.needs for form in report.forms] == list(form_needs(CHATGLM_6B))
    assert report.disk_free > 0


def test_mnn_is_found_and_never_imported(tmp_path, monkeypatch):
    (tmp_path / "MNN").mkdir()
    (tmp_path / "MNN" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "MNN", raising=False)  # other tests run the real one
    assert examine(bandwidth=False).mnn
    assert "MNN" not in sys.modules


def test_what_is_not_installed_is_none(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("onnxruntime", "no-such-package"))
    assert examine(bandwidth=False).versions["no-such-package"] is None


def test_no_torch_is_loaded():
    code = (
        "import sys; from glmexport.doctor import examine; examine(bandwidth=False)\n"
        "assert not {'torch', 'transformers', 'MNN'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_json(bundle, monkeypatch):
    monkeypatch.setattr(doctor, "read_bandwidth", lambda threads, available: 34e9)
    result = glmexport("doctor", bundle, "--json")
    assert result.status == 0
    document = json.loads(result.stdout)
    assert document["bandwidth"] == 34e9
    assert document["model"]["vocab_size"] == open_bundle(bundle).config.vocab_size
    assert document["forms"][0]["needs"]["name"] == "this bundle, float32"
    assert document["forms"][0]["needs"] == dataclasses.asdict(bundle_needs(open_bundle(bundle)))
    assert document["forms"][0]["tokens_per_second"] == 34e9 / document["forms"][0]["needs"]["per_token"]
    assert {"system", "versions", "cpu", "memory", "disk_free", "providers", "mnn", "advice"} <= set(document)


def test_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "read_memory", lambda: Memory(16 * GB, 12 * GB, 14 * GB))
    monkeypatch.setattr(doctor, "read_cpu", lambda: Cpu("Board [5]", 3, {"dotprod": False, "i8mm": None}))
    monkeypatch.setattr(doctor, "read_bandwidth", lambda threads, available: 34e9)
    result = glmexport("doctor")
    assert (result.status, result.stderr) == (0, "")
    rows = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert "Board [5], 3 usable cores" in result.stdout
    assert "dotprod no, i8mm unknown" in result.stdout
    assert "16.00 GB, 12.00 GB available (a cgroup allows 14.00 GB)" in result.stdout
    assert "34.0 GB/s" in result.stdout
    assert rows["float32"].split("  ")[-1].strip() == "no: streams with --memory-limit 9.6GB"
    assert "8.2  yes" in rows["int4 group 32"], "34 GB/s over 4.13 GB"
    assert "- The processor has no dotprod" in result.stdout


def test_unknown_memory_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "read_memory", lambda: Memory(None, None))
    result = glmexport("doctor", "--no-bandwidth")
    assert result.status == 0
    assert "unknown, unknown available" in result.stdout
    assert "not measured" in result.stdout
    assert all(line.split()[-1] == "unknown" for line in result.stdout.splitlines() if line.startswith("int"))


def test_no_bundle_is_one_sentence(tmp_path):
    assert_one_sentence(glmexport("doctor", tmp_path), "is not a bundle")
