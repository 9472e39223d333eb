"""Nothing that lies in a checkpoint, a bundle or a small file makes a command do more than refuse it in one sentence.

Hypothesis draws the damage of tests/damage_kinds.py and commands run in this process. benchmarks/fuzz.py goes on for as
long as one likes, in a process that is limited.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import damage_kinds
import pytest
from conftest import ROOT, record_again
from damage import BUNDLES, CANARY, Command, bundle_commands, checkpoint_commands, lay_out, prepare
from damage_kinds import KINDS, with_digest
from faults import HangError, slow, within
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.append(str(ROOT / "benchmarks"))
import fuzz
from fuzz import Outcome, Runner, Worker, complaint

FUZZ = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # a failure says what was damaged; smaller hangs are no use
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
CHANCES = st.randoms(use_true_random=False)
THREADS = ("--threads", "1", "-q")
BUNDLE_COMMANDS = {
    "inspect": ("inspect", "bundle", "--check", "-q"),
    "generate": ("generate", "bundle", "12", "--max-tokens", "2", *THREADS),
    "stream": ("generate", "bundle", "12", "--max-tokens", "2", "--memory-limit", "1", *THREADS),
    "eval": ("eval", "bundle", "examples.jsonl", *THREADS),
    "slim": ("slim", "bundle", "-o", "out", "-q"),
    "embed": ("embed", "bundle", "-o", "out", "-q"),
    "quantize": ("quantize", "bundle", "-o", "out", "--bits", "4", "-q"),
    "verify": ("verify", "bundle", "bin", "--steps", "1", "-q"),
}
"""Every command that opens the graphs or files of a bundle."""


class Here:
    """Runs commands in this process, which can stop what hangs in Python."""

    def run(self, command: Command, folder: Path, seconds: float = 6) -> Outcome:
        try:
            with within(seconds):
                return fuzz.run_here(command, folder)
        except HangError as error:
            return Outcome(0, "", "", str(error))


@pytest.fixture(scope="session")
def stock(shared) -> Path:
    """Checkpoints, bundles and a stopped split to damage copies of; never change it."""
    return shared("fuzz-stock", prepare)


@pytest.fixture
def worker() -> Runner:
    """What commands run in."""
    return Here()


@pytest.fixture(scope="module")
def process() -> Iterator[Worker]:
    """The process of benchmarks/fuzz.py, within its limits."""
    with Worker() as worker:
        yield worker


@pytest.fixture(scope="module")
def make_place(stock, tmp_path_factory) -> Callable[[], Path]:
    """Copies of all of it."""

    def make() -> Path:
        folder = tmp_path_factory.getbasetemp() / "fuzz"
        shutil.rmtree(folder, ignore_errors=True)
        lay_out(stock, folder)
        return folder

    return make


@pytest.fixture
def place(make_place) -> Path:
    """Copies, with the plain bundle as `bundle`."""
    folder = make_place()
    (folder / "float").rename(folder / "bundle")
    return folder


def assert_good(worker: Runner, folder: Path, kind: str, chance: fuzz.Chance) -> None:
    case, wrong = fuzz.run_case(worker, folder, KINDS[kind], chance)
    assert not wrong, "\n".join([case.damage, *wrong])


def refusal(worker: Runner, folder: Path, *arguments: str) -> tuple[str, str]:
    """(what a command says, on stderr and as a report; what is wrong with that, empty where it refuses as it should)"""
    command = Command(arguments)
    outcome = worker.run(command, folder, seconds=6)
    wrong = complaint(command, outcome) or ("" if outcome.status else "accepted")
    return outcome.stderr + outcome.stdout, wrong


def assert_refused(worker: Runner, folder: Path, commands: dict[str, tuple[str, ...]], word: str) -> None:
    """Every one of the commands refuses in a sentence, or in a report, that holds this word, and makes nothing."""
    wrong = {}
    for name, arguments in commands.items():
        said, what = refusal(worker, folder, *arguments)
        if what or word not in said:
            wrong[name] = what or said
        if (folder / "out").exists():
            shutil.rmtree(folder / "out")
            wrong[name] = "made something"
    assert wrong == {}


# Anything at all


@pytest.mark.parametrize("kind", KINDS)
@settings(FUZZ, max_examples=4)
@given(chance=CHANCES)
def test_whatever_is_damaged_commands_refuse_it_in_one_sentence(worker, make_place, kind, chance):
    assert_good(worker, make_place(), kind, chance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(FUZZ, max_examples=300)
@given(chance=CHANCES)
def test_so_they_do_for_longer(process, make_place, kind, chance):
    assert_good(process, make_place(), kind, chance)


def test_undamaged_files_are_accepted(worker, make_place):
    """So that a refusal above is one of the damage."""
    folder = make_place()
    commands = [*checkpoint_commands("bin"), *bundle_commands("float")]
    commands += [
        command for name in BUNDLES[1:] for command in bundle_commands(name) if command.arguments[0] != "verify"
    ]
    commands.append(Command(("split", "safetensors", "-o", "stopped", "--opset", "14", "--resume")))
    refused = {}
    for command in commands:
        outcome = worker.run(command, folder)
        assert complaint(command, outcome) is None, (command, outcome)
        shutil.rmtree(folder / "out", ignore_errors=True)
        if outcome.status:
            refused[" ".join(command.arguments[:2])] = outcome.stderr + outcome.stdout
    reasons = (
        *("no ice_text.model", "already", "was not made from", "has no tokenizer"),
        *("expected a float32 matrix", "no embedding graph any more", "stay as they are"),
    )
    odd = {what: why for what, why in refused.items() if not any(words in why for words in reasons)}
    assert odd == {}, "because of what they are, not of damage"
    assert len(refused) < len(commands) / 2


@pytest.mark.parametrize("key", ["hidden_size", "num_heads", "vocab_size", "num_blocks", "inner_size", "max_positions"])
@pytest.mark.parametrize("size", [1 << 22, 1 << 31, 10**40])
def test_sizes_of_a_model_that_there_is_not(worker, place, key, size):
    """Whether refused or not, nothing of that size is made."""
    path = place / "bundle" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["model"][key] = size
    path.write_bytes(with_digest(manifest))
    for name in ("generate", "slim", "verify"):
        command = Command(BUNDLE_COMMANDS[name])
        assert complaint(command, worker.run(command, place)) is None


@pytest.mark.parametrize("file", ["bin/config.json", "bin/tokenizer_config.json", "bundle/manifest.json"])
def test_half_a_character_is_refused_where_it_is_read(worker, place, file):
    """JSON can name one; no file that is written could hold it."""
    document = json.loads((place / file).read_bytes())
    (place / file).write_text(json.dumps({**document, "history": [{"step": "\ud800"}]}))
    bundle = {name: BUNDLE_COMMANDS[name] for name in ("slim", "generate")}
    split = {"split": ("split", "bin", "-o", "out", "--opset", "17", "-q", "--slim")}
    assert_refused(worker, place, split if file.startswith("bin/") else bundle, Path(file).name)


# External data


def move_outside(bundle: Path, graph: str, how: str) -> str:
    """Have the data of a graph lie outside the bundle, the same bytes as before; returns the file that is wrong."""
    data, elsewhere = bundle / f"{graph}.onnx.data", bundle.parent / "elsewhere"
    elsewhere.write_bytes(data.read_bytes())
    if how.endswith("link"):
        data.unlink()
        data.symlink_to(elsewhere if how == "link" else Path("..") / elsewhere.name)
        return data.name
    import onnx

    location = {"absolute": str(elsewhere), "up": "../elsewhere", "through": "./../bundle/../elsewhere"}.get(how, "")
    model = onnx.load(bundle / f"{graph}.onnx", load_external_data=False)
    if how == "constant":
        tensor = onnx.TensorProto(name="secret", dims=[4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", "../elsewhere"), ("offset", "0"), ("length", "16")):
            tensor.external_data.add(key=key, value=value)
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["secret"], value=tensor))
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if location and entry.key == "location" else entry.value
    (bundle / f"{graph}.onnx").write_bytes(model.SerializeToString())
    record_again(bundle, f"{graph}.onnx")
    return f"{graph}.onnx"


@pytest.mark.parametrize("how", ["link", "relative link", "absolute", "up", "through", "constant"])
@pytest.mark.parametrize("graph", ["glm_block_0", *slow("embedding", "lm")])
def test_data_outside_the_bundle_are_refused_by_every_command(worker, place, graph, how):
    wrong = move_outside(place / "bundle", graph, how)
    commands = dict(BUNDLE_COMMANDS)
    if not how.endswith("link"):
        del commands["inspect"]  # its hashes fit, and it looks at nothing else
    assert_refused(worker, place, commands, wrong)


@pytest.mark.parametrize("name", ["embedding.onnx", "glm_block_0.onnx", "lm.onnx", "ice_text.model"])
def test_a_link_in_the_place_of_a_small_file_is_refused_by_every_command(worker, place, name):
    (place / "elsewhere").write_bytes((place / "bundle" / name).read_bytes())
    (place / "bundle" / name).unlink()
    (place / "bundle" / name).symlink_to(place / "elsewhere")
    assert_refused(worker, place, BUNDLE_COMMANDS, name)


@pytest.mark.parametrize("bundle", ["int4", "shared"])
@pytest.mark.parametrize("how", ["link", "shorter", "empty", "missing"])
def test_rows_that_are_mapped_are_the_bundles_own(worker, place, bundle, how):
    """The raw embedding, and the head whose rows are the embedding."""
    (path,) = (place / bundle).glob("*word_embeddings*" if bundle == "int4" else "lm.onnx.data")
    content = path.read_bytes()
    path.unlink()
    if how == "link":
        (place / "elsewhere").write_bytes(content)
        path.symlink_to(place / "elsewhere")
    elif how != "missing":
        path.write_bytes(content[: len(content) // 2] if how == "shorter" else b"")
    commands = {"eval": ("eval", bundle, "examples.jsonl"), "generate": ("generate", bundle, "12", "--max-tokens", "2")}
    assert_refused(worker, place, {name: (*words, *THREADS) for name, words in commands.items()}, path.name)


@pytest.mark.parametrize("kind", ["pipe", "directory"])
@pytest.mark.parametrize("name", ["lm.onnx", "glm_block_0.onnx.data", "ice_text.model", "manifest.json"])
def test_what_is_no_file_is_refused_and_not_waited_for(worker, place, name, kind):
    path = place / "bundle" / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert_refused(worker, place, BUNDLE_COMMANDS, "bundle" if name == "manifest.json" else name)


# Pickles


@pytest.mark.parametrize("number", range(len(damage_kinds.calls(Path()))))
def test_a_call_in_a_pickle_is_never_made(worker, place, number):
    """As the whole pickle, as a value, before the tensors and among them; in an archive and without one."""
    path = place / "bin" / "pytorch_model.bin"
    original = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    call = damage_kinds.calls(place)[number]
    whole = b"\x80\x02" + call + b"."
    commands = {"split": ("split", "bin", "-o", "out", "--opset", "17", "-q"), "inspect": ("inspect", "bin")}
    for content in (whole, b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s.", pickled[:2] + call + b"0" + pickled[2:]):
        path.write_bytes(original)
        damage_kinds.rezip(path, lambda name, old, new=content: new if name.endswith("/data.pkl") else old)
        assert_refused(worker, place, commands, path.name)
        path.write_bytes(content)
        assert_refused(worker, place, commands, path.name)
    assert not (place / CANARY).exists()


def test_python_itself_would_make_these_calls(tmp_path):
    """Most of them; some need what only torch's reader has."""
    code = """
import os, pickle, sys
from contextlib import suppress
from pathlib import Path
canary, made = Path(sys.argv[1]), 0
for call in eval(sys.stdin.read()):
    with suppress(Exception):
        result = pickle.loads(bytes((0x80, 2)) + call + b".")
        if hasattr(result, "wait"):
            result.wait()
    made += canary.exists()
    canary.unlink(missing_ok=True)
print(made)
"""
    command = [sys.executable, "-c", code, str(tmp_path / CANARY)]
    calls = repr(damage_kinds.calls(tmp_path))
    done = subprocess.run(command, input=calls, capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 8


# Every bit


@settings(FUZZ, max_examples=12)
@given(data=st.data())
def test_one_flipped_bit_in_any_file_of_any_form_is_found_and_the_file_named(worker, make_place, data):
    folder = make_place()
    name = data.draw(st.sampled_from(BUNDLES))
    path = data.draw(st.sampled_from(sorted((folder / name).iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    commands = {"inspect": ("inspect", name, "--check", "-q"), "verify": ("verify", name, "bin", "--steps", "1", "-q")}
    assert_refused(worker, folder, commands, path.name)


# The checks above can fail


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (Outcome(2, "", "Error: Good.\n"), None),
        (Outcome(2, "", "Note: Something.\n[  5%] glm_block_0\nError: Good.\n  missing: a\n"), None),
        (Outcome(0, "fine", ""), None),
        (Outcome(2, "", "Error: Not a sentence\n"), "no sentence"),
        (Outcome(2, "", ""), "no sentence"),
        (Outcome(2, "", "Error: One.\nError: Two.\n"), "more than one"),
        (Outcome(2, "", "Error: A\u2028line.\n"), "terminal"),
        (Outcome(2, "", "Error: \x1b[31mred.\n"), "terminal"),
        (Outcome(2, "", "Error: std::bad_alloc.\n"), "memory"),
        (Outcome(0, "", "", held=1 << 30), "held 1024 MiB"),
        (Outcome(0, "", "", "Traceback"), "Traceback"),
        (Outcome(0, "", "a warning\n"), "noise"),
        (Outcome(1, "", ""), "status 1"),
        (Outcome(-11, "", ""), "status -11"),
    ],
)
def test_what_counts_as_a_good_end(outcome, words):
    found = complaint(Command(("slim", "bundle")), outcome)
    assert found is None if words is None else words in found
    assert complaint(Command(("verify", "bundle")), Outcome(1, "FAIL", "")) is None


@pytest.mark.slow
def test_a_hang_and_a_crash_are_noticed_and_the_worker_goes_on(process, place):
    os.mkfifo(place / "file")
    waits = Command(("slim", "bundle", "-o", "out", "--keep", "file"))  # for whoever writes into the pipe
    good = Command(("inspect", "bundle"))
    assert process.run(waits, place, seconds=0.5).problem == "still running after 0.5 s"
    assert process.run(good, place).status == 0
    process.kill()
    assert process.run(good, place).problem == "crashed with status -9"
    assert process.run(good, place).status == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "bin" / "config.json").write_text("{}"), "changed bin/config.json"),
        (lambda folder: (folder / CANARY).touch(), "ran what lies in the file"),
    ],
)
def test_a_changed_input_and_a_canary_are_noticed(make_place, change, words):
    class Changing:
        def run(self, command: Command, folder: Path) -> Outcome:
            change(folder)
            return Outcome(0, "", "")

    _, wrong = fuzz.run_case(Changing(), make_place(), KINDS["texts"], fuzz.random.Random(1))
    assert words in "\n".join(wrong)


@pytest.mark.slow
def test_the_script_names_a_case_again():
    """A case is a function of seed, kind and number."""
    command = [sys.executable, ROOT / "benchmarks" / "fuzz.py", "--seed", "3", "--kind", "texts", "--number", "2"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("texts 1\n1 cases, 0 failed\n"), done.stdout + done.stderr
    assert done.returncode == 0
