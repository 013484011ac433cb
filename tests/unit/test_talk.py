"""Talking over HTTP without a model: requests read whole or refused by name, streams, limits; text while it comes."""

from __future__ import annotations

import base64
import json
import threading
import time

import pytest
from families import picture
from starlette.testclient import TestClient

from terrace.errors import InputError
from terrace.talk.fetching import fetch_picture
from terrace.talk.request import BadRequest, Limits, read_request
from terrace.talk.serve_command import model_name
from terrace.talk.server import Service, Settings
from terrace.talk.talker import Answer, Enough, Said, Wishes
from terrace.talk.text_stream import TextStream

PICTURE = picture(20, 10)
DATA = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
USER = {"role": "user", "content": "What?"}


def image(url: str = DATA, **more: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def no_fetch(url: str) -> bytes:
    raise BadRequest("not from there")


def read(limits: Limits = Limits(), **values):  # noqa: B008
    return read_request({"model": "m", "messages": [USER], **values}, limits, no_fetch)


def test_a_request_is_read_whole():
    asked = read(
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [image(detail="high"), {"type": "text", "text": "One?"}], "name": "me"},
            {"role": "assistant", "content": "Two.", "tool_calls": None, "refusal": None},
            {"role": "user", "content": [image(base64.b64encode(PICTURE).decode()), {"type": "text", "text": "And now?"}]},
        ],
        max_completion_tokens=7, temperature=0.5, top_p=0.9, n=2, seed=-1, stop="\n", stream=True, stream_options={"include_usage": True},
        tools=[], frequency_penalty=0.0, logprobs=False, user="me", response_format={"type": "text"}, logit_bias=None,
    )  # fmt: skip
    assert [(turn.role, turn.content) for turn in asked.turns] == [
        ("system", ("Be short.",)), ("user", (PICTURE, "One?")), ("assistant", ("Two.",)), ("user", (PICTURE, "And now?")),
    ]  # fmt: skip
    assert asked.wishes == Wishes(7, 0.5, 0.9, 2**63 - 1, ("\n",), 2)
    assert (asked.stream, asked.include_usage) == (True, True)
    assert read(top_p=0, temperature=1).wishes.temperature == 0  # the smallest nucleus is the likeliest token


@pytest.mark.parametrize(
    ("values", "parameter", "words"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": ["hi"]}, "messages[0]", "object with role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "not offered"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "messages[1].role", "nothing to answer"),
        ({"messages": [USER, {"role": "system", "content": "x"}, USER]}, "messages[1].role", "stands first"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "text or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]", "a part is"),
        ({"messages": [{**USER, "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls", "no meaning"),
        ({"messages": [{"role": "system", "content": [image()]}, USER]}, "messages[0].content[0]", "of the user"),
        ({"messages": [{"role": "user", "content": [image(detail="low")]}]}, "messages[0].content[0].image_url.detail", "--pixels"),
        ({"messages": [{"role": "user", "content": [image("https://a/b.jpg")]}]}, "messages[0].content[0].image_url.url", "not from there"),
        ({"messages": [{"role": "user", "content": [image("file:///etc/passwd")]}]}, "messages[0].content[0].image_url.url", "neither"),
        ({"messages": [{"role": "user", "content": [image("data:image/png,abc")]}]}, "messages[0].content[0].image_url.url", "data URI is"),
        ({"messages": [{"role": "user", "content": [image("data:text/x;base64,AA==")]}]}, "messages[0].content[0].image_url.url", "text/x"),
        ({"messages": [{"role": "user", "content": [image()] * 33}]}, "messages", "33 pictures"),
        ({"model": None}, "model", "/v1/models"),
        ({"temperature": 2.5}, "temperature", "from 0 to 2"),
        ({"temperature": True}, "temperature", "from 0 to 2"),
        ({"temperature": float("nan")}, "temperature", "from 0 to 2"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to 4096"),
        ({"max_tokens": 1.5}, "max_tokens", "whole"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "not both"),
        ({"n": 17}, "n", "from 1 to 16"),
        ({"stop": [""]}, "stop", "up to 4"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"tools": [{}]}, "tools", "not offered"),
        ({"logprobs": True}, "logprobs", "not offered"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not offered"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not offered"),
        ({"temprature": 1}, "temprature", "did you mean `temperature`"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(values, parameter, words):
    with pytest.raises(BadRequest) as found:
        read(**values)
    body = found.value.body()["error"]
    assert (body["param"], body["type"]) == (parameter, "invalid_request_error")
    assert words in body["message"]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("mine/run/stages/01-sft/final", "mine"), ("runs/mine/stages/02-morl/final", "mine"), ("checkpoints/small", "small"),
        ("checkpoints/final", "final"), ("run", "run"),
    ],
)  # fmt: skip
def test_a_model_is_called_by_its_run(place, name, tmp_path):
    assert model_name(tmp_path / place) == name


def test_a_picture_has_a_largest_size():
    with pytest.raises(BadRequest, match="takes 10"):
        read(Limits(image_bytes=10), messages=[{"role": "user", "content": [image()]}])


def test_only_named_hosts_are_asked_for_pictures():
    for url in ("http://169.254.169.254/latest", "https://example.org/a.jpg", "http://ok@evil/a", "http://evil#ok"):
        with pytest.raises(BadRequest, match="fetches no pictures"):
            fetch_picture(url, ("ok",), 100)
    with pytest.raises(BadRequest, match="user name"):
        fetch_picture("http://me:secret@ok/a.jpg", ("ok",), 100)


def byte_decode(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize(
    ("text", "stop", "told"),
    [
        ("plain words", (), "plain words"),
        ("  ein Würfel 🙂 und mehr", (), "ein Würfel 🙂 und mehr"),
        ("one STOP two", ("STOP",), "one "),
        ("a ST b STO c", ("STOP",), "a ST b STO c"),
        ("first\nsecond", ("second", "\n"), "first"),
        ("aab", ("ab",), "a"),
        ("ST", ("STOP",), "ST"),
        ("", (), ""),
    ],
)
def test_the_pieces_of_a_text_are_the_text_up_to_a_stop_word(text, stop, told, step):
    tokens = list(text.encode())
    stream = TextStream(byte_decode, stop)
    pieces = [stream.push(tokens[place : place + step]) for place in range(0, len(tokens), step)]
    pieces.append(stream.end())
    assert "".join(pieces) == told
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.stopped == (told != text.lstrip())


# ---------------------------------------------------------------- the server


class FakeTalker:
    """Says the words of `words`, waiting for `go` before each; a conversation of one word has a bad picture."""

    def __init__(self) -> None:
        self.words, self.go, self.heard_gone = ["Hello", " ", "wörld"], threading.Event(), threading.Event()
        self.go.set()

    def prompt(self, turns):
        if turns[-1].content == ("bad",):
            raise InputError("a picture cannot be used: it is broken")
        return turns

    def room(self, prompt):
        if prompt[-1].content == ("long",):
            raise InputError("the conversation has 9 tokens")
        return 1

    def answer(self, prompt, wishes, hear, gone):
        if prompt[-1].content == ("fail",):
            raise RuntimeError("out of memory")
        try:
            for word in self.words:
                while not self.go.wait(0.01):
                    if gone():
                        raise Enough
                for answer in range(wishes.answers):
                    hear(answer, word)
        except Enough:
            self.heard_gone.set()
        return Said([Answer("".join(self.words), 3, True)] * wishes.answers, 5)


@pytest.fixture
def talker():
    return FakeTalker()


def client_of(talker, **settings) -> TestClient:
    return TestClient(Service(talker, Settings("m", **settings)).application(), base_url="http://localhost", raise_server_exceptions=False)


def ask(client: TestClient, content="hi", **more):
    return client.post("/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": content}], **more})


def test_answers_whole_and_in_pieces(talker):
    client = client_of(talker)
    whole = ask(client, n=2).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["Hello wörld"] * 2
    assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    streamed = ask(client, stream=True, stream_options={"include_usage": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    events = [json.loads(event) for event in events[:-1]]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"]) == "Hello wörld"
    assert [event["choices"][0]["finish_reason"] for event in events if event["choices"]][-1] == "stop"
    assert events[-1]["usage"]["total_tokens"] == 8
    assert all(event["usage"] is None for event in events[:-1])


def test_errors_are_in_openais_form(talker):
    client = client_of(talker)
    for response, status, words, code in [
        (ask(client, "bad"), 400, "it is broken", None),
        (ask(client, "long"), 400, "9 tokens", "context_length_exceeded"),
        (ask(client, "fail"), 500, "out of memory", None),
        (ask(client, model="other"), 404, "this server has m", "model_not_found"),
        (client.get("/v1/models/other"), 404, "no model", "model_not_found"),
        (client.get("/v1/nothing"), 404, "there is no GET", "unknown_url"),
        (client.get("/v1/chat/completions"), 405, "there is no GET", "unknown_url"),
        (client.post("/v1/chat/completions", content=b"{}"), 415, "application/json", None),
        (client.post("/v1/chat/completions", content=b"[" * 9999, headers={"content-type": "application/json"}), 400, "no JSON", None),
    ]:
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (status, code)
        assert words in error["message"]
    failed = ask(client, "fail", stream=True).text
    assert "out of memory" in json.loads(failed.split("data: ")[-1])["error"]["message"]
    assert "[DONE]" not in failed


def test_keys_hosts_and_sizes(talker):
    client = client_of(talker, key="secret", limits=Limits(request_bytes=200))
    assert client.get("/v1/models").status_code == 401
    assert ask(client).json()["error"]["code"] == "invalid_api_key"
    client.headers["Authorization"] = "Bearer secret"
    assert client.get("/v1/models").json()["data"][0]["id"] == "m"
    assert client.get("/v1/models/m").json()["object"] == "model"
    assert ask(client).status_code == 200
    assert ask(client, "x" * 300).status_code == 413
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client_of(talker, hosts=("*",)).get("/", headers={"host": "evil.example"}).status_code == 200


def test_the_page_runs_its_own_script_alone(talker):
    shown = client_of(talker).get("/")
    nonce = shown.headers["content-security-policy"].split("'nonce-")[1].split("'")[0]
    assert shown.text.count(f'nonce="{nonce}"') == shown.text.count("<script") == 2
    named = TestClient(Service(talker, Settings('a"</script><b>')).application(), base_url="http://localhost").get("/").text
    assert "<b>" not in named


def test_beyond_the_line_requests_are_refused_and_who_leaves_ends_the_answer(talker):
    talker.go.clear()
    client = client_of(talker, most_waiting=1)
    with client:
        waiting = threading.Thread(target=ask, args=(client,))
        waiting.start()
        until = time.monotonic() + 20
        while client.get("/health").json()["waiting"] < 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert ask(client).json()["error"]["code"] == "rate_limit_exceeded"
        talker.go.set()
        waiting.join(20)
        assert ask(client).status_code == 200
