"""`glmexport bench`: rows beside their bounds, as a table, JSON and a picture; how fast anything is is not tested."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, record_again
from derived_bundles import assert_one_sentence, derived, glmexport, quantize_pass
from flavor_bundles import flavor_bundle, manifest_with

from glmexport import bench as bench_module
from glmexport import names
from glmexport.bench import BenchOptions, Start, bench, filled_cache, progress_total
from glmexport.errors import BundleError, GlmExportError
from glmexport.form import RAW, EmbeddingForm
from glmexport.machine import Memory
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.session import Session
from glmexport.slot_cache import SlotCache

FEW = ("--past", "16", "--batch", "1,2", "--prefill", "16")
ROW = {"kind", "batch", "past", "length", "ms", "bound_ms", "tokens_per_s", "bandwidth_gb_s"}
START = Start(load_s=0.5, first_token_s=0.75, peak_rss_bytes=100_000_000, kv_bytes=1000)


@pytest.fixture(scope="module")
def of(shared):
    """`of(flavor)`: the odd checkpoint, split with that `--flavor`; never change it."""
    return lambda flavor: flavor_bundle(shared, flavor)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Every row is measured twice and the bandwidth in one go."""
    for name, value in {"LEAST_RUNS": 1, "LEAST_SECONDS": 0.0, "BURST_SECONDS": 0.0, "BANDWIDTH_SECONDS": 0.0}.items():
        monkeypatch.setattr(bench_module, name, value)
    monkeypatch.setattr("glmexport.machine.READING_BYTES", 1 << 22)


@pytest.fixture
def start_told(monkeypatch):
    """What another process would measure, which takes a second, is given."""
    monkeypatch.setattr(bench_module, "_start_apart", lambda bundle, options: START)


def measured(bundle: Path, **options):
    return bench(bundle, BenchOptions(**options), lambda what, count: None)


def assert_plausible(document: dict, rows: list[tuple[str, int, int, int]]) -> None:
    assert [(row["kind"], row["batch"], row["past"], row["length"]) for row in document["rows"]] == rows
    for row in document["rows"]:
        assert {*row} == ROW
        assert row["ms"] > 0
        assert row["bound_ms"] > 0
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] * row["length"] / row["ms"])
    assert document["bandwidth_gb_s"] > 0.001


def test_the_json_has_what_programs_read(of, tmp_path):
    """All of it, with the other process."""
    files = ("--json", tmp_path / "bench.json", "--plot", tmp_path / "bench.png")
    done = glmexport("bench", of("both"), *FEW, *files, "--threads", "1")
    assert done.status == 0, done.stderr
    document = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert_plausible(document, [("prefill", 1, 0, 16), ("decode", 1, 16, 1), ("decode", 2, 16, 1)])
    assert document["flavor"] == "ort"
    assert 0 < document["load_s"] < document["first_token_s"]
    assert 20_000_000 < document["peak_rss_bytes"] < 4_000_000_000
    assert document["left_out"] == []
    with Session(of("both"), flavor="ort") as session:
        assert document["kv_bytes"] == session.kv_bytes(1, 1025)
        assert document["weight_bytes"] == sum(session.graph_sizes.values()) - session.graph_sizes["embedding"]
    assert (tmp_path / "bench.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len((tmp_path / "bench.png").read_bytes()) > 10_000
    lines = [line.split() for line in done.stdout.splitlines()]
    for row in document["rows"]:
        cells = [row["kind"], *(str(row[key]) for key in ("batch", "past", "length"))]
        assert any(line[:4] == cells for line in lines), done.stdout
    assert re.search(r"ort: weights .* GB/s; loaded in \d+\.\d s, first token after", done.stdout)
    assert "[ 25%] prefill 1 x 16" in done.stderr


@pytest.mark.usefixtures("start_told")
@pytest.mark.parametrize(
    ("kind", "asked", "flavor"),
    [
        ("both", (), "ort"),
        ("both", ("--flavor", "portable"), "portable"),
        ("portable", (), "portable"),
        ("ort", (), "ort"),
    ],
)
def test_every_flavor_is_measured(of, kind, asked, flavor):
    done = glmexport("bench", of(kind), *FEW, *asked, "--json", "-", "-q")
    assert (done.status, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["flavor"] == flavor
    assert_plausible(document, [("prefill", 1, 0, 16), ("decode", 1, 16, 1), ("decode", 2, 16, 1)])
    assert {key: document[key] for key in ("load_s", "peak_rss_bytes", "kv_bytes")} == {
        "load_s": 0.5,
        "peak_rss_bytes": 100_000_000,
        "kv_bytes": 1000,
    }


@pytest.mark.usefixtures("start_told")
def test_bounds_are_what_is_read_over_the_bandwidth(of):
    report = measured(of("both"), pasts=(16, 1000), batches=(1, 3), lengths=(16,), threads=1)
    with Session(of("both")) as session:
        weights = sum(size for name, size in session.graph_sizes.items() if name != names.EMBEDDING)
        for row in report.rows:
            cache = session.kv_bytes(row.batch, row.past + row.length) if row.kind == "decode" else 0
            assert row.bound_ms == pytest.approx((weights + cache) / row.bandwidth_gb_s / 1e6)
            assert row.ratio == row.ms / row.bound_ms
    assert report.weight_bytes == weights
    assert report.as_json()["bandwidth_gb_s"] == report.bandwidth / 1e9


@pytest.mark.usefixtures("start_told")
def test_quantized_forms_are_measured(of, tmp_path):
    derived(of("both"), tmp_path / "int4", quantize_pass(4), EmbedPass(EmbeddingForm(RAW, "bfloat16")))
    report = measured(tmp_path / "int4", pasts=(16,), batches=(1,), lengths=(8,), threads=1)
    assert len(report.rows) == 2
    with Session(tmp_path / "int4") as session:
        assert report.weight_bytes == sum(session.graph_sizes.values()), "the rows of the embedding are no graph"


@pytest.mark.usefixtures("start_told")
def test_a_bundle_for_mnn_is_measured(of, tmp_path):
    pytest.importorskip("MNN")
    assert glmexport("convert", "mnn", of("portable"), "-o", tmp_path / "mnn", "-q").status == 0
    done = glmexport("bench", tmp_path / "mnn", *FEW, "--json", "-", "-q")
    assert done.status == 0, done.stderr
    assert_plausible(json.loads(done.stdout), [("prefill", 1, 0, 16), ("decode", 1, 16, 1), ("decode", 2, 16, 1)])
    assert_one_sentence(glmexport("bench", tmp_path / "mnn", *FEW, "--flavor", "ort", "-q"), "none of 'ort'")


def test_quick_runs_are_many_between_two_readings(monkeypatch):
    """A reading takes as long as thousands of them, and empties the processor's caches."""
    monkeypatch.setattr(bench_module, "LEAST_SECONDS", 0.02)
    monkeypatch.setattr(bench_module, "BURST_SECONDS", 0.01)
    done = Counter()

    class Reader:
        def read(self, seconds: float) -> float:
            done["readings"] += 1
            return 1e9

    seconds, bandwidth = bench_module._medians(lambda: done.update(runs=1), Reader())
    assert 0 < seconds < 0.01
    assert bandwidth == 1e9
    assert done["runs"] > 10 * done["readings"]


def test_a_step_is_profiled_by_operator(of):
    script = ROOT / "benchmarks" / "profile_step.py"
    command = [sys.executable, script, of("ort"), "--past", "20", "--batch", "2", "--runs", "2", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert {"Attention", "TensorScatter", "MatMul"} <= {*found}
    assert all(time >= 0 for time in found.values())
    assert sum(found.values()) > 0
    assert [*found.values()] == sorted(found.values(), reverse=True)


@pytest.mark.usefixtures("start_told")
def test_what_the_model_has_no_positions_for_is_left_out(of, tmp_path):
    shutil.copytree(of("ort"), tmp_path / "short")
    manifest_with(tmp_path / "short", lambda manifest: manifest["model"].update(max_positions=40))
    report = measured(tmp_path / "short", pasts=(16, 39, 40, 1900), batches=(1,), lengths=(1, 2, 16, 39, 40, 64))
    found = [(row.kind, row.past, row.length) for row in report.rows]
    prefill = [("prefill", 0, length) for length in (2, 16, 39)]
    assert found == [*prefill, ("decode", 16, 1), ("decode", 39, 1)]
    assert report.left_out == [
        "prompts of length 1, 40, 64 (the model takes 2 to 39 tokens)",
        "histories of length 40, 1900 (the model has 40 positions)",
    ]


@pytest.mark.usefixtures("start_told")
@pytest.mark.parametrize("flavor", ["portable", "ort"])
def test_what_memory_is_too_small_for_is_left_out_with_a_notice(of, monkeypatch, flavor):
    with Session(of("both"), flavor=flavor) as session:
        needed = session.held_kv_bytes(2, 17) * (1 if flavor == "ort" else 3)
    available = int(needed / bench_module.SHARE) + 2
    monkeypatch.setattr(bench_module, "read_memory", lambda: Memory(available, available, None))
    options = ("--past", "16,300", "--batch", "1,2", "--prefill", "16", "--flavor", flavor)
    done = glmexport("bench", of("both"), *options, "--json", "-")
    assert done.status == 0, done.stderr
    document = json.loads(done.stdout)
    assert [(row["batch"], row["past"]) for row in document["rows"]] == [(1, 0), (1, 16), (2, 16)]
    assert [text.partition(" (")[0] for text in document["left_out"]] == ["decode 1 x 300", "decode 2 x 300"]
    for text in document["left_out"]:
        assert "memory is too small" in text
        assert f"Note: Left out: {text}." in done.stderr


@pytest.mark.usefixtures("start_told")
def test_progress_is_told_at_most_as_often_as_promised(of):
    options = BenchOptions(pasts=(16, 5000), batches=(1, 2), lengths=(16, 32), threads=1)
    times = []
    bench(of("ort"), options, lambda what, count: times.append(count))
    assert sum(times) == progress_total(options) - 2


@pytest.mark.parametrize(
    "options",
    [
        *(("--past", text) for text in ("a", "1,b", "-1", "0", "1.5", "9999999", "²")),
        *((("--batch", "0"), ("--prefill", "16;64"))),
        *(
            (
                ("--flavor", "fast"),
                ("--threads", "0"),
                ("--serve", "--plot", "bench.png"),
                ("--serve", "--past", "16"),
                ("--serve", "--batch", ""),
            )
        ),
    ],
)
def test_lists_that_are_none_are_refused(of, options):
    done = glmexport("bench", of("ort"), *options)
    assert done.status == 2
    assert done.stdout == ""
    assert options[0] in done.stderr
    if options[0] in ("--past", "--batch", "--prefill"):
        assert "is no list of numbers from 1 up, such as 1,2,4." in done.stderr


def test_numbers_below_one_are_refused():
    for options in ({"pasts": (0,)}, {"batches": (1, -1)}, {"lengths": (0,)}):
        with pytest.raises(GlmExportError, match="must be 1 or more"):
            BenchOptions(**options)
    assert BenchOptions(pasts=(), batches=(), lengths=())


@pytest.mark.usefixtures("start_told")
def test_lists_are_sorted_each_number_once_and_may_be_empty(of):
    done = glmexport("bench", of("ort"), "--past", " 32, 16,16", "--batch", "1", "--prefill", "", "--json", "-", "-q")
    assert [row["past"] for row in json.loads(done.stdout)["rows"]] == [16, 32]
    done = glmexport("bench", of("ort"), "--past", "", "--prefill", "", "-q")
    assert (done.status, done.stderr) == (0, "")


def test_what_cannot_be_run_is_one_sentence(of, tmp_path):
    copy = shutil.copytree(of("ort"), tmp_path / "copy")
    path = copy / "ort" / "glm_block_1.onnx"
    count = path.stat().st_size
    path.unlink()
    path.write_bytes(b"\xff" * count)
    record_again(copy, "ort/glm_block_1.onnx")
    assert_one_sentence(glmexport("bench", copy, *FEW, "-q"), "could not be run", "glm_block_1.onnx is not a readable")
    assert_one_sentence(glmexport("bench", tmp_path, *FEW, "-q"))
    done = glmexport("bench", of("portable"), *FEW, "-q", "--flavor", "ort")
    assert_one_sentence(done, "none of 'ort'; split with --flavor both")


@pytest.mark.usefixtures("start_told")
def test_outputs_that_cannot_be_written_are_told_before_anything_is_measured(of, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "bench", None)
    for options in (("--json", tmp_path / "no" / "x.json"), ("--plot", tmp_path / "no" / "x.png")):
        assert_one_sentence(glmexport("bench", of("ort"), *FEW, *options))
    assert_one_sentence(glmexport("bench", of("ort"), *FEW, "--plot", tmp_path / "x.svg"), ".png")
    assert_one_sentence(glmexport("bench", of("ort"), *FEW, "--json", of("ort") / "x.json"))


@pytest.mark.parametrize("flavor", ["portable", "ort"])
def test_a_filled_cache_holds_numbers_and_has_room(of, flavor):
    with Session(of("both"), flavor=flavor, threads=1) as session:
        config, cache = session.config, filled_cache(session, 3, 70)
        shape = (3, config.num_heads, 70, config.head_dim)
        if isinstance(cache, SlotCache):
            assert cache.capacity == 128
            arrays = [array[:, :, :70] for array in (*cache.keys, *cache.values)]
        else:
            arrays = [array.transpose(1, 2, 0, 3) for past in cache for array in past]
        assert len(arrays) == 2 * config.num_blocks
        for array in arrays:
            assert array.shape == shape
            assert np.abs(array).min(axis=-1).max() > 0
            assert np.array_equal(array, arrays[0])


def test_a_damaged_answer_of_the_other_process_is_a_sentence(of, monkeypatch):
    monkeypatch.setattr("glmexport.bench.sys.executable", "/bin/false")
    with pytest.raises(BundleError, match=r"could not be run \(nothing\)\.$"):
        measured(of("ort"), pasts=(), batches=(), lengths=())
