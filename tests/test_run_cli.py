"""`tokenize`, `generate`, `chat` and `eval`: what they print, what they refuse, and Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import copy_tokenizer, make_config, make_tensors, write_checkpoint, write_weights
from conftest import GOLDEN_DATA, split_directory
from derived_bundles import (
    Result,
    assert_one_sentence,
    derived,
    glmexport,
    manifest_of,
    plain_bundle,
    quantize_pass,
)

from glmexport.chat import polish
from glmexport.generation import generate
from glmexport.passes.slim_vocab import SlimPass
from glmexport.sampling import Sampling
from glmexport.session import Session

CASES = json.loads((GOLDEN_DATA / "tokenizer_cases.json").read_text("utf-8"))["cases"]
IMAGES = 40
GMASK, BOS = 1501, 1504


def fed(monkeypatch, text: str | bytes, *arguments: object) -> Result:
    """Run the command line with that on stdin."""
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
    return glmexport(*arguments)


def assert_refused(result: Result, *words: str) -> None:
    """Status 2 and one sentence, whatever was printed before it."""
    assert_one_sentence(result._replace(stdout=""), *words)


@pytest.fixture(scope="module")
def slim(shared, bundle) -> Path:
    """The odd bundle without its image tokens."""
    return shared("cli-slim", lambda path: derived(bundle, path, SlimPass()))


@pytest.fixture(scope="module")
def answer(quick_bundle):
    """`answer(text, **options)`: a finished greedy generation of the golden bundle."""
    with Session(quick_bundle) as session:

        def ask(prompt, **options):
            generation = generate(session, prompt, sampling=Sampling(greedy=True), **options)
            _ = generation.text
            return generation

        yield ask


@pytest.fixture
def no_tokenizer(shared) -> Path:
    return plain_bundle(shared)


# tokenize


def test_tokenize_prints_the_ids_as_json(quick_bundle, golden_checkpoint, bundle, slim):
    case = next(case for case in CASES if len(case["ids"]) > 5)
    for target, shift in ((quick_bundle, 0), (golden_checkpoint, 0), (bundle, IMAGES), (slim, 0)):
        result = glmexport("tokenize", target, case["text"])
        assert (result.status, result.stderr) == (0, "")
        assert json.loads(result.stdout) == [token + shift for token in case["ids"]]
        back = glmexport("tokenize", target, "--decode", ",".join(str(token + shift) for token in case["ids"]))
        assert back.stdout == case["decoded"] + "\n"


@pytest.fixture(scope="module")
def first_revision(tmp_path_factory) -> Path:
    """A checkpoint directory with 20000 image tokens, of which `tokenize` needs no weights."""
    directory = tmp_path_factory.mktemp("first-revision")
    sizes = {"image_tokens": 20000, "tokenizer": True, "first_revision": True}
    (directory / "config.json").write_text(json.dumps(make_config(vocab_size=21856, **sizes)), "utf-8")
    copy_tokenizer(directory, 20000)
    return directory


@pytest.mark.parametrize(
    ("target", "images"),
    [("quick_bundle", 0), ("golden_checkpoint", 0), ("first_revision", 20000), ("bundle", IMAGES), ("slim", 0)],
)
def test_tokenize_jsonl_is_the_original_for_every_case_in_both_directions(request, monkeypatch, target, images):
    assert len(CASES) == 396
    target = request.getfixturevalue(target)
    lines = "".join(json.dumps(case["text"], ensure_ascii=number % 2 == 0) + "\n" for number, case in enumerate(CASES))
    result = fed(monkeypatch, lines, "tokenize", target, "--jsonl")
    assert (result.status, result.stderr) == (0, "")
    found = [json.loads(line) for line in result.stdout.split("\n")[:-1]]
    assert found == [[token - case["num_image_tokens"] + images for token in case["ids"]] for case in CASES]
    back = fed(monkeypatch, result.stdout, "tokenize", target, "--jsonl", "--decode")
    assert (back.status, back.stderr) == (0, "")
    assert [json.loads(line) for line in back.stdout.split("\n")[:-1]] == [case["decoded"] for case in CASES]
    prompts = fed(monkeypatch, lines, "tokenize", target, "--jsonl", "--prompt")
    assert [json.loads(line) for line in prompts.stdout.split("\n")[:-1]] == [
        [token - case["num_image_tokens"] + images for token in case["ids_with_special"]] for case in CASES
    ]


def test_tokenize_prompt_and_special(quick_bundle):
    plain = json.loads(glmexport("tokenize", quick_bundle, "你好").stdout)
    assert json.loads(glmexport("tokenize", quick_bundle, "你好", "--prompt").stdout) == [*plain, GMASK, BOS]
    special = json.loads(glmexport("tokenize", quick_bundle, "你[gMASK]好", "--special").stdout)
    assert special.count(GMASK) == 1
    assert GMASK not in json.loads(glmexport("tokenize", quick_bundle, "你[gMASK]好").stdout)


def test_tokenize_pieces_shows_a_piece_for_each_id(quick_bundle):
    ids = json.loads(glmexport("tokenize", quick_bundle, "[b]你\n", "--prompt").stdout)
    result = glmexport("tokenize", quick_bundle, "[b]你\n", "--prompt", "--pieces")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["id", "piece"]
    assert [int(row[0]) for row in rows[1:]] == ids
    assert [rows[-2][1], rows[-1][1]] == ["[gMASK]", "<sop>"]
    assert "<n>" in [row[1] for row in rows[1:]]


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ([], '"a"', "no JSON"),
        ([], '"a"', ""),
        ([], '"a"', "5"),
        ([], '"a"', '["a"]'),
        ([], '"a"', r'"\ud800"'),
        ([], '"a"', "[" * 100_000),
        ([], '"a"', b'"\xff"'),
        (["--decode"], "[5]", '"a"'),
        (["--decode"], "[5]", '["a"]'),
        (["--decode"], "[5]", "[5, true]"),
        (["--decode"], "[5]", "[5.0]"),
        (["--decode"], "[5]", "[1856]"),
        (["--decode"], "[5]", "[-1]"),
        (["--decode"], "[5]", f"[{2**70}]"),
        (["--decode"], "[5]", "{"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_tokenize_names_a_bad_line_and_answers_those_before_it(quick_bundle, monkeypatch, options, good, bad):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    lines = b"\n".join([good.encode(), good.encode(), bad, good.encode(), b""])
    result = fed(monkeypatch, lines, "tokenize", quick_bundle, "--jsonl", *options)
    assert_refused(result, "Line 3")
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--jsonl"]),
        (["a", "--jsonl"], ["--jsonl"]),
        (["5", "--decode", "--prompt"], ["--prompt"]),
        (["5", "--decode", "--special"], ["--special"]),
        (["5", "--decode", "--pieces"], ["--pieces"]),
        (["--jsonl", "--pieces"], ["--pieces"]),
        (["5,x", "--decode"], ["5,x"]),
        (["", "--decode"], ["ids"]),
        (["99999", "--decode"], ["99999", "1855"]),
        (["a\ud800"], ["Unicode"]),
    ],
)
def test_tokenize_refuses_in_one_sentence(quick_bundle, arguments, words):
    assert_one_sentence(glmexport("tokenize", quick_bundle, *arguments), *words)


def test_tokenize_refuses_targets_without_a_tokenizer(no_tokenizer, small_checkpoint, tmp_path):
    assert_one_sentence(glmexport("tokenize", no_tokenizer, "a"), "ice_text.model")
    assert_one_sentence(glmexport("tokenize", small_checkpoint, "a"), "ice_text.model")
    assert_one_sentence(glmexport("tokenize", tmp_path / "absent", "a"))


# generate


def test_generate_prints_the_text_as_it_is(quick_bundle, answer):
    expected = answer("你好", max_tokens=12)
    result = glmexport("generate", quick_bundle, "你好", "--greedy", "--max-tokens", 12)
    assert (result.status, result.stdout, result.stderr) == (0, expected.text + "\n", "")


def test_generate_prints_the_new_ids_on_the_last_line(quick_bundle, golden):
    for prompt in ("{}", "[{}]"):
        ids = prompt.format(", ".join(map(str, golden["short.input_ids"][0])))
        result = glmexport(
            "generate", quick_bundle, "--input-ids", ids, "--greedy", "--max-tokens", 8, "--output-ids", "-q"
        )
        assert result.status == 0
        assert json.loads(result.stdout.splitlines()[-1]) == golden["short.greedy"].tolist()


@pytest.mark.parametrize("form", ["5,17,1501,1504", "5 17 1501 1504", " [5,17, 1501 ,1504] ", "5,,17 1501\n1504"])
def test_generate_takes_ids_in_every_way_of_writing_them(quick_bundle, answer, form):
    result = glmexport("generate", quick_bundle, "--input-ids", form, "--greedy", "--max-tokens", 4, "--output-ids")
    assert json.loads(result.stdout.splitlines()[-1]) == answer([5, 17, 1501, 1504], max_tokens=4).ids


def test_generate_as_json(quick_bundle, answer):
    expected = answer("你好", max_tokens=6)
    result = glmexport("generate", quick_bundle, "你好", "--greedy", "--max-tokens", 6, "--json")
    assert result.status == 0
    document = json.loads(result.stdout)
    assert (document["text"], document["ids"], document["prompt_ids"], document["ended_by"]) == (
        expected.text,
        expected.ids,
        expected.prompt_ids,
        "length",
    )
    assert document["stats"]["prefill_tokens"] == len(expected.prompt_ids)
    assert document["stats"]["decode_tokens"] == 5
    assert document["stats"]["kv_bytes"] == expected.stats.kv_bytes
    assert document["stats"]["prefill_speed"] > 0
    assert document["stats"]["held_bytes"] > 10**6


def test_json_with_output_ids_is_still_a_document_first(quick_bundle, answer):
    result = glmexport("generate", quick_bundle, "a", "--greedy", "--max-tokens", 3, "--json", "--output-ids")
    document, last = result.stdout.rstrip("\n").rsplit("\n", 1)
    assert json.loads(document)["ids"] == json.loads(last) == answer("a", max_tokens=3).ids


def test_generate_prints_statistics_on_stderr(quick_bundle, answer):
    expected = answer("你好", max_tokens=6)
    result = glmexport("generate", quick_bundle, "你好", "--greedy", "--max-tokens", 6, "--stats")
    assert result.stdout == expected.text + "\n"
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"prefill {len(expected.prompt_ids)} tokens, ")
    assert "decode 5 tokens, " in line
    assert "KV cache 15.4 kB" in line


def test_generate_reads_the_prompt_from_stdin(quick_bundle, answer, monkeypatch):
    result = fed(monkeypatch, "你好\n?", "generate", quick_bundle, "-", "--greedy", "--max-tokens", 5)
    assert result.stdout == answer("你好\n?", max_tokens=5).text + "\n"


def test_generate_stops_before_a_text(quick_bundle, answer):
    text = answer("你好", max_tokens=20).text
    stop = text[5:7]
    result = glmexport("generate", quick_bundle, "你好", "--greedy", "--max-tokens", 20, "--stop", "-", "--stop", stop)
    assert result.stdout == text[: text.index(stop)] + "\n"


def test_generate_samples_with_a_seed(quick_bundle):
    def run(*options):
        options = ("--max-tokens", 10, "--output-ids", "--temperature", 3, "--top-k", 0, "--top-p", 1, *options)
        return json.loads(glmexport("generate", quick_bundle, "a", *options).stdout.splitlines()[-1])

    assert run("--seed", 1) == run("--seed", 1) != run("--seed", 2)
    with Session(quick_bundle) as session:
        sampling = Sampling(temperature=3, top_k=0, top_p=1, seed=1)
        expected = generate(session, "a", sampling=sampling, max_tokens=10)
        assert [expected.text, expected.ids][1] == run("--seed", 1)


def test_generate_within_a_memory_limit_gives_the_same_ids_and_says_when_it_is_raised(quick_bundle, answer):
    expected = answer("你好", max_tokens=4).ids
    options = ("--greedy", "--max-tokens", 4, "--output-ids")
    result = glmexport("generate", quick_bundle, "你好", *options, "--memory-limit", "1kB")
    assert json.loads(result.stdout.splitlines()[-1]) == expected
    (note,) = result.stderr.splitlines()
    assert note.startswith("Note: The memory limit of 1.0 kB is raised to ")
    quiet = glmexport("generate", quick_bundle, "你好", *options, "--memory-limit", "1kB", "-q")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")
    roomy = glmexport("generate", quick_bundle, "你好", *options, "--memory-limit", "1.2MB")
    assert (roomy.stdout, roomy.stderr) == (result.stdout, "")


def test_a_bundle_without_a_tokenizer_says_that_ids_can_be_printed(no_tokenizer):
    special = manifest_of(no_tokenizer)["model"]["special_ids"]
    ids = f"5,7,{special['gmask']},{special['bos']}"
    result = glmexport("generate", no_tokenizer, "--input-ids", ids, "--greedy", "--max-tokens", 3)
    assert result.status == 0
    assert result.stderr.startswith("Note: ")
    assert "--output-ids" in result.stderr
    result = glmexport("generate", no_tokenizer, "--input-ids", ids, "--greedy", "--max-tokens", 3, "--output-ids")
    assert result.stderr == ""
    assert len(json.loads(result.stdout.splitlines()[-1])) in (1, 2, 3)
    assert_one_sentence(glmexport("generate", no_tokenizer, "text"), "ice_text.model")


@pytest.fixture
def planned(quick_bundle, tmp_path, monkeypatch) -> Path:
    """A bundle of which no graph can be opened."""

    def refused(*_args: object, **_options: object) -> None:
        raise AssertionError("a dry run opened a graph")

    monkeypatch.setattr("glmexport.graph_pool.GraphPool._load", refused)
    return quick_bundle


def test_a_dry_run_prints_the_plan_and_loads_nothing(planned):
    result = glmexport("generate", planned, "--dry-run")
    assert (result.status, result.stderr) == (0, "")
    graphs = ["embedding", "glm_block_0", "glm_block_1", "glm_block_2", "lm"]
    rows = [line for line in result.stdout.splitlines() if line.split()[:1] and line.split()[0] in graphs]
    assert [row.split()[0] for row in rows] == graphs
    assert all(row.rstrip().endswith(" memory") for row in rows)
    with Session(planned) as session:
        for row, count in zip(rows, session.graph_sizes.values(), strict=True):
            assert f"{count:,}" in row
    assert "KV cache  1.5 kB a token, 3.1 MB at 2048 positions" in result.stdout


def test_a_dry_run_within_limits_says_what_is_streamed_and_what_goes_to_a_gpu(planned):
    streamed = glmexport("chat", planned, "--dry-run", "--memory-limit", "1kB")
    assert streamed.stdout.count("streamed from disk") == 5
    assert "raised" in streamed.stdout
    assert "Note: " in streamed.stderr
    later = glmexport("generate", planned, "--dry-run", "--memory-limit", "2MB")
    assert later.stdout.count("memory, streamed later") + later.stdout.count("streamed from disk") == 5
    gpu = glmexport("generate", planned, "--dry-run", "--gpu-memory", "20GB")
    assert gpu.status == 0
    assert sum(line.rstrip().endswith(" GPU") for line in gpu.stdout.splitlines()) == 4
    none = glmexport("generate", planned, "--dry-run", "--gpu-memory", "1MB")
    assert none.stderr.startswith("Note: No block fits into 1.0 MB")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["prompt", "--input-ids"]),
        (["a", "--input-ids", "5,1501,1504"], ["prompt", "--input-ids"]),
        (["--input-ids", "5,x"], ["5,x"]),
        (["--input-ids", ""], ["ids"]),
        (["--input-ids", "[]"], ["ids"]),
        (["--input-ids", "5,-3"], ["-3"]),
        (["--input-ids", "5,1.5"], ["1.5"]),
        (["--input-ids", "5,²"], ["²"]),
        (["--input-ids", "5,9999999999999999999"], ["ids"]),
        (["--input-ids", "5,1856,1501,1504"], ["1856", "1855"]),
        (["--input-ids", "5,6"], ["1501", "1504"]),
        (["a", "--max-tokens", "0"], ["0"]),
        (["a", "--stop", ""], ["stop"]),
        (["a", "--memory-limit", "2 stones"], ["2 stones"]),
        (["a", "--memory-limit", "-1"], ["-1"]),
        (["a", "--memory-limit", ""], ["size"]),
        (["a", "--gpu-memory", "much"], ["much"]),
        (["a", "--temperature", "-1"], ["temperature"]),
        (["a", "--temperature", "nan"], ["temperature"]),
        (["a", "--top-p", "0"], ["top-p"]),
        (["a", "--top-k", "-1"], ["top-k"]),
        (["a", "--repetition-penalty", "0"], ["repetition penalty"]),
        (["a", "--seed", "-1"], ["seed"]),
        (["a", "--providers", "NoneSuch"], ["NoneSuch", "CPUExecutionProvider"]),
        (["a\ud800"], ["Unicode"]),
        (["中文 " * 1200], ["2048"]),
        (["a", "--dry-run", "--temperature", "-1"], ["temperature"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_generate_refuses_in_one_sentence(quick_bundle, arguments, words):
    assert_one_sentence(glmexport("generate", quick_bundle, *arguments), *words)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_is_no_bundle_is_refused(command, tmp_path, golden_checkpoint):
    for path in (tmp_path / "absent", tmp_path, golden_checkpoint):
        assert_one_sentence(glmexport(command, path, *["a"] * (command == "generate")), "is not a bundle")


def test_a_bundle_of_which_a_file_is_missing_is_refused(quick_bundle, tmp_path):
    copy = shutil.copytree(quick_bundle, tmp_path / "bundle")
    (copy / "glm_block_1.onnx.data").unlink()
    for options in ((), ("--memory-limit", "1kB")):
        result = glmexport("generate", copy, "a", "--greedy", "--max-tokens", 2, "-q", *options)
        assert result.status == 2
        (error,) = result.stderr.splitlines()
        assert error.startswith("Error: ")
        assert "glm_block_1.onnx" in error


def test_what_is_read_of_a_pipe_that_closes_is_enough(quick_bundle):
    """`glmexport generate … | head -c 1` ends without a complaint."""
    command = [sys.executable, "-m", "glmexport", "generate", quick_bundle, "a", "--greedy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


# chat

CHAT = ("--greedy", "--max-tokens", 6)


def test_lines_of_a_pipe_are_asked_one_after_another(quick_bundle, answer, monkeypatch):
    result = fed(monkeypatch, "你好\n\n12+34=\n", "chat", quick_bundle, *CHAT)
    first = polish(answer("你好", max_tokens=6).text)
    second = polish(answer(f"[Round 0]\n问：你好\n答：{first}\n[Round 1]\n问：12+34=\n答：", max_tokens=6).text)
    assert (result.status, result.stderr) == (0, "")
    assert result.stdout == f"> 你好\n{first}\n> \n> 12+34=\n{second}\n"


def test_history_and_reset(quick_bundle, answer, monkeypatch):
    lines = "/history\na\n/history\n/reset\n/history\na\n/exit\nnever asked\n"
    result = fed(monkeypatch, lines, "chat", quick_bundle, *CHAT)
    first = polish(answer("a", max_tokens=6).text)
    empty = "The history is empty.\n"
    assert result.stdout == (
        f"> /history\n{empty}> a\n{first}\n> /history\n> a\n{first}\n> /reset\n{empty}"
        f"> /history\n{empty}> a\n{first}\n> /exit\n"
    ), "after a reset the same question gets the same answer"


def test_a_saved_chat_is_gone_on_with(quick_bundle, answer, monkeypatch, tmp_path):
    path = tmp_path / "a chat.json"
    result = fed(monkeypatch, f"你好\n/save {path}\n", "chat", quick_bundle, *CHAT)
    assert result.stdout.endswith(f"1 rounds in {path}\n")
    first = polish(answer("你好", max_tokens=6).text)
    assert json.loads(path.read_text("utf-8")) == [{"query": "你好", "answer": first}]
    result = fed(monkeypatch, f"b\n/save {path}\n/quit\n", "chat", quick_bundle, *CHAT, "--history", path)
    second = polish(answer(f"[Round 0]\n问：你好\n答：{first}\n[Round 1]\n问：b\n答：", max_tokens=6).text)
    assert result.stdout.startswith(f"> b\n{second}\n")
    assert len(json.loads(path.read_text("utf-8"))) == 2


def test_stats_and_help(quick_bundle, monkeypatch):
    result = fed(monkeypatch, "/stats\n/help\na\n/stats\n", "chat", quick_bundle, *CHAT)
    assert "> /stats\nNothing was asked yet.\n" in result.stdout
    for command in ("/help", "/history", "/reset", "/save FILE", "/stats", "/exit"):
        assert f"\n{command} " in result.stdout
    assert "decode 5 tokens" in result.stdout.splitlines()[-1]


def test_what_the_chat_cannot_do_is_said_and_it_goes_on(quick_bundle, answer, monkeypatch, tmp_path):
    lines = f"/nonsense\n/save\n/save {tmp_path}\n{'中文 ' * 1200}\na\n"
    result = fed(monkeypatch, lines, "chat", quick_bundle, *CHAT)
    errors = result.stderr.splitlines()
    assert len(errors) == 4
    for error, word in zip(errors, ("/nonsense", "/save chat.json", "Is a directory", "2048"), strict=True):
        assert word in error
    assert result.status == 2, "nobody was there to see it"
    assert result.stdout.endswith(polish(answer("a", max_tokens=6).text) + "\n"), "the history is as it was"


def test_a_chat_that_cannot_begin_is_refused(quick_bundle, no_tokenizer, tmp_path, monkeypatch):
    assert_one_sentence(fed(monkeypatch, "a\n", "chat", no_tokenizer), "ice_text.model")
    path = tmp_path / "chat.json"
    assert_one_sentence(fed(monkeypatch, "a\n", "chat", quick_bundle, "--history", path), "chat.json")
    path.write_text("{")
    assert_one_sentence(fed(monkeypatch, "a\n", "chat", quick_bundle, "--history", path), "no saved chat")
    assert_one_sentence(fed(monkeypatch, "a\n", "chat", quick_bundle, "--top-p", 2), "top-p")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_text_from_stdin_that_is_no_utf8_gives_a_sentence(quick_bundle, command, errors):
    """How Python reads it depends on the locale: some refuse such bytes, some pass them on as halves of characters."""
    done = subprocess.run(
        [sys.executable, "-m", "glmexport", command, quick_bundle, *["-"] * (command == "generate"), "--greedy"],
        input=b"\xff\xfe\n/exit\n",
        env=os.environ | {"PYTHONIOENCODING": f"utf-8:{errors}"},
        capture_output=True,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert done.returncode == 2 or command == "chat"


# Ctrl-C


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *command: object) -> None:
        self.text = ""
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execve(command[0], list(map(str, command)), os.environ | {"TERM": "dumb", "NO_COLOR": "1"})

    def wait_for(self, found, seconds: float = 60) -> str:
        """Read until `found(what came since the last call)`; returns that."""
        end, seen = time.monotonic() + seconds, ""
        while not found(seen):
            if time.monotonic() > end:
                raise TimeoutError(f"waited in vain after {self.text[-2000:]!r}")
            if select.select([self.descriptor], [], [], 0.2)[0]:
                try:
                    data = os.read(self.descriptor, 65536).decode("utf-8", "replace")
                except OSError:  # the other side is closed
                    data = ""
                self.text += data
                seen += data
                assert data or found(seen), f"ended after {self.text[-2000:]!r}"
        return seen

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def insist(self, text: str, found) -> None:
        """Type it until it is heard: readline does not hear a signal that comes just before it starts to listen."""
        for _ in range(30):
            self.type(text)
            with contextlib.suppress(TimeoutError):
                self.wait_for(found, 2)
                return
        raise AssertionError(f"waited in vain after {self.text[-2000:]!r}")

    def status(self) -> int:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            if select.select([self.descriptor], [], [], 0.05)[0]:
                with_end = b""
                try:
                    with_end = os.read(self.descriptor, 65536)
                except OSError:
                    time.sleep(0.05)
                self.text += with_end.decode("utf-8", "replace")
        raise AssertionError(f"did not end after {self.text[-2000:]!r}")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.descriptor)


@pytest.fixture
def terminal():
    opened = []

    def start(*command: object) -> Terminal:
        opened.append(Terminal(*command))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_ctrl_c_stops_an_answer_and_not_the_chat(quick_bundle, terminal, tmp_path):
    chat = terminal(sys.executable, "-m", "glmexport", "chat", quick_bundle, "--greedy", "-q")
    chat.wait_for(lambda text: text.endswith("> "))
    chat.type("你好\n")
    chat.wait_for(lambda text: len(text.replace("你好", "").split("\n", 1)[-1]) > 30)
    os.kill(chat.pid, signal.SIGINT)
    shown = chat.wait_for(lambda text: "(stopped)" in text and text.endswith("> "))
    assert "Traceback" not in shown
    path = tmp_path / "chat.json"
    chat.type(f"/save {path}\n")
    chat.wait_for(lambda text: "1 rounds" in text and text.endswith("> "))
    ((query, answer),) = (entry.values() for entry in json.loads(path.read_text("utf-8")))
    assert query == "你好"
    assert len(answer) > 10, "what was shown stays"
    chat.type("b\n")
    chat.wait_for(lambda text: len(text.split("\n", 1)[-1]) > 30)
    os.kill(chat.pid, signal.SIGINT)
    chat.wait_for(lambda text: "(stopped)" in text and text.endswith("> "))
    chat.type("/stats\n")
    assert "Ctrl-C" in chat.wait_for(lambda text: "prefill" in text and text.endswith("> "))
    chat.type("/exit\n")
    assert chat.status() == 0
    assert "Traceback" not in chat.text


def test_ctrl_c_at_the_prompt_says_how_to_end_and_ctrl_d_ends(quick_bundle, terminal):
    chat = terminal(sys.executable, "-m", "glmexport", "chat", quick_bundle, "--greedy", "-q")
    chat.wait_for(lambda text: text.endswith("> "))
    chat.insist("\x03", lambda text: "Ctrl-D or /exit ends the chat." in text and text.endswith("> "))
    chat.type("\x04")
    assert chat.status() == 0
    assert "Traceback" not in chat.text


def test_ctrl_c_ends_generate_with_130(quick_bundle, terminal):
    run = terminal(sys.executable, "-m", "glmexport", "generate", quick_bundle, "a", "--greedy")
    run.wait_for(lambda text: len(text) > 20)
    os.kill(run.pid, signal.SIGINT)
    assert run.status() == 130
    assert "Stopped." in run.text
    assert "Traceback" not in run.text


# eval


@pytest.fixture(scope="module")
def examples(tmp_path_factory, answer) -> Path:
    """Three examples, none of which the model answers."""
    path = tmp_path_factory.mktemp("examples") / "three.jsonl"
    lines = [("你好", "好"), ("a", "b"), ("12+34=", "46")]
    path.write_text("\n".join(json.dumps({"prompt": prompt, "answer": right}) for prompt, right in lines), "utf-8")
    return path


def test_eval_prints_a_row_for_each_bundle(bundle, slim, examples, shared):
    int4 = shared("cli-int4", lambda path: derived(bundle, path, quantize_pass(4)))
    result = glmexport("eval", bundle, slim, int4, examples, "-q")
    assert (result.status, result.stderr) == (0, "")
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["bundle", "form", "bytes", "exact", "answers", "perplexity", "KL", "(nats)"]
    assert [row.split()[0] for row in rows] == [path.name for path in (bundle, slim, int4)]
    assert all("0/3 0.0%" in row for row in rows)
    assert "float32" in rows[0]
    assert "int4 and int8 matmulnbits" in rows[2]
    kl = rows[2].split()[-1]
    assert 0 < float(kl) < 1


def test_eval_of_a_slimmed_baseline_against_the_full_bundle_is_refused(bundle, slim, examples):
    assert_one_sentence(glmexport("eval", slim, bundle, examples), "cannot be compared")


def test_eval_as_json(bundle, slim, examples, tmp_path):
    result = glmexport("eval", bundle, slim, examples, "-q", "--json", "-")
    documents = json.loads(result.stdout)
    assert [Path(document["bundle"]) for document in documents] == [bundle, slim]
    assert [document["divergence"] is None for document in documents] == [True, False]
    assert {(document["count"], document["exact"], document["exact_share"]) for document in documents} == {(3, 0, 0.0)}
    assert documents[0]["bytes"] == sum(record["bytes"] for record in manifest_of(bundle)["files"].values())
    path = tmp_path / "report.json"
    table = glmexport("eval", bundle, examples, "-q", "--json", path)
    assert json.loads(path.read_text("utf-8"))[0]["perplexity"] == pytest.approx(documents[0]["perplexity"])
    assert table.stdout.startswith("bundle")


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_eval_gives_the_same_numbers_in_any_batch(bundle, examples, batch):
    (document,) = json.loads(glmexport("eval", bundle, examples, "-q", "--json", "-", "--batch", batch).stdout)
    with Session(bundle) as session:
        from glmexport.evaluation import evaluate, read_examples

        score = evaluate(session, read_examples(examples), batch=3)
    assert document["perplexity"] == pytest.approx(score.perplexity, rel=1e-5)
    assert (document["tokens"], document["exact"]) == (score.tokens, score.exact)


def test_eval_prints_wrong_answers(bundle, slim, examples):
    result = glmexport("eval", bundle, slim, examples, "-q", "--wrong", 2)
    wrong = [line for line in result.stdout.splitlines() if ", line " in line]
    assert len(wrong) == 4
    assert wrong[0].startswith(f"{bundle.name}, line 1: '你好' -> ")
    assert wrong[0].endswith(", expected '好'")
    assert wrong[3].startswith(f"{slim.name}, line 2: 'a' -> ")
    assert not [line for line in glmexport("eval", bundle, examples, "-q").stdout.splitlines() if ", line " in line]


def test_eval_reports_progress_where_there_is_no_terminal(bundle, examples):
    result = glmexport("eval", bundle, examples)
    assert result.status == 0
    assert any("answers" in line for line in result.stderr.splitlines())
    assert any("probabilities" in line for line in result.stderr.splitlines())


def test_eval_refuses_in_one_sentence(bundle, no_tokenizer, examples, tmp_path):
    assert_one_sentence(glmexport("eval", bundle, tmp_path / "absent.jsonl"), "absent.jsonl")
    assert_one_sentence(glmexport("eval", tmp_path, examples), "is not a bundle")
    assert_one_sentence(glmexport("eval", bundle, tmp_path, examples), "is not a bundle")
    assert_one_sentence(glmexport("eval", no_tokenizer, examples), "ice_text.model")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    assert_one_sentence(glmexport("eval", bundle, bad), "line 2")
    bad.write_text(json.dumps({"prompt": "中文 " * 1200, "answer": "b"}))
    assert_one_sentence(glmexport("eval", bundle, bad, "-q"), "Line 1", "2048")


@pytest.mark.parametrize("wrong", [np.nan, 3e4])
def test_eval_of_a_broken_head_is_still_json(tmp_path, examples, wrong):
    """Logits that are not finite, and answers that are all but impossible, are numbers that JSON has none for."""
    tensors = make_tensors(vocab_size=1856, seed=1)
    tensors["lm_head.weight"][7] = wrong
    checkpoint = write_checkpoint(tmp_path / "checkpoint", seed=1)
    write_weights(checkpoint, tensors, "bin")
    split_directory(checkpoint, tmp_path / "bundle", opset=17)
    result = glmexport("eval", tmp_path / "bundle", examples, "-q", "--json", "-")
    assert result.status == 0, result.stderr
    (document,) = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["count"] == 3
    assert glmexport("eval", tmp_path / "bundle", examples, "-q").status == 0
