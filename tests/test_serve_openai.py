"""OpenAI's API, asked by OpenAI's own client, and by what evaluation harnesses send."""

from __future__ import annotations

import json
import threading

import openai
import pytest
from conftest import ROOT, split_directory
from serving import entry_of, serving, until

from glmexport.sampling import log_softmax
from glmexport.serve.rows import PortableRows
from glmexport.session import Session

TINY = ROOT / "examples" / "tiny-chatglm"
QUESTION = [{"role": "user", "content": "12+34="}]
REVERSE = [{"role": "user", "content": "Reverse: apple"}]


@pytest.fixture(scope="module")
def answering(shared):
    """The example that answers."""
    return shared("answering", lambda path: split_directory(TINY, path, opset=17))


@pytest.fixture(scope="module")
def running(answering, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("home"), entry_of(answering), max_queue=2) as server:
        yield server


@pytest.fixture
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def chat(client, messages=QUESTION, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **{"temperature": 0, **options})


def complete(client, prompt="12+34=", **options):
    return client.completions.create(model="tiny", prompt=prompt, **{"temperature": 0, **options})


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("none")
    assert error.value.code == "model_not_found"


def test_chat(client):
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "46", "stop")
    assert choice.logprobs is None
    assert answer.usage.prompt_tokens == 9
    assert answer.usage.total_tokens == 9 + answer.usage.completion_tokens


def test_messages_of_every_form(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "12+"}, {"type": "text", "text": "34="}]}]
    assert chat(client, parts).choices[0].message.content == "46"
    named = [
        {"role": "user", "content": "我叫小明。"},
        {"role": "assistant", "content": "你好，小明！"},
        {"role": "user", "content": "我叫什么名字？"},
    ]
    assert chat(client, named).choices[0].message.content == "你叫小明。"
    assert chat(client, [{"role": "system", "content": ""}, *QUESTION]).choices[0].message.content == "46"
    assert chat(client, [{"role": "developer", "content": "Be brief."}, *QUESTION]).usage.prompt_tokens > 9


def test_a_stream_of_a_chat(client):
    chunks = list(chat(client, REVERSE, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "elppa"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    finish, usage = chunks[-2], chunks[-1]
    assert finish.choices[0].finish_reason == "stop"
    assert finish.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage.completion_tokens >= 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.choices for chunk in chat(client, stream=True))


def test_the_lines_of_a_stream(running):
    body = {"model": "tiny", "messages": QUESTION, "stream": True, "temperature": 0}
    status, headers, text = running.ask("POST", "/v1/chat/completions", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    events = text.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_several_answers_have_seeds_of_their_own(client):
    wild = {"temperature": 5.0, "top_p": 1.0, "max_tokens": 10, "extra_body": {"top_k": 0}}
    answer = chat(client, n=3, seed=4, **wild)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in chat(client, n=3, seed=4, **wild).choices] == texts
    assert chat(client, seed=4, **wild).choices[0].message.content == texts[0]
    assert answer.usage.prompt_tokens == 9
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, seed=4, stream=True, **wild):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_limits_and_stops(client):
    assert chat(client, REVERSE, max_tokens=2).choices[0].finish_reason == "length"
    assert chat(client, REVERSE, max_completion_tokens=2).usage.completion_tokens == 2
    stopped = chat(client, REVERSE, stop=["pa", "zz"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("elp", "stop")
    assert chat(client, REVERSE, stop="p").choices[0].message.content == "el"


def test_what_other_servers_added(client, running):
    ids = running.json("POST", "/tokenize", {"prompt": "Reverse: apple", "add_special_tokens": False})["tokens"]
    assert running.json("POST", "/detokenize", {"tokens": ids})["prompt"] == "Reverse: apple"
    answer = complete(client, "Reverse: apple", logprobs=0)
    stop = running.json("POST", "/tokenize", {"prompt": answer.choices[0].text[2:], "add_special_tokens": False})
    assert stop["count"] >= 1
    more = {"top_k": 3, "min_p": 0.01, "repetition_penalty": 1.01, "ignore_eos": True}
    long = chat(client, max_tokens=12, extra_body=more)
    assert (long.usage.completion_tokens, long.choices[0].finish_reason) == (12, "length")


def test_a_stop_id_ends_an_answer(client, running):
    raw = complete(client, "Reverse: apple", logprobs=0).choices[0].logprobs
    third = running.json("POST", "/tokenize", {"prompt": "x" + raw.tokens[2], "add_special_tokens": False})["tokens"][
        -1
    ]
    cut = complete(client, "Reverse: apple", extra_body={"stop_token_ids": [third]}).choices[0]
    assert (cut.text, cut.finish_reason) == ("".join(raw.tokens[:2]).strip(), "stop")


def test_logit_biases(client, running):
    seven = running.json("POST", "/tokenize", {"prompt": "1+7", "add_special_tokens": False})["tokens"][-1]
    answer = complete(client, logit_bias={str(seven): 100}, max_tokens=4)
    assert answer.choices[0].text == "7777"
    for wrong in ({"x": 1}, {"999999": 1}, {"5": 101}, {"-1": 1}):
        with pytest.raises(openai.BadRequestError):
            complete(client, logit_bias=wrong)


def test_logprobs_of_a_chat(client):
    content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(entry.token for entry in content).strip() == "46"
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


# Completions


def test_completions(client):
    answer = complete(client)
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("46", "stop")
    assert complete(client, "Reverse: apple", max_tokens=None).choices[0].text == "elppa"
    assert "".join(chunk.choices[0].text for chunk in complete(client, "Reverse: apple", stream=True)) == "elppa"
    assert complete(client, echo=True).choices[0].text == "12+34=46"
    streamed = complete(client, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "12+34=46"


def test_several_prompts_and_ids(client, running):
    prompts = ["12+34=", "Reverse: apple", "1+1="]
    answer = complete(client, prompts, n=1)
    assert [choice.text for choice in answer.choices] == ["46", "elppa", "2"]
    ids = [
        running.json("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"] for text in prompts
    ]
    assert [choice.text for choice in complete(client, ids).choices] == ["46", "elppa", "2"]
    assert complete(client, ids[0]).choices[0].text == "46"
    whole = running.json("POST", "/tokenize", {"prompt": prompts[0]})["tokens"]
    assert complete(client, whole).choices[0].text == "46"
    assert complete(client, prompts, n=2, max_tokens=1).usage.completion_tokens == 6


def test_echo_with_logprobs_scores_the_text_token_by_token(client, running, answering):
    """What evaluation harnesses ask: a text, and how likely each of its tokens is after those before it."""
    text = "12+34=46"
    choice = complete(client, text, echo=True, logprobs=2, max_tokens=0).choices[0]
    ids = running.json("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    found = choice.logprobs
    assert choice.text == text
    assert len(found.tokens) == len(ids)
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    with Session(answering, threads=1) as session:
        special = session.config.special_ids
        rows = PortableRows(session, 1)
        expected = []
        for count in range(1, len(ids)):
            logits = rows.prefill(0, [special.gmask, special.bos, *ids[:count]])
            expected.append(log_softmax(logits)[ids[count]])
    assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert all(len(top) >= 2 for top in found.top_logprobs[1:])
    more = complete(client, text, echo=True, logprobs=2, max_tokens=1).choices[0].logprobs
    assert len(more.tokens) in (len(ids), len(ids) + 1), "the end token has no text"
    assert more.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)


def test_text_offsets_point_into_the_text(client):
    choice = complete(client, "Reverse: apple", logprobs=1, echo=False).choices[0]
    offsets, tokens = choice.logprobs.text_offset, choice.logprobs.tokens
    assert offsets == [sum(map(len, tokens[:number])) for number in range(len(tokens))]


# Errors


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, None),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "x"}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"messages": "x"}, "messages"),
        ({"messages": []}, None),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 3}, None),
        ({"stop": ["a", ""]}, "stop"),
        ({"model": 5}, "model"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_a_clients_fault_is_400_in_openais_form(running, body, param):
    whole = {"model": "tiny", "messages": QUESTION, **body}
    status, _, text = running.ask("POST", "/v1/chat/completions", whole)
    error = json.loads(text)["error"]
    assert status == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if param:
        assert error["param"] == param


def test_a_prompt_longer_than_the_context_is_400_with_both_numbers(client):
    with pytest.raises(openai.BadRequestError, match=r"The prompt has \d{4} tokens, the context 2048"):
        chat(client, [{"role": "user", "content": "12+34=" * 800}])
    cut = [*REVERSE, {"role": "assistant", "content": "elppa" * 400}] * 3
    answer = chat(client, [*cut, *QUESTION], extra_body={"truncate": True}, max_tokens=8)
    assert answer.usage.prompt_tokens <= 2040


def test_a_full_queue_is_429_with_a_time_to_come_again(running, client):
    long = {"stream": True, "n": 2, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
    streams = [chat(client, **long) for _ in range(2)]
    third = threading.Thread(target=lambda: streams.append(chat(client, **long)))
    third.start()
    until(lambda: running.engine().waiting == 2)
    with pytest.raises(openai.RateLimitError) as error:
        chat(client)
    assert int(error.value.response.headers["retry-after"]) >= 1
    for stream in [*streams]:
        stream.close()
    third.join()
    streams[-1].close()
    until(lambda: running.engine().running == running.engine().waiting == 0)
    assert chat(client).choices[0].message.content == "46"


def test_a_client_that_goes_away_frees_its_slots(running, client):
    stream = chat(client, stream=True, n=4, max_tokens=1900, extra_body={"ignore_eos": True})
    next(iter(stream))
    until(lambda: running.engine().running == 4)
    stream.close()
    until(lambda: running.engine().running == 0)


def test_answers_side_by_side_are_what_each_is_alone(client):
    questions = [f"{number}+{number + 3}=" for number in range(10, 22)]
    alone = [complete(client, question).choices[0].text for question in questions]
    found = [""] * len(questions)
    gate = threading.Semaphore(4)

    def one(number):
        with gate:
            found[number] = complete(client, questions[number]).choices[0].text

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
