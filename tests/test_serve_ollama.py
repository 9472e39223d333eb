"""Ollama's API, asked by Ollama's own client."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import ollama
import pytest
from conftest import ROOT, split_directory
from serving import entry_of, serving, until

TINY = ROOT / "examples" / "tiny-chatglm"
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def answering(shared):
    """The example that answers."""
    return shared("answering", lambda path: split_directory(TINY, path, opset=17))


@pytest.fixture(scope="module")
def running(answering, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    copy_into_store(answering, home)
    with serving(home, entry_of(answering), max_queue=8) as server:
        yield server


def copy_into_store(bundle, home):
    """A copy of a bundle in a model store."""
    import shutil

    shutil.copytree(bundle, home / "bundles" / "stored")


@pytest.fixture
def client(running):
    return ollama.Client(running.url)


def one_line(error) -> str:
    text = str(error.value.error)
    assert "\n" not in text
    return text


# What there is


def test_list_show_and_ps(client, answering):
    (model,) = [model for model in client.list().models if model.model == "tiny:latest"]
    assert len(model.digest) == 64
    assert model.size > 1_000_000
    assert model.modified_at.tzinfo is not None
    assert model.details.family == "chatglm"
    shown = client.show("tiny")
    assert shown.modelinfo["general.architecture"] == "chatglm-6b"
    assert shown.modelinfo["chatglm.context_length"] == 2048
    assert shown.capabilities == ["completion"]
    assert f"FROM {answering}" in shown.modelfile
    client.generate("tiny", "")
    (loaded,) = client.ps().models
    assert loaded.model == "tiny:latest"
    assert loaded.context_length == 2048
    assert loaded.expires_at > datetime.now(UTC) + timedelta(days=365)


def test_version_and_root(running):
    assert all(part.isdecimal() for part in running.json("GET", "/api/version")["version"].split("."))
    for method in ("GET", "HEAD"):
        status, _, body = running.ask(method, "/")
        assert (status, body) == (200, b"Ollama is running" if method == "GET" else b"")


# Answers


def test_generate(client):
    answer = client.generate("tiny", "12+34=", options=GREEDY)
    assert answer.response == "46"
    assert answer.done
    assert answer.done_reason == "stop"
    assert answer.prompt_eval_count == 9
    assert answer.eval_count >= 3
    assert answer.total_duration >= answer.eval_duration >= 0
    assert answer.created_at.endswith("Z")


def test_chat_with_a_history(client):
    messages = [
        {"role": "user", "content": "我叫小明。"},
        {"role": "assistant", "content": "你好，小明！"},
        {"role": "user", "content": "我叫什么名字？"},
    ]
    assert client.chat("tiny", messages, options=GREEDY).message.content == "你叫小明。"


def test_streams_join_to_the_whole_answer(client):
    messages = [{"role": "user", "content": "Reverse: apple"}]
    whole = client.chat("tiny", messages, options=GREEDY)
    parts = list(client.chat("tiny", messages, stream=True, options=GREEDY))
    assert len(parts) > 3
    assert "".join(part.message.content for part in parts) == whole.message.content == "elppa"
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == whole.eval_count
    assert parts[0].model == "tiny"
    generated = list(client.generate("tiny", "Reverse: apple", stream=True, options=GREEDY))
    assert "".join(part.response for part in generated) == "elppa"
    assert generated[-1].done_reason == "stop"


def test_an_unfinished_answer_is_gone_on_with(client):
    messages = [{"role": "user", "content": "Reverse: apple"}, {"role": "assistant", "content": "el"}]
    assert client.chat("tiny", messages, options=GREEDY).message.content == "ppa"


def test_a_context_continues_a_conversation(client):
    first = client.generate("tiny", "我叫小明。", options=GREEDY)
    assert first.response == "你好，小明！"
    second = client.generate("tiny", "我叫什么名字？", context=first.context, options=GREEDY)
    assert second.response == "你叫小明。"


def test_stop_texts_and_limits(client):
    assert client.generate("tiny", "Reverse: apple", options={**GREEDY, "stop": ["pp"]}).response == "el"
    assert client.generate("tiny", "Reverse: apple", options={**GREEDY, "stop": "zz"}).response == "elppa"
    short = client.generate("tiny", "Reverse: apple", options={**GREEDY, "num_predict": 2})
    assert (short.done_reason, short.eval_count) == ("length", 2)


def test_logprobs(client):
    answer = client.generate("tiny", "12+34=", options=GREEDY, logprobs=True, top_logprobs=2)
    assert "".join(entry.token for entry in answer.logprobs).strip() == "46"
    for entry in answer.logprobs:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    assert client.generate("tiny", "12+34=", options=GREEDY).logprobs is None
    (first, *_) = client.chat(
        "tiny", [{"role": "user", "content": "12+34="}], stream=True, logprobs=True, options=GREEDY
    )
    assert first.logprobs[0].logprob > -0.1


def test_a_seed_gives_the_same_answer_again(client):
    wild = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "num_predict": 12}

    def answer(seed):
        return client.generate("tiny", "你好", options={**wild, "seed": seed}).response

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1
    assert len({answer(-1) for _ in range(5)}) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": -1, "top_p": 0, "min_p": 0.1},
        {"repeat_penalty": 1.1, "repeat_last_n": -1, "presence_penalty": 0.5, "frequency_penalty": -0.5},
        {"repeat_penalty": 1.1, "repeat_last_n": 0},
        {"num_ctx": 40, "mirostat": 1, "num_thread": 8, "num_gpu": 99, "whatever": "x"},
        {"seed": None, "stop": []},
    ],
)
def test_options_of_every_kind_are_taken(client, options):
    assert client.generate("tiny", "12+34=", options={"num_predict": 3, **options}).done


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "warm"},
        {"temperature": True},
        {"temperature": -1},
        {"top_k": 1.5},
        {"num_predict": "many"},
        {"stop": [1]},
        {"stop": [""]},
        {"min_p": 2},
        {"repeat_penalty": 0},
        {"seed": [1]},
    ],
)
def test_options_of_the_wrong_kind_are_400(client, options):
    with pytest.raises(ollama.ResponseError) as error:
        client.generate("tiny", "12+34=", options=options)
    assert error.value.status_code == 400
    assert one_line(error)


# What is refused


def test_a_prompt_longer_than_the_context_is_400_with_both_numbers_unless_it_may_be_cut(client, running):
    with pytest.raises(ollama.ResponseError) as error:
        client.generate("tiny", "12+34=", options={"num_ctx": 8})
    assert error.value.status_code == 400
    assert "9 tokens" in one_line(error)
    assert "context 8" in one_line(error)
    cut = {"model": "tiny", "prompt": "99+" * 40 + "12+34=", "stream": False, "truncate": True}
    assert running.json("POST", "/api/generate", {**cut, "raw": True, "options": {**GREEDY, "num_ctx": 12}})["done"]
    messages = [
        *[{"role": "user", "content": "Reverse: apple"}, {"role": "assistant", "content": "elppa"}] * 30,
        {"role": "user", "content": "12+34="},
    ]
    chat = {"model": "tiny", "messages": messages, "stream": False, "options": {**GREEDY, "num_ctx": 32}}
    assert running.ask("POST", "/api/chat", chat)[0] == 400
    assert running.json("POST", "/api/chat", {**chat, "truncate": True})["message"]["content"] == "46"


def test_errors_that_ollamas_clients_know(client, running):
    with pytest.raises(ollama.ResponseError, match="model 'none' not found") as error:
        client.chat("none", [{"role": "user", "content": "x"}])
    assert error.value.status_code == 404
    for call in (
        lambda: client.pull("tiny"),
        lambda: client.embed("tiny", "x"),
        lambda: client.embeddings("tiny", "x"),
        lambda: client.push("tiny"),
    ):
        with pytest.raises(ollama.ResponseError) as error:
            call()
        assert error.value.status_code == 501
        assert one_line(error).endswith(".")
    for more in (
        {"format": "json"},
        {"think": True},
        {"suffix": "x"},
        {"template": "{{ .Prompt }}"},
        {"images": [b"x"]},
    ):
        with pytest.raises(ollama.ResponseError) as error:
            client.generate("tiny", "x", **more)
        assert error.value.status_code == 400, more
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(ollama.ResponseError, match="does not support tools"):
        client.chat("tiny", [{"role": "user", "content": "x"}], tools=[tool])
    status, _, body = running.ask("GET", "/api/nothing")
    assert status == 404
    assert "error" in json.loads(body)
    assert running.ask("GET", "/api/chat")[0] == 405


# Models come and go


def test_a_model_is_loaded_and_unloaded(client):
    client.generate("tiny", "", keep_alive=0)
    assert client.ps().models == []
    assert client.generate("tiny", "").done_reason == "load"
    assert len(client.ps().models) == 1
    assert client.chat("tiny", [], keep_alive=0).done_reason == "unload"
    assert client.ps().models == []
    answer = client.generate("tiny", "12+34=", options=GREEDY, keep_alive="10m")
    assert answer.response == "46"
    assert answer.load_duration > 0
    assert client.ps().models[0].expires_at < datetime.now(UTC) + timedelta(minutes=11)


def test_a_model_leaves_when_its_time_is_over(client):
    client.generate("tiny", "12+34=", keep_alive=0.01)
    until(lambda: not client.ps().models)


def test_create_copy_and_delete(client, running):
    created = client.create(
        "mario",
        from_="tiny",
        parameters={"temperature": 0, "stop": ["，"]},
        messages=[{"role": "user", "content": "我叫小明。"}, {"role": "assistant", "content": "你好，小明！"}],
        license="MIT",
    )
    assert created.status == "success"
    statuses = [part.status for part in client.create("luigi", from_="stored", system="12", stream=True)]
    assert statuses[-1] == "success"
    assert client.chat("mario", [{"role": "user", "content": "我叫什么名字？"}]).message.content == "你叫小明。"
    shown = client.show("mario")
    assert "temperature 0.0" in shown.parameters
    assert shown.license == "MIT"
    client.copy("mario", "mario:v2")
    client.copy("tiny", "tiny2")
    names = {model.model for model in client.list().models}
    assert {"mario:latest", "mario:v2", "luigi:latest", "tiny2:latest", "tiny:latest"} <= names
    for name in ("mario", "mario:v2", "luigi", "tiny2"):
        client.delete(name)
    assert {model.model for model in client.list().models} == {"tiny:latest"}
    with pytest.raises(ollama.ResponseError) as error:
        client.delete("mario")
    assert error.value.status_code == 404
    with pytest.raises(ollama.ResponseError) as error:
        client.delete("tiny")
    assert error.value.status_code == 400
    modelfile = {"name": "old", "modelfile": 'FROM tiny\nSYSTEM "x"\nPARAMETER top_k 3', "stream": False}
    assert running.json("POST", "/api/create", modelfile) == {"status": "success"}
    assert "top_k 3" in client.show("old").parameters
    client.delete("old")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a b", ".x", "x:", "x:..", "a:b:c", "x" * 200, "é", "..", "a\n"])
def test_names_that_are_none_are_refused(running, name):
    for path, body in (
        ("/api/create", {"model": name, "from": "tiny"}),
        ("/api/copy", {"source": "tiny", "destination": name}),
    ):
        assert running.ask("POST", path, body)[0] == 400, path
    assert running.ask("DELETE", "/api/delete", {"model": name})[0] in (400, 404)
    assert running.ask("POST", "/api/copy", {"source": name, "destination": "x"})[0] == 404


@pytest.mark.parametrize(
    "source", ["/", "/etc", "../stored", "stored/../../..", "stored/../../bundles/../models", "~", ".."]
)
def test_nothing_outside_the_store_is_read_over_http(running, answering, source, tmp_path):
    assert running.ask("POST", "/api/create", {"model": "x", "from": source})[0] == 400
    assert running.ask("POST", "/api/create", {"model": "x", "from": str(answering)})[0] == 400
    modelfile = {"model": "x", "modelfile": f"FROM {answering}"}
    assert running.ask("POST", "/api/create", modelfile)[0] == 400


def test_a_link_out_of_the_store_is_not_followed(running, answering):
    home = running.app.state.server.store.bundles
    (home / "link").symlink_to(answering)
    status, _, body = running.ask("POST", "/api/create", {"model": "x", "from": "link"})
    assert status == 400
    assert "model store" in json.loads(body)["error"]


def test_a_template_of_gos_is_refused_with_a_pointer(client):
    with pytest.raises(ollama.ResponseError, match="Jinja"):
        client.create("x", from_="tiny", template="{{ .Prompt }}")
