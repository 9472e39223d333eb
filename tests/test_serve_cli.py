"""`serve` and the commands about models, in processes of their own and against a running server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ollama
import pytest
from checkpoints import fill_hub_cache
from conftest import ROOT, split_directory
from derived_bundles import assert_one_sentence, glmexport
from serving import entry_of, serving

TINY = ROOT / "examples" / "tiny-chatglm"


@pytest.fixture(scope="module")
def answering(shared):
    """The example that answers."""
    return shared("answering", lambda path: split_directory(TINY, path, opset=17))


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    """A store of the test's own, and a server address where nobody answers."""
    monkeypatch.setenv("GLMEXPORT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GLMEXPORT_HOST", "127.0.0.1:9")
    monkeypatch.delenv("GLMEXPORT_API_KEY", raising=False)
    return tmp_path / "home"


@pytest.fixture
def modelfile(tmp_path, answering) -> Path:
    path = tmp_path / "Modelfile"
    path.write_text(f'FROM {answering}\nPARAMETER temperature 0\nPARAMETER num_gpu 1\nSYSTEM ""\n')
    return path


@pytest.fixture
def server(answering, home):
    with serving(home, entry_of(answering)) as running:
        yield running


# The store, with nobody running


def test_create_list_show_cp_rm(modelfile, answering, home):
    created = glmexport("create", "mario", "-f", modelfile)
    assert created.stdout == f"mario:latest: {answering}\n"
    assert "num_gpu" in created.stderr
    assert glmexport("create", "mario", "-f", modelfile, "-q").stderr == ""
    glmexport("cp", "mario", "mario:v2")
    listed = glmexport("list")
    assert "mario:latest" in listed.stdout
    assert "mario:v2" in listed.stdout
    assert "No server" in listed.stderr
    assert glmexport("list", "-q").stderr == ""
    assert "PARAMETER temperature 0.0" in glmexport("show", "mario").stdout
    shown = glmexport("show", "mario", "--modelfile").stdout
    assert shown.startswith(f"FROM {answering}\n")
    assert "#" not in shown
    assert glmexport("rm", "mario", "mario:v2").status == 0
    assert "mario" not in glmexport("list").stdout
    for command in (("show", "mario"), ("rm", "mario"), ("cp", "mario", "x")):
        assert_one_sentence(glmexport(*command), "no model 'mario'")


def test_a_from_is_found_from_the_modelfiles_place(tmp_path, answering, home, monkeypatch):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "here").symlink_to(answering)
    (tmp_path / "place" / "Modelfile").write_text("FROM ./here")
    assert glmexport("create", "x", "-f", tmp_path / "place" / "Modelfile").status == 0
    monkeypatch.chdir(tmp_path / "place")
    assert glmexport("create", "y").status == 0


def test_refusals_of_create(tmp_path, modelfile):
    assert_one_sentence(glmexport("create", "x", "-f", tmp_path / "none"), "cannot be read")
    assert_one_sentence(glmexport("create", "../x", "-f", modelfile), "no name for a model")
    modelfile.write_text("FROM nothing")
    assert_one_sentence(glmexport("create", "x", "-f", modelfile), "neither a model")


def test_ps_and_stop_need_a_server(home):
    for command in (("ps",), ("stop", "x")):
        assert_one_sentence(glmexport(*command), "No glmexport server answers at http://127.0.0.1:9")


# A running server


def test_the_commands_ask_a_running_server(server, modelfile, monkeypatch):
    monkeypatch.setenv("GLMEXPORT_HOST", server.url)
    assert "tiny:latest" in glmexport("ps").stdout
    assert "forever" in glmexport("ps").stdout
    glmexport("create", "mario", "-f", modelfile)
    assert {"tiny:latest", "mario:latest"} <= set(glmexport("list").stdout.split())
    glmexport("cp", "tiny", "luigi")
    assert "luigi:latest" in glmexport("list").stdout
    assert "FROM" in glmexport("show", "luigi").stdout
    assert glmexport("stop", "tiny").status == 0
    assert "tiny" not in glmexport("ps").stdout
    assert glmexport("rm", "luigi").status == 0
    assert_one_sentence(glmexport("rm", "luigi"), "model 'luigi' not found")
    assert_one_sentence(glmexport("rm", "tiny"), "started with")
    client = ollama.Client(server.url)
    assert client.generate("mario", "12+34=").response == "46"


def test_another_server_on_the_port_is_left_alone(server, monkeypatch):
    monkeypatch.setattr("glmexport.serve.operations.__version__", "x")
    monkeypatch.setattr("glmexport.serve.client.Client.ask", lambda *_: {"version": "0.12"})
    monkeypatch.setenv("GLMEXPORT_HOST", server.url)
    assert "No server" in glmexport("list").stderr


def test_the_key_is_sent(answering, home, monkeypatch):
    with serving(home, entry_of(answering), api_key="k") as server:
        assert_one_sentence(glmexport("ps", "--host", server.url), "API key")
        assert "tiny" in glmexport("ps", "--host", server.url, "--api-key", "k").stdout
        monkeypatch.setenv("GLMEXPORT_API_KEY", "k")
        assert "tiny" in glmexport("ps", "--host", server.url.removeprefix("http://")).stdout


# serve


def start(*arguments: object) -> tuple[subprocess.Popen, str]:
    """A process that serves, and the address it printed."""
    command = [sys.executable, "-m", "glmexport", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_in_a_process_of_its_own_ends_well_on_a_signal(answering, number):
    process, url = start(answering, "--served-model-name", "zai-org/chatglm-6b", "--max-num-seqs", "2")
    try:
        client = ollama.Client(url)
        assert [model.model for model in client.list().models] == ["zai-org/chatglm-6b:latest"]
        assert client.generate("zai-org/chatglm-6b", "12+34=", options={"temperature": 0}).response == "46"
        stream = client.generate("zai-org/chatglm-6b", "你好", stream=True, options={"temperature": 0})
        next(stream)
        process.send_signal(number)
        assert list(stream)[-1].done
        _, log = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "2 rows x 2048 places" in log
    assert "one after the other" in log
    assert "Traceback" not in log
    assert "你好" not in log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "no key"),
        (["--api-key", " "], "API key is empty"),
        (["--api-key-file", "/nothing/there"], "cannot be read as a key"),
        (["--keep-alive", "soon"], "no duration"),
        (["--max-model-len", "4096"], "2048 positions"),
        (["--served-model-name", "a", "--served-model-name", "a"], "Two models"),
        (["--generation-config", "/nothing"], "generation_config.json"),
        (["--chat-template", "/nothing"], "/nothing"),
        (["--host", "203.0.113.1", "--allow-public"], "cannot be listened on"),
    ],
)
def test_what_serve_refuses(answering, arguments, words):
    assert_one_sentence(glmexport("serve", answering, "--port", "0", "-q", *arguments), words)


def test_serve_without_its_extra_is_a_sentence(answering, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)
    for name in [name for name in sys.modules if name.startswith(("glmexport.serve.app", "glmexport.serve.server"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert_one_sentence(glmexport("serve", answering), "pip install glmexport[serve]")


def test_what_the_commands_need_is_light():
    code = (
        "import sys, glmexport.cli.ps, glmexport.cli.run_model, glmexport.cli.serve\n"
        "heavy = {'torch', 'starlette', 'uvicorn', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# run


def test_run_a_bundle_a_name_and_a_checkpoint(answering, modelfile, home):
    assert glmexport("run", answering, "12+34=").stdout.strip()
    glmexport("create", "mario", "-f", modelfile)
    assert glmexport("run", "mario", "12+34=").stdout == "46\n"
    verbose = glmexport("run", "mario", "12+34=", "--verbose")
    assert verbose.stdout == "46\n"
    assert "/s" in verbose.stderr
    first = glmexport("run", TINY, "12+34=")
    assert "made once" in first.stderr
    (made,) = (home / "bundles").iterdir()
    again = glmexport("run", TINY, "12+34=")
    assert "made once" not in again.stderr
    assert [*(home / "bundles").iterdir()] == [made]
    manifest = json.loads((made / "manifest.json").read_text("utf-8"))
    assert manifest["quantization"] is not None


def test_run_a_hub_id_from_the_cache(monkeypatch, tmp_path, home):
    cache = tmp_path / "hub"
    fill_hub_cache(cache, shutil.copytree(TINY, tmp_path / "source"))  # it moves what it is given
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = glmexport("run", "zai-org/chatglm-6b", "12+34=", "-q")
    assert done.status == 0, done.stderr
    assert [path.name for path in (home / "bundles").iterdir()] == ["zai-org--chatglm-6b-slim-bf16-int4-ort"]


def test_run_nothing():
    assert_one_sentence(glmexport("run", "nothing"), "no model, no directory and no hub id")
    assert_one_sentence(glmexport("run", "a:b:c"), "no model, no directory and no hub id")
