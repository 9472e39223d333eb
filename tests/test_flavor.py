"""Bundles of both flavors: which files there are, what they share, and that every step keeps it so."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import onnx
import pytest
from conftest import record_again, split_directory
from derived_bundles import (
    OPSET,
    assert_intact,
    assert_one_sentence,
    derived,
    glmexport,
    manifest_of,
    odd_checkpoint,
    quantize_pass,
)
from flavor_bundles import DATA, FLAVORS, GRAPHS, flavor_bundle, manifest_with, relative_files

from glmexport import bundle_writer
from glmexport.bundle import check_files, open_bundle
from glmexport.checkpoint import open_checkpoint
from glmexport.draft import draft_of_bundle
from glmexport.errors import BundleError, ExportError
from glmexport.form import RAW, SHARED, EmbeddingForm
from glmexport.journal import JOURNAL, Journal
from glmexport.passes.half_weights import HalfWeightsPass
from glmexport.passes.raw_embedding import EmbedPass
from glmexport.passes.slim_vocab import SlimPass
from glmexport.session import Session
from glmexport.splitter import SplitOptions, plan_split, split

pytestmark = pytest.mark.usefixtures("without_equivalence")
TOKENIZER = {"ice_text.model", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def of(shared):
    """`of(flavor)`: the odd checkpoint, split with that `--flavor`; never change it."""
    return lambda flavor: flavor_bundle(shared, flavor)


@pytest.fixture(scope="module")
def both(of) -> Path:
    return of("both")


@pytest.fixture
def copy(both, tmp_path) -> Path:
    """A copy to be changed; its files are its own, each with a name of its own."""
    return shutil.copytree(both, tmp_path / "copy")


def inodes(bundle: Path) -> list[tuple[int, int]]:
    return [((bundle / name).stat().st_ino, (bundle / "ort" / name).stat().st_ino) for name in DATA]


# Files


def test_each_flavor_has_its_files(of):
    portable = {f"{graph}.onnx" for graph in GRAPHS} | {*DATA}
    ort = {f"ort/{name}" for name in portable}
    files = {"portable": portable, "ort": ort, "both": portable | ort}
    for flavor in FLAVORS:
        bundle = of(flavor)
        assert {*relative_files(bundle)} == {*files[flavor], *TOKENIZER, "manifest.json"}
        assert_intact(bundle)
        flavors = ["portable", "ort"] if flavor == "both" else [flavor]
        manifest = manifest_of(bundle)
        assert manifest["flavors"] == flavors
        assert {*manifest["files"]} == {*files[flavor], *TOKENIZER}
        opened = open_bundle(bundle)
        assert list(opened.flavors) == flavors
        assert opened.opset == OPSET, "of the portable graphs, or of those that there would be"


def test_files_of_both_flavors_are_those_of_each_alone(of):
    portable, ort, both = (relative_files(of(flavor)) for flavor in FLAVORS)
    for name, content in both.items():
        if name != "manifest.json":
            assert content == (ort if name.startswith("ort/") else portable)[name], name
    for name in DATA:
        assert portable[name] == ort[f"ort/{name}"]


def test_both_flavors_share_their_data_on_disk(both, of):
    assert all(ours == theirs for ours, theirs in inodes(both))
    opened = open_bundle(both)
    sizes = {name: record.bytes for name, record in opened.files.items()}
    shared = sum(sizes[f"ort/{name}"] for name in DATA)
    assert opened.total_bytes == sum(sizes.values()) - shared
    assert open_bundle(of("ort")).total_bytes == sum(record.bytes for record in open_bundle(of("ort")).files.values())
    on_disk = {(status.st_ino, status.st_size) for status in map(os.stat, map(str, both.rglob("*.*")))}
    assert opened.total_bytes == sum(size for _, size in on_disk) - (both / "manifest.json").stat().st_size


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_nothing_can_be_linked_it_is_copied(shared, both, tmp_path, monkeypatch, number):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    split_directory(odd_checkpoint(shared), tmp_path / "bundle", opset=OPSET, flavor="both")
    assert relative_files(tmp_path / "bundle") == relative_files(both)
    assert all(ours != theirs for ours, theirs in inodes(tmp_path / "bundle"))
    assert_intact(tmp_path / "bundle")


@pytest.mark.parametrize("flavor", FLAVORS)
def test_two_splits_give_the_same_bytes(shared, of, tmp_path, flavor):
    split_directory(odd_checkpoint(shared), tmp_path / "again", opset=OPSET, flavor=flavor)
    assert relative_files(tmp_path / "again") == relative_files(of(flavor))


def test_the_manifest_says_of_each_flavor_what_its_graphs_hold(of):
    both, alone = manifest_of(of("both")), manifest_of(of("ort"))
    for entry, only in zip(both["graphs"], alone["graphs"], strict=True):
        assert {*entry["ort"]} == {"file", "data", "inputs", "outputs", "operators"}
        assert {key: only[key] for key in entry["ort"]} == entry["ort"]
        assert "ort" not in only
        assert {key for key in entry if key not in (*entry["ort"], "ort")} == {*only} - {*entry["ort"]}
        assert [only[key] for key in ("file", "data")] == [f"ort/{only['name']}.onnx", f"ort/{only['name']}.onnx.data"]
        for one, opset in ((entry, OPSET), (entry["ort"], 24)):
            model = onnx.load(of("both") / one["file"], load_external_data=False)
            assert {known.domain: known.version for known in model.opset_import} == {"": opset}
            for listed, values in ((one["inputs"], model.graph.input), (one["outputs"], model.graph.output)):
                shapes = [[dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in values]
                assert [[value["name"], value["shape"]] for value in listed] == [
                    [value.name, shape] for value, shape in zip(values, shapes, strict=True)
                ]
            operators = [node.op_type for node in model.graph.node]
            assert one["operators"] == {name: operators.count(name) for name in sorted({*operators})}
    operators = both["graphs"][1]["ort"]["operators"]
    assert {"TensorScatter": 2, "Attention": 1, "Gelu": 1, "LayerNormalization": 2}.items() <= operators.items()
    assert {"Shape", "Expand", "Where", "Transpose"} & {*operators} <= {"Transpose"}


def test_a_manifest_from_before_there_were_flavors_is_portable(of, tmp_path):
    shutil.copytree(of("portable"), tmp_path / "old")
    manifest_with(tmp_path / "old", lambda manifest: manifest.pop("flavors"))
    opened = open_bundle(tmp_path / "old")
    assert opened.flavors == ("portable",)
    with Session(opened) as session:
        assert session.flavor == "portable"
        session.load()
    derived(tmp_path / "old", tmp_path / "slim", SlimPass())
    assert manifest_of(tmp_path / "slim")["flavors"] == ["portable"]


# Names and entries that must not be


@pytest.mark.parametrize(
    "name",
    [
        *("ort/../x", "other/x", "/etc/passwd", "ort/..", "ort/.", "ort/", "ort//x", "ort/ort/x", "ort/sub/x", "ort"),
        *("./x", "ort/manifest.json", "../ort/x", "/ort/x", "ort/../../x", "ort\n/x", "", "ort/" + 300 * "x"),
    ],
)
def test_names_of_files_elsewhere_are_refused(copy, name):
    def add(manifest):
        manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}

    manifest_with(copy, add)
    with pytest.raises(BundleError, match=r"lists the file .*, expected plain names of files beside the manifest\.$"):
        open_bundle(copy)
    assert_one_sentence(glmexport("inspect", copy), "lists the file")


def change_flavors(value):
    return lambda manifest: manifest.update(flavors=value)


def in_ort(key, value):
    return lambda manifest: manifest["graphs"][1]["ort"].update({key: value})


@pytest.mark.parametrize(
    "change",
    [
        *map(change_flavors, ([], ["ort", "portable"], ["portable", "fast"], "ort", None, ["portable"] * 2, [[]], {})),
        *(in_ort("file", name) for name in ("glm_block_0.onnx", "ort/glm_block_1.onnx", "ort/../glm_block_0.onnx", 3)),
        *(in_ort("data", name) for name in ("glm_block_0.onnx.data", "ort/lm.onnx.data", None)),
        *(in_ort(key, None) for key in ("inputs", "outputs")),
        lambda manifest: manifest["graphs"][1].pop("ort"),
        lambda manifest: manifest["graphs"][1].update(ort=[]),
        lambda manifest: manifest["files"].pop("ort/lm.onnx"),
    ],
)
def test_a_manifest_whose_flavors_are_none_is_refused_in_a_sentence(copy, change):
    manifest_with(copy, change)
    with pytest.raises(BundleError, match=r"^[^\n]+\.$"):
        open_bundle(copy)
    assert_one_sentence(glmexport("inspect", copy))


def test_a_folder_that_is_a_link_is_refused(copy, tmp_path):
    (copy / "ort").rename(tmp_path / "elsewhere")
    (copy / "ort").symlink_to(tmp_path / "elsewhere")
    complaints = [complaint for _, complaint in check_files(open_bundle(copy)) if complaint]
    assert len(complaints) == 9, "eight files, and the link itself"
    with Session(copy) as session, pytest.raises(BundleError, match="found a link"):
        session.load()


def test_flavors_that_read_other_weights_are_refused_by_passes(copy):
    model = onnx.load(copy / "ort" / "lm.onnx", load_external_data=False)
    for proto in model.graph.initializer:
        for entry in proto.external_data:
            if proto.name.endswith("final_layernorm.bias") and entry.key == "offset":
                entry.value = "0"
    (copy / "ort" / "lm.onnx").write_bytes(model.SerializeToString())
    record_again(copy, "ort/lm.onnx")
    with pytest.raises(BundleError, match="The flavors of lm do not read the same weights"):
        draft_of_bundle(open_bundle(copy))


# Checks of files


@pytest.mark.parametrize("name", ["ort/glm_block_0.onnx", "ort/lm.onnx.data", "glm_block_1.onnx.data"])
@pytest.mark.parametrize("damage", ["missing", "changed", "shorter", "a folder"])
def test_what_is_wrong_with_a_file_is_told_with_its_folder(copy, name, damage):
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(content[:-1] + (b"" if damage == "shorter" else bytes([content[-1] ^ 1])))
    complaints = {found: complaint for found, complaint in check_files(open_bundle(copy)) if complaint}
    assert {*complaints} == {name}
    assert complaints[name].startswith(f"{name} ")
    done = glmexport("inspect", copy, "--check")
    assert done.status == 1
    assert [line for line in done.stdout.splitlines() if line.startswith("BAD ")] == [f"BAD {complaints[name]}"]


def test_a_file_too_many_in_the_folder_is_told(copy):
    (copy / "ort" / "notes.txt").write_text("mine")
    (copy / "ort" / "more").mkdir()
    told = {complaint for _, complaint in check_files(open_bundle(copy)) if complaint}
    assert told == {"ort/notes.txt is not in the manifest.", "ort/more is not in the manifest."}


def test_shared_data_is_read_once(both, monkeypatch):
    from glmexport import bundle as bundle_module

    read = []
    sha256_of = bundle_module.sha256_of
    monkeypatch.setattr(bundle_module, "sha256_of", lambda path, *rest: (read.append(path), sha256_of(path, *rest))[1])
    assert_intact(both)
    assert len(read) == len({path.stat().st_ino for path in read}) == 14


def test_a_whole_bundle_passes_and_is_counted_once(of):
    for flavor, count in (("both", 18), ("ort", 10)):
        done = glmexport("inspect", of(flavor), "--check")
        assert (done.status, done.stdout.splitlines()[-1]) == (
            0,
            f"All {count} files are whole: each is as the manifest says.",
        )
        listed = json.loads(glmexport("inspect", of(flavor), "--json").stdout)
        portable = json.loads(glmexport("inspect", of("portable"), "--json").stdout)
        for part, other in zip(listed["parts"], portable["parts"], strict=True):
            assert (part["name"], part["parameters"]) == (other["name"], other["parameters"])
            assert abs(part["bytes"] - other["bytes"]) < 10_000, "one graph with its data"


def test_doctor_counts_the_graphs_of_one_flavor(of):
    data = sum(len(content) for name, content in relative_files(of("portable")).items() if name in DATA)
    for flavor in FLAVORS:
        done = glmexport("doctor", of(flavor), "--no-bandwidth", "--json")
        assert done.status == 0, done.stderr
        needs = json.loads(done.stdout)["forms"][0]["needs"]
        assert 0 < needs["disk"] - data < 30_000


# Runs that stop, and outputs that are there


def killed_at(moment: int, checkpoint: Path, output: Path, *, resume: bool) -> bool:
    """Split in a process of its own that kills itself at a certain write, sync, link or rename; whether it did."""
    child = os.fork()
    if not child:
        events = 0

        def counting(owner, name):
            original = getattr(owner, name)

            def counted(*arguments, **options):
                nonlocal events
                events += 1
                if events == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            setattr(owner, name, counted)

        writer = bundle_writer.HashingFile
        for owner, name in ((writer, "write"), (writer, "sync"), (Journal, "add"), (os, "link"), (Path, "rename")):
            counting(owner, name)
        status = 1
        with contextlib.suppress(BaseException):
            with open_checkpoint(checkpoint) as source:
                split(source, output, SplitOptions(OPSET, flavor="both"), resume=resume)
            status = 0
        os._exit(status)
    timer = threading.Timer(100, os.kill, (child, signal.SIGKILL))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return status != 0


def test_a_run_that_was_killed_anywhere_goes_on_to_the_same_bytes(shared, both, output):
    """Each run is killed later than the one before, and goes on with what that left."""
    checkpoint, taken_over = odd_checkpoint(shared), 0
    assert both.exists(), "every kind of graph has been traced, so that the processes need not"
    for first in (4, 19):
        moment, resume = first, False
        while killed_at(moment, checkpoint, output, resume=resume):
            noted = output.parent / f".{output.name}.partial" / JOURNAL
            taken_over += noted.exists() and len(noted.read_text().splitlines()) > 1
            resume, moment = True, moment + 9
            assert moment < 200, "there are not so many"
        assert relative_files(output) == relative_files(both)
        assert all(ours == theirs for ours, theirs in inodes(output))
        assert [path.name for path in output.parent.iterdir()] == [output.name]
        shutil.rmtree(output)
    assert taken_over


@pytest.fixture
def stopped(shared, both, output, monkeypatch) -> Path:
    """What Ctrl-C leaves of a split of both flavors after its first graph."""
    from glmexport import draft_writer

    noted, calls = threading.Event(), []
    add, lint = Journal.add, draft_writer.lint_graph

    def adding(self, *arguments):
        add(self, *arguments)
        noted.set()

    def third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # two of each graph
            assert noted.wait(60)
            raise KeyboardInterrupt
        return lint(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", adding)
        patch.setattr(draft_writer, "lint_graph", third)
        command = ("split", odd_checkpoint(shared), "-o", output, "--opset", str(OPSET), "--flavor", "both", "-q")
        done = glmexport(*command)
    assert done.status == 130
    assert "--flavor both -q --resume" in done.stderr
    return output.parent / f".{output.name}.partial"


def test_a_finished_graph_is_taken_over_in_both_flavors(shared, both, output, stopped):
    before = {name: (stopped / name).stat().st_ino for name in ("embedding.onnx.data", "ort/embedding.onnx")}
    split_directory_again(shared, output, resume=True)
    assert relative_files(output) == relative_files(both)
    assert {name: (output / name).stat().st_ino for name in before} == before


@pytest.mark.parametrize("name", ["ort/embedding.onnx", "embedding.onnx.data"])
def test_a_finished_graph_that_was_changed_is_written_again(shared, both, output, stopped, name):
    content = bytearray((stopped / name).read_bytes())
    content[100] ^= 1
    (stopped / name).write_bytes(content)
    split_directory_again(shared, output, resume=True)
    assert relative_files(output) == relative_files(both)
    assert all(ours == theirs for ours, theirs in inodes(output))


def test_other_flavors_are_something_else_to_resume(shared, output, stopped):
    with pytest.raises(BundleError, match=r"was begun with something else: .*bundle\.flavors"):
        split_directory_again(shared, output, flavor="portable", resume=True)
    assert stopped.is_dir()


def test_what_is_left_of_another_flavor_is_cleared(shared, of, output, stopped):
    """Not even an empty folder stays."""
    (stopped / "ort" / "embedding.onnx.data").unlink()
    split_directory_again(shared, output, flavor="portable")
    assert sorted(path.name for path in output.iterdir()) == sorted(relative_files(of("portable")))


def split_directory_again(shared, output: Path, flavor: str = "both", **options) -> None:
    with open_checkpoint(odd_checkpoint(shared)) as source:
        split(source, output, SplitOptions(OPSET, flavor=flavor), **options)


def test_force_replaces_a_bundle_with_a_folder(shared, copy, of):
    for flavor in ("portable", "both", "ort", "portable"):
        split_directory_again(shared, copy, flavor, force=True)
        assert relative_files(copy) == relative_files(of(flavor))
        assert (copy / "ort").exists() == (flavor != "portable")


@pytest.mark.parametrize(
    ("foreign", "told"), [("ort/notes.txt", "ort/notes.txt"), ("ort/sub/notes.txt", "ort/sub"), ("other/x", "other")]
)
def test_force_replaces_nothing_that_is_not_a_bundle_s(shared, copy, foreign, told):
    (copy / foreign).parent.mkdir(exist_ok=True)
    (copy / foreign).write_text("mine")
    before = relative_files(copy)
    with pytest.raises(BundleError, match=rf"it holds {told}; --force does not"):
        split_directory_again(shared, copy, force=True)
    assert relative_files(copy) == before


def test_float16_has_no_graphs_that_write_into_their_cache(shared, output):
    for flavor in ("ort", "both"):
        command = ("split", odd_checkpoint(shared), "-o", output, "--dtype", "float16", "--flavor", flavor)
        assert_one_sentence(glmexport(*command), "Graphs of the flavor ort are for onnxruntime on processors")
        assert [*output.parent.iterdir()] == []
    with pytest.raises(ExportError, match="flavor must be one of portable, ort, both, found 'fast'"):
        SplitOptions(flavor="fast")
    assert glmexport("split", odd_checkpoint(shared), "-o", output, "--flavor", "fast").status == 2


def test_a_plan_counts_shared_data_once(shared, of, tmp_path):
    with open_checkpoint(odd_checkpoint(shared)) as source:
        plans = {flavor: plan_split(source, SplitOptions(OPSET, flavor=flavor)) for flavor in FLAVORS}
    for flavor, plan in plans.items():
        files = relative_files(of(flavor))
        assert {*plan.files} == {*files}
        for name in files:
            assert not name.endswith(".data") or plan.files[name] == len(files[name])
        assert plan.disk <= plans["portable"].disk + 8 * (32 << 10)
    command = ("split", odd_checkpoint(shared), "-o", tmp_path / "none", "--dry-run")
    for flavor, links in (("both", len(DATA)), ("ort", 0)):
        assert glmexport(*command, "--flavor", flavor).stdout.count("hard link") == links


# Passes


BF16, SHARE = EmbedPass(EmbeddingForm(RAW, "bfloat16")), EmbedPass(EmbeddingForm(SHARED))
PASSES = {
    "slim": (SlimPass(),),
    "bf16": (BF16,),
    "int4": (quantize_pass(4, 128, symmetric=False),),
    "half": (HalfWeightsPass(),),
    "qdq": (quantize_pass(8, layout="qdq"),),
    "all": (SlimPass(), BF16, quantize_pass(4)),
    "shared": (SlimPass(), quantize_pass(4), SHARE),
}


@pytest.mark.parametrize("flavor", ["both", "ort"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "qdq")) for name in PASSES])
def test_passes_give_what_split_gives_with_them(shared, of, tmp_path, name, flavor):
    passes = PASSES[name]
    derived(of(flavor), tmp_path / "passes", *passes)
    made = manifest_of(tmp_path / "passes")
    split_directory(odd_checkpoint(shared), tmp_path / "split", opset=made["opset"], flavor=flavor, passes=passes)
    found, expected = (relative_files(tmp_path / kind) for kind in ("passes", "split"))
    assert made["opset"] == (21 if name == "qdq" else OPSET), "blocked DequantizeLinear needs 21, to which passes lift"
    assert {*found} == {*expected}
    for file, content in found.items():
        assert file == "manifest.json" or content == expected[file], file
    assert_intact(tmp_path / "passes")
    for bundle in (tmp_path / "passes", tmp_path / "split"):
        if flavor == "both":
            assert all(
                (bundle / data).stat().st_ino == (bundle / "ort" / data).stat().st_ino
                for data in DATA
                if (bundle / data).exists()
            )


def test_a_pass_links_what_it_leaves_alone(both, tmp_path):
    derived(both, tmp_path / "bf16", BF16)
    for name in ("glm_block_0.onnx", "ort/glm_block_0.onnx", "lm.onnx.data", "ort/lm.onnx.data"):
        assert (tmp_path / "bf16" / name).stat().st_ino == (both / name).stat().st_ino
    derived(both, tmp_path / "copied", BF16, copy=True)
    for name in DATA[1:]:
        assert (tmp_path / "copied" / name).stat().st_ino != (both / name).stat().st_ino
    assert relative_files(tmp_path / "copied") == relative_files(tmp_path / "bf16")


# What needs portable graphs, or none


def test_conversion_for_mnn_needs_portable_graphs(of, tmp_path):
    pytest.importorskip("MNN")
    done = glmexport("convert", "mnn", of("ort"), "-o", tmp_path / "mnn")
    assert_one_sentence(done, "graphs of the flavor ort alone", "split with --flavor both")
    assert not (tmp_path / "mnn").exists()


def test_conversion_for_mnn_of_both_flavors_is_that_of_the_portable_one(of, tmp_path):
    pytest.importorskip("MNN")
    for flavor in ("both", "portable"):
        done = glmexport("convert", "mnn", of(flavor), "-o", tmp_path / flavor, "-q")
        assert done.status == 0, done.stderr
    found, expected = (relative_files(tmp_path / flavor) for flavor in ("both", "portable"))
    assert {name for name in {*found, *expected} if found.get(name) != expected.get(name)} == {"manifest.json"}
    assert manifest_of(tmp_path / "both")["flavors"] == ["portable"], "what came before is in its history alone"
    with pytest.raises(BundleError, match="none of 'ort'"):
        Session(tmp_path / "both", flavor="ort")


@pytest.mark.parametrize("flavor", ["both", "ort"])
def test_a_package_is_made_of_any_flavor(of, tmp_path, flavor):
    pytest.importorskip("MNN")
    done = glmexport("package", "mnn-llm", of(flavor), "-o", tmp_path / flavor, "--bits", "4", "--no-check", "-q")
    assert done.status == 0, done.stderr
