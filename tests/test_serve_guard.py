"""Who may ask a server, what a request may be, and that no body makes it say 500."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import random
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import entry_of, serving, until

from glmexport.errors import GlmExportError
from glmexport.serve import web_page
from glmexport.serve.app import ROUTES
from glmexport.serve.guard import same_key

KEY = "key-of-tests"
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def running(quick_bundle, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("home"), entry_of(quick_bundle), max_body=20_000, body_timeout=0.5) as server:
        yield server


@pytest.fixture(scope="module")
def locked(quick_bundle, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("home"), entry_of(quick_bundle), api_key=KEY) as server:
        yield server


# The key


def test_every_route_but_health_wants_the_key(locked):
    paths = {route.path for route in locked.app.routes}
    assert {path for path, _, _ in ROUTES} < paths
    for path in paths:
        for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": KEY},
                {"Authorization": "Basic x"},
            ):
                expected = {200, 405} if path == "/health" else {401}
                url = path.replace("{name:path}", "tiny").replace("{digest}", "x")
                assert locked.ask(method, url, headers=headers)[0] in expected, (method, path)
    assert locked.ask("GET", "/nothing")[0] == 401


def test_the_key_opens(locked):
    assert locked.ask("GET", "/v1/models", headers=BEARER)[0] == 200
    password = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    assert locked.ask("GET", "/api/tags", headers={"Authorization": f"Basic {password}"})[0] == 200


def test_a_browser_is_asked_for_the_key(locked):
    status, headers, _ = locked.ask("GET", "/", headers={"Accept": "text/html"})
    assert status == 401
    assert headers["www-authenticate"].startswith("Basic")
    assert locked.ask("GET", "/")[1]["www-authenticate"].startswith("Bearer")


def test_an_error_without_the_key_has_the_surfaces_form(locked):
    body = json.loads(locked.ask("GET", "/v1/models")[2])
    assert body["error"]["code"] == "invalid_api_key"
    assert isinstance(json.loads(locked.ask("GET", "/api/tags")[2])["error"], str)


def test_keys_are_compared_whole():
    assert same_key("ä", "ä")
    assert not same_key("", "a")
    assert not same_key("ab", "a")


# Host and Origin


@pytest.mark.parametrize("host", ["evil.example", "evil.example:11434", "127.0.0.1.evil.example", "", "[", "10.0.0.1"])
def test_a_foreign_host_is_refused(running, host):
    assert running.ask("GET", "/api/tags", headers={"Host": host})[0] in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "localhost:11434", "127.0.0.1:1", "[::1]:5", "LOCALHOST"])
def test_names_of_the_loopback_are_taken(running, host):
    assert running.ask("GET", "/api/tags", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "file://", "http://localhost:1", "x", "http://["])
def test_a_foreign_origin_is_refused_and_there_is_no_cors(running, origin):
    for method, path in (("POST", "/api/generate"), ("GET", "/v1/models"), ("OPTIONS", "/v1/chat/completions")):
        status, headers, _ = running.ask(method, path, {} if method == "POST" else None, {"Origin": origin})
        assert status == 403
        assert not [name for name in headers if name.startswith("access-control")]


def test_the_servers_own_origin_is_taken(running):
    assert running.ask("GET", "/api/tags", headers={"Origin": running.url})[0] == 200
    assert running.ask("GET", "/api/tags", headers={"Sec-Fetch-Site": "same-origin"})[0] == 200
    assert running.ask("GET", "/api/tags", headers={"Sec-Fetch-Site": "cross-site"})[0] == 403


def test_more_hosts_may_be_allowed(quick_bundle, tmp_path):
    with serving(tmp_path, entry_of(quick_bundle), preload=False, hosts=("box.example",)) as server:
        assert server.ask("GET", "/api/tags", headers={"Host": "box.example:11434"})[0] == 200
        assert server.ask("GET", "/api/tags")[0] == 200
        assert server.ask("GET", "/api/tags", headers={"Host": "other.example"})[0] == 403


# Sizes and times


def test_a_body_that_is_too_large_is_413(running):
    big = {"model": "tiny", "prompt": "x" * 30_000}
    assert running.ask("POST", "/api/generate", big)[0] == 413
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=20)
    connection.request("POST", "/v1/completions", iter([b"x" * 15_000, b"y" * 15_000]), encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["type"] == "invalid_request_error"
    connection.close()


def test_a_body_that_does_not_come_is_408(running):
    with socket.create_connection(running.url.removeprefix("http://").split(":"), timeout=20) as connection:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_connection_that_sends_no_whole_request_is_closed(running, monkeypatch):
    monkeypatch.setattr("glmexport.serve.protocol.PatientProtocol.header_seconds", 0.05)
    address = running.url.removeprefix("http://").split(":")
    for data in (b"", b"GET / HTTP/1.1\r\nHost:"):
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(data)
            assert connection.recv(1000) == b""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /")
        while connection.recv(1000):
            pass


def test_a_request_that_takes_longer_than_a_head_may_is_answered(running, monkeypatch):
    monkeypatch.setattr("glmexport.serve.protocol.PatientProtocol.header_seconds", 0.02)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
    assert running.json("POST", "/v1/completions", body)["usage"]["completion_tokens"] == 400


def test_a_client_that_reads_nothing_is_let_go(quick_bundle, tmp_path):
    with serving(tmp_path, entry_of(quick_bundle), send_timeout=0.2, max_body=4 << 20) as server:
        address = server.url.removeprefix("http://").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(20)
            connection.connect((address[0], int(address[1])))
            many = {"model": "tiny", "prompt": ["x"] * 4, "max_tokens": 1900, "ignore_eos": True, "stream": True}
            body = json.dumps({**many, "logprobs": 20}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            until(lambda: server.engine().running == 4)
            until(lambda: server.engine().running == 0)


def test_a_client_that_leaves_the_queue_leaves_no_row(quick_bundle, tmp_path):
    with serving(tmp_path, entry_of(quick_bundle), max_num_seqs=1) as server:
        address = server.url.removeprefix("http://").split(":")
        body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1900, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        clients = [socket.create_connection(address, timeout=20) for _ in range(3)]
        for client in clients:
            client.sendall(head + body)
        until(lambda: server.engine().waiting == 2)
        for client in clients[::-1]:
            client.close()
        until(lambda: server.engine().waiting == server.engine().running == 0)


def test_a_prompt_of_more_tokens_than_a_step_takes_is_refused(quick_bundle, tmp_path):
    with serving(tmp_path, entry_of(quick_bundle), max_batched_tokens=5) as server:
        body = {"model": "tiny", "prompt": "one two three four five six", "max_tokens": 1}
        status, _, text = server.ask("POST", "/v1/completions", body)
        assert status == 400
        assert "context 5" in json.loads(text)["error"]["message"]


def test_a_request_that_takes_too_long_is_told(quick_bundle, tmp_path):
    with serving(tmp_path, entry_of(quick_bundle), request_timeout=1e-9) as server:
        body = {"model": "tiny", "prompt": "x", "stream": False}
        status, headers, text = server.ask("POST", "/api/generate", body)
        assert status == 408
        assert headers["x-should-retry"] == "false"
        assert "time limit" in json.loads(text)["error"]


# Bodies of every kind

POSTS = [path for path, _, method in ROUTES if method == "POST"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)
FIELDS = (
    *("model", "name", "prompt", "messages", "options", "stream", "raw", "system", "template", "context", "images"),
    *("suffix", "format", "keep_alive", "think", "truncate", "logprobs", "top_logprobs", "tools", "max_tokens", "n"),
    *("max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "echo", "best_of", "from"),
    *("logit_bias", "stop_token_ids", "ignore_eos", "stream_options", "source", "destination", "parameters", "license"),
    *("tokens", "modelfile"),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(POSTS), body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), named=st.booleans()
)
def test_no_object_makes_it_say_500(running, path, body, named):
    body = {**body, "model": "tiny"} if named else body
    body.setdefault("options", {"num_predict": 2}) if path.startswith("/api") else body.setdefault("max_tokens", 2)
    check(running, path, json.dumps(body).encode())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(POSTS), body=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_make_it_say_500(running, path, body):
    check(running, path, body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 15_000,
        b'{"model": "tiny", "prompt": "\\ud800", "stream": false}',
        b'{"model": "\\ud800"}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\udfff"}]}',
        b'{"model": "tiny", "prompt": "x", "options": {"temperature": NaN}}',
        b'{"model": "tiny", "prompt": "x", "options": {"temperature": 1e999}}',
        b'{"model": "tiny", "prompt": "x", "temperature": -Infinity}',
        b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "x", "seed": 99999999999999999999999, "max_tokens": 1}',
        b'{"model": "tiny", "prompt": "x", "options": {"num_ctx": 99999999999999999999, "num_predict": 1}}',
        b'{"model": "tiny", "prompt": "x", "options": {"top_k": 99999999999999999999, "num_predict": 1}}',
        b'{"model": "tiny", "prompt": [99999999999999999999], "max_tokens": 1}',
        b'{"model": "tiny", "prompt": [-1], "max_tokens": 1}',
        b'{"model": "tiny", "prompt": [1, "x"], "max_tokens": 1}',
        b'{"model": "tiny", "prompt": [[]], "max_tokens": 1}',
        b'{"model": "tiny", "prompt": [130001, 5], "max_tokens": 1}',
        b'{"model": "tiny", "prompt": "", "max_tokens": 1}',
        b'{"model": "tiny", "prompt": "", "echo": true, "logprobs": 1, "max_tokens": 0}',
        b'{"model": "tiny", "tokens": [99999999999999999999]}',
        b'{"model": "tiny", "prompt": "x", "context": [99999999999]}',
        b'{"model": "tiny", "prompt": "x", "keep_alive": "soon"}',
        b'{"model": "tiny", "prompt": "x\\u0000y", "max_tokens": 1}',
        b'{"model": "x", "from": "tiny", "parameters": {"stop": 5}}',
        b'{"model": "x", "from": "tiny", "messages": [{"role": 5}]}',
        b'{"model": "x", "from": "tiny", "messages": [{}]}',
        b'{"model": "x", "modelfile": "FROM"}',
        b'{"model": "tiny", "model": "tiny"}',
        "﻿{}".encode(),
    ],
)
def test_bodies_that_were_made_to_hurt(running, body):
    for path in POSTS:
        check(running, path, body)


def check(running, path, body):
    status, _, text = running.ask("POST", path, body)
    assert status < 500 or status == 501, (path, body, text)
    if status != 200:
        error = json.loads(text)["error"]
        message = error["message"] if path.startswith("/v1/") else error
        assert message
        assert message.isprintable() or "\n" in message


def test_garbage_on_the_wire_does_not_matter(running):
    random.seed(1)
    address = running.url.removeprefix("http://").split(":")
    for _ in range(20):
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(random.randbytes(200))
    assert running.ask("GET", "/health")[0] == 200


# Operations


def test_health_version_and_metrics(running):
    running.ask("POST", "/api/generate", {"model": "tiny", "prompt": "x", "options": {"num_predict": 3}})
    assert running.json("GET", "/health") == {"status": "ok"}
    assert running.json("GET", "/version")["server"] == "glmexport"
    text = running.ask("GET", "/metrics")[2].decode()
    for name in (
        'glmexport_rows_running{model="tiny"} 0.0',
        'glmexport_kv_slots{model="tiny"} 4.0',
        "glmexport_rows_waiting",
        "glmexport_time_to_first_token_seconds_bucket",
        "glmexport_inter_token_seconds_count",
        "glmexport_queue_seconds_sum",
        "glmexport_prompt_tokens_total",
        "glmexport_answer_tokens_total",
        'path="/api/generate",status="200"',
    ):
        assert name in text, name


def test_no_prompt_is_in_the_log_unless_asked_for(running, quick_bundle, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "glmexport")
    body = {"model": "tiny", "prompt": "secret words", "options": {"num_predict": 1}, "odd": "secret words"}
    running.ask("POST", "/api/generate", body)
    running.ask("POST", "/v1/chat/completions", {"model": "tiny", "messages": "secret words"})
    running.ask("GET", "/v1/models/%0A%1b[31m")
    until(lambda: "/v1/models/%0A" in caplog.text)
    assert "secret" not in caplog.text
    assert "\x1b" not in caplog.text
    with serving(tmp_path, entry_of(quick_bundle), log_prompts=True) as server:
        server.ask("POST", "/api/generate", body)
    assert "secret words" in caplog.text


def test_a_server_that_stops_lets_its_answers_end(quick_bundle, tmp_path):
    lines = []
    with serving(tmp_path, entry_of(quick_bundle)) as server:
        body = {"model": "tiny", "prompt": "x", "options": {"num_predict": 60, "temperature": 0}}
        reader = threading.Thread(target=lambda: lines.append(server.ask("POST", "/api/generate", body)))
        reader.start()
        until(lambda: server.engine().running == 1)
    reader.join(20)
    (status, _, text), last = lines[0], json.loads(lines[0][2].splitlines()[-1])
    assert status == 200
    assert last.get("done") is True
    assert text


def test_a_server_that_must_stop_tells_its_answers(quick_bundle, tmp_path):
    lines = []
    with serving(tmp_path, entry_of(quick_bundle), shutdown_timeout=0.0) as server:
        body = {
            "model": "tiny",
            "prompt": "x",
            "options": {"num_predict": 1900, "stop": ["\x00\x00"], "temperature": 0},
        }
        body = {
            "model": "tiny",
            "prompt": "x",
            "max_tokens": 1900,
            "ignore_eos": True,
            "stream": True,
            "temperature": 0,
        }
        reader = threading.Thread(target=lambda: lines.append(server.ask("POST", "/v1/completions", body)))
        reader.start()
        until(lambda: server.engine().running == 1)
    reader.join(20)
    status, _, text = lines[0]
    assert status in (200, 503)
    assert "stopping" in text.decode()


# The page


def test_the_page_is_served_to_browsers_alone_with_a_strict_policy(tmp_path, quick_bundle, monkeypatch):
    directory = tmp_path / "page"
    (directory / "sub").mkdir(parents=True)
    (directory / "index.html").write_text("<!doctype html><title>x</title>")
    (directory / "sub" / "app.js").write_text("1")
    (tmp_path / "secret").write_text("s")
    monkeypatch.setattr(web_page, "page_routes", lambda: None)
    monkeypatch.setattr("glmexport.serve.app.page_routes", lambda: PAGE_ROUTES(directory))
    with serving(tmp_path / "home", entry_of(quick_bundle), preload=False) as server:
        status, headers, body = server.ask("GET", "/", headers={"Accept": "text/html,*/*"})
        assert status == 200
        assert b"<title>" in body
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert server.ask("GET", "/", headers={"Accept": "*/*"})[2] == b"Ollama is running"
        status, headers, body = server.ask("GET", "/sub/app.js")
        assert (status, body) == (200, b"1")
        assert "javascript" in headers["content-type"]
        for path in ("/secret", "/sub/../../secret", "/sub/%2e%2e/%2e%2e/secret", "/..%2fsecret", "/index.htm"):
            assert server.ask("GET", path)[0] == 404


PAGE_ROUTES = web_page.page_routes


def test_a_chat_template_that_is_none_is_a_sentence(tmp_path, quick_bundle):
    (tmp_path / "t").write_text("{% for %}")
    with (
        pytest.raises(GlmExportError, match="no Jinja template"),
        serving(tmp_path, entry_of(quick_bundle), chat_template=tmp_path / "t"),
    ):
        pass


def test_a_chat_template_can_touch_nothing(tmp_path, quick_bundle):
    (tmp_path / "t").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with serving(tmp_path, entry_of(quick_bundle), chat_template=tmp_path / "t") as server:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        status, _, text = server.ask("POST", "/v1/chat/completions", body)
    assert status == 400
    assert "template" in json.loads(text)["error"]["message"]


def test_a_chat_template_makes_the_prompt(tmp_path, quick_bundle):
    (tmp_path / "t").write_text("{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}")
    with serving(tmp_path, entry_of(quick_bundle), chat_template=tmp_path / "t") as server:
        chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
        found = server.json("POST", "/tokenize", chat)["tokens"]
        assert found == server.json("POST", "/tokenize", {"prompt": "user:xassistant:y"})["tokens"]
