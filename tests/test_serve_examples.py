"""The programs in examples/ that ask a server, and the files to deploy one."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys

import click
import pytest
from conftest import ROOT, split_directory
from serving import entry_of, serving

from glmexport.cli.main import cli

EXAMPLES, DEPLOY = ROOT / "examples", ROOT / "examples" / "deploy"


@pytest.fixture(scope="module")
def url(shared, tmp_path_factory):
    bundle = shared("answering", lambda path: split_directory(EXAMPLES / "tiny-chatglm", path, opset=17))
    with serving(tmp_path_factory.mktemp("home"), entry_of(bundle)) as server:
        yield server.url


def shown(*command: object) -> list[str]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ollamas_client(url):
    lines = shown(sys.executable, EXAMPLES / "ask_ollama.py", url, "我叫小明。", "我叫什么名字？")
    assert (lines[0], lines[2]) == ("你好，小明！", "你叫小明。")
    assert re.fullmatch(r"\[\d+ tokens, \d+/s\]", lines[1])


def test_openais_client(url):
    lines = shown(sys.executable, EXAMPLES / "ask_openai.py", url, "12+34=")
    assert lines[0] == "46"
    assert len(lines) > 5


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(url):
    lines = [json.loads(line) for line in shown("sh", EXAMPLES / "ask_curl.sh", url, "tiny", "12+34=") if line]
    assert lines[0]["response"] == lines[1]["choices"][0]["message"]["content"] == "46"
    assert "".join(line["message"]["content"] for line in lines[2:]) == "46"


def test_the_unit_runs_a_command_that_there_is():
    unit = configparser.ConfigParser(interpolation=None, strict=False, comment_prefixes=("#",))
    unit.optionxform = str
    unit.read_string((DEPLOY / "glmexport.service").read_text("utf-8"))
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[0] == "/opt/glmexport/bin/glmexport"
    demand_options(words[1:])
    assert unit["Service"]["NoNewPrivileges"] == "yes"


def test_the_dockerfile_keeps_the_usual_rules():
    text = (DEPLOY / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    steps = [line.partition(" ")[::2] for line in text.splitlines() if line and not line.startswith("#")]
    words = [word for word, _ in steps]
    assert words[0] == "FROM"
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", steps[0][1])
    assert "latest" not in steps[0][1]
    assert set(words) <= {"FROM", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    assert steps[words.index("USER")][1] != "root"
    assert words.index("USER") < words.index("ENTRYPOINT")
    for word, arguments in steps:
        if word == "COPY":
            assert all((ROOT / source).exists() for source in arguments.split()[:-1]), arguments
        if word == "RUN" and "pip install" in arguments:
            assert "--no-cache-dir" in arguments
    command = json.loads(steps[words.index("ENTRYPOINT")][1])
    demand_options(command[1:])
    json.loads(steps[words.index("HEALTHCHECK")][1].partition("CMD ")[2])


def demand_options(words: list[str]) -> None:
    """Every option is one of the command's."""
    command = cli.get_command(None, words[0])
    assert isinstance(command, click.Command)
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
