"""Bad input of every kind on every route: an error of the API's form and status; the session stays usable."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang import AgentGateway, AgentSession

HI = [{"role": "user", "content": "Hi"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
DEEP: Any = "x"
for _ in range(200):
    DEEP = [DEEP]
# (chat, completions, responses, messages): what a request of each API needs at least
LEAST: dict[str, dict[str, Any]] = {
    "/chat/completions": {"model": "m", "messages": HI, "max_tokens": 2},
    "/completions": {"model": "m", "prompt": "Hi", "max_tokens": 2},
    "/responses": {"model": "m", "input": "Hi", "max_output_tokens": 2},
    "/messages": {"model": "m", "messages": HI, "max_tokens": 2},
}
OF_ALL: list[dict[str, Any]] = [
    {"model": None},
    {"model": 5},
    {"stream": "yes"},
    {"temperature": "hot"},
    {"temperature": True},
    {"temperature": -1},
    {"temperature": 10**400},
    {"top_p": 0},
    {"top_p": 1.5},
    {"top_p": [1]},
    {"top_k": 2.5},
    {"top_k": 2**80},
    {"unknown_field": 1},
    {"metadata": {"a": DEEP}},
]
SAMPLING: list[dict[str, Any]] = [
    {"n": 0},
    {"n": 1000},
    {"n": "2"},
    {"stop": 5},
    {"stop": [""]},
    {"stop": [5]},
    {"stop": {"a": 1}},
    {"seed": "x"},
    {"seed": 2**70},
    {"seed": -(2**70)},
    {"presence_penalty": 9},
    {"frequency_penalty": "x"},
    {"repetition_penalty": -1},
    {"min_p": 2},
    {"min_tokens": -5},
    {"min_tokens": 50},
    {"stop_token_ids": [2**40]},
    {"stop_token_ids": ["x"]},
    {"logit_bias": [1]},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"5": "x"}},
    {"logit_bias": {"99999999": 1}},
    {"regex": 5},
    {"ignore_eos": "no"},
]
CASES: dict[str, list[dict[str, Any]]] = {
    "/chat/completions": [
        *OF_ALL,
        *SAMPLING,
        {"messages": None},
        {"messages": []},
        {"messages": "Hi"},
        {"messages": {"role": "user"}},
        {"messages": [None]},
        {"messages": ["Hi"]},
        {"messages": [{}]},
        {"messages": [{"role": "robot", "content": "Hi"}]},
        {"messages": [{"role": 5, "content": "Hi"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [5]}]},
        {"messages": [{"role": "user", "content": [{}]}]},
        {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://host/a.png"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA"}}]}]},
        {"messages": [*HI, {"role": "tool", "content": "5"}]},
        {"messages": [*HI, {"role": "assistant", "tool_calls": "now"}]},
        {"messages": [*HI, {"role": "assistant", "tool_calls": [5]}]},
        {"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}]},
        {"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}]},
        {"messages": [*HI, {"role": "assistant", "function_call": {"arguments": "{}"}}]},
        {"messages": [{"role": "user", "content": "Hi", "tool_calls": [CALL]}]},
        {"messages": [{"role": "user", "content": "Hi", "name": 5}]},
        {"messages": [{"role": "user", "content": "word " * 9000}]},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 2.5},
        {"max_tokens": 10**12},
        {"max_tokens": 5, "max_completion_tokens": 6},
        {"logprobs": 5},
        {"logprobs": True, "top_logprobs": 21},
        {"top_logprobs": 2},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": "x"}},
        {"stream": True, "stream_options": {"x": 1}},
        {"tools": "now"},
        {"tools": [5]},
        {"tools": [{}]},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "function": {"name": ""}}]},
        {"tools": [{"type": "function", "function": {"name": 'a"b'}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        {"tools": [TOOL, TOOL]},
        {"tool_choice": "required"},
        {"tool_choice": "sometimes", "tools": [TOOL]},
        {"tool_choice": 5, "tools": [TOOL]},
        {"tool_choice": {"type": "function"}, "tools": [TOOL]},
        {"tool_choice": {"type": "function", "function": {"name": "later"}}, "tools": [TOOL]},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": 5}}, "tools": [TOOL]},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}, "tools": [TOOL]},
        {"parallel_tool_calls": "no"},
        {"response_format": "json"},
        {"response_format": {}},
        {"response_format": {"type": "yaml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
        {"chat_template_kwargs": 5},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"reasoning_effort": "much"},
        {"audio": {"voice": "x"}},
        {"functions": [{"name": ""}]},
        {"functions": {"name": "f"}},
        {"functions": [{"name": "now"}], "tools": [TOOL]},
        {"function_call": {"name": "now"}},
    ],
    "/completions": [
        *OF_ALL,
        *SAMPLING,
        {"prompt": None},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": 5},
        {"prompt": {"text": "x"}},
        {"prompt": ["a", "b"], "stream": True},
        {"prompt": ["a", ""]},
        {"prompt": ["a", ["b"]]},
        {"prompt": [1.5]},
        {"prompt": [True]},
        {"prompt": [-1]},
        {"prompt": [10**30]},
        {"prompt": [5] * 9000},
        {"max_tokens": 0},
        {"logprobs": 21},
        {"logprobs": -1},
        {"logprobs": True},
        {"best_of": 5},
        {"echo": True},
        {"suffix": "x"},
    ],
    "/responses": [
        *OF_ALL,
        {"input": None},
        {"input": []},
        {"input": 5},
        {"input": [5]},
        {"input": [{"type": "hologram"}]},
        {"input": [{"role": "robot", "content": "Hi"}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
        {"input": [{"type": "function_call", "name": "f"}]},
        {"input": [{"type": "function_call_output", "call_id": "c"}]},
        {"input": [{"type": "reasoning", "content": 5}]},
        {"input": [{"type": "reasoning"}]},
        {"instructions": 5},
        {"previous_response_id": "resp_1"},
        {"previous_response_id": 5},
        {"max_output_tokens": 0},
        {"tools": [{"type": "file_search"}]},
        {"tools": [{"type": "function"}]},
        {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": 5}},
        {"tool_choice": {"type": "function", "name": 5}},
        {"tool_choice": {"type": "hosted"}},
        {"include": 5},
        {"text": 5},
        {"text": {"format": 5}},
        {"text": {"format": {"type": "json_schema"}}},
        {"text": {"tone": "kind"}},
        {"reasoning": 5},
        {"reasoning": {"effort": 5}},
        {"truncation": "auto"},
        {"background": True},
        {"n": 2},
    ],
    "/messages": [
        *OF_ALL,
        {"max_tokens": None},
        {"max_tokens": 0},
        {"messages": []},
        {"messages": [5]},
        {"messages": [{"role": "developer", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": 5}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "5"}]}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [*HI, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]},
        {"system": 5},
        {"system": [5]},
        {"stop_sequences": "x"},
        {"stop_sequences": [""]},
        {"tools": [5]},
        {"tools": [{"name": "f", "input_schema": 5}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tool_choice": "auto"},
        {"tool_choice": {"type": "tool"}},
        {"tool_choice": {"type": "any"}},
        {"tool_choice": {"type": "tool", "name": "later"}},
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": "x"}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"thinking": 5},
        {"container": "x"},
    ],
}


class Client:
    """One session of a gateway, over plain HTTP connections."""

    def __init__(self, gateway: AgentGateway) -> None:
        self.session: AgentSession = gateway.create_session()
        self.address = urlsplit(self.session.base_url)
        self.path = f"/sessions/{self.session.id}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(str(self.address.hostname), self.address.port, timeout=60)

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        connection = self.connect()
        given = {"authorization": f"Bearer {self.session.api_key}", **headers}
        target = path if path.startswith("/sessions") else self.address.path + path
        connection.request(method, target, body, given, encode_chunked="transfer-encoding" in given)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text) if text else None, {k.lower(): v for k, v in answer.getheaders()}

    def post(self, path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
        return self.send("POST", path, json.dumps(body).encode(), **{"content-type": "application/json"})

    def is_usable(self) -> bool:
        return all(self.post(path, body)[0] == 200 for path, body in LEAST.items())


@pytest.fixture
def client(fake: FakeServer) -> Iterator[Client]:
    with AgentGateway(fake.url, max_body_bytes=200_000) as gateway:
        yield Client(gateway)


def check_error(path: str, status: int, body: Any, expected: set[int]) -> None:
    assert status in expected, (status, body)
    error = body["error"]
    assert len(error["message"]) > 10
    assert len(error["message"]) < 1000
    if path.startswith("/messages"):
        assert body["type"] == "error"
        assert set(error) == {"type", "message"}
    else:
        assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] != "server_error"


@pytest.mark.parametrize("path", list(CASES))
def test_bad_fields_are_refused_with_the_apis_error(client: Client, path: str) -> None:
    wrong = []
    for case in CASES[path]:
        status, body, _ = client.post(path, {**LEAST[path], **case})
        try:
            check_error(path, status, body, {404} if "previous_response_id" in case else {400})
        except (AssertionError, KeyError, TypeError) as error:
            wrong.append((str(case)[:120], status, str(body)[:200], type(error).__name__))
    assert not wrong, "\n".join(map(str, wrong))
    assert client.is_usable()
    status, info, _ = client.send("GET", client.path)
    assert status == 200
    assert (info["turns"], info["in_flight"]) == (4, 0)


BODIES = {
    "no JSON": b"{",
    "NaN": b'{"model": "m", "temperature": NaN}',
    "not UTF-8": b'{"model": "\xff"}',
    "half a surrogate pair": b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d"}]}',
    "a list": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "nothing": b"",
    "a number of 5000 digits": b'{"model": "m", "seed": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "gzip": gzip.compress(b'{"model": "m"}'),
    "a form": b"model=m&messages=x",
}


@pytest.mark.parametrize("path", list(LEAST))
def test_bodies_that_are_no_json_objects_are_refused(client: Client, path: str) -> None:
    for name, body in BODIES.items():
        headers = {"content-encoding": "gzip"} if name == "gzip" else {}
        status, answer, _ = client.send("POST", path, body, **headers)
        check_error(path, status, answer, {400, 415})
    status, answer, _ = client.send("POST", path, b'{"a": "' + b"x" * 300_000 + b'"}')
    check_error(path, status, answer, {413})
    assert client.is_usable()


def test_good_bodies_in_unusual_wrappings_are_taken(client: Client) -> None:
    body = json.dumps(LEAST["/chat/completions"]).encode()
    assert client.send("POST", "/chat/completions", body)[0] == 200, "no content-type"
    assert client.send("POST", "/chat/completions", body, **{"content-type": "text/plain"})[0] == 200
    chunks = iter([body[:5], body[5:]])
    assert client.send("POST", "/chat/completions", chunks, **{"transfer-encoding": "chunked"})[0] == 200
    twice = b'{"model": "x", ' + body[1:]  # a key twice: the last one counts, as in Python and JavaScript
    assert client.send("POST", "/chat/completions", twice)[0] == 200
    stops = json.dumps({**LEAST["/chat/completions"], "stop": [f"s{i}" for i in range(1000)]}).encode()
    assert client.send("POST", "/chat/completions", stops)[0] in (200, 400)
    assert client.send("POST", "/chat/completions?beta=true", body)[0] == 200


def test_other_methods_and_paths_get_the_apis_error(client: Client) -> None:
    for path in LEAST:
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
            status, body, headers = client.send(method, path)
            check_error(path, status, body, {405})
            assert headers["allow"] == "POST"
        connection = client.connect()
        connection.request("HEAD", client.address.path + path, headers={"authorization": client.session.api_key})
        assert connection.getresponse().status == 405
        connection.close()
        check_error(path, *client.post(f"{path}/more", {})[:2], {404})
    check_error("", *client.post("/embeddings", {"model": "m", "input": "x"})[:2], {404})
    check_error("", *client.send("GET", "/models/another")[:2], {404})
    assert client.is_usable()


def test_uploads_that_break_off_leave_nothing(client: Client) -> None:
    for path in LEAST:
        for length in (b"Content-Length: 1000", b"Transfer-Encoding: chunked"):
            raw = socket.create_connection((client.address.hostname, client.address.port), timeout=60)
            start = f"POST {client.address.path}{path} HTTP/1.1\r\nHost: localhost\r\n".encode()
            key = f"\r\nAuthorization: Bearer {client.session.api_key}\r\n\r\n".encode()
            raw.sendall(start + length + key + b'{"model": ')
            raw.close()
    raw = socket.create_connection((client.address.hostname, client.address.port), timeout=60)
    raw.sendall(b"\x00\x01 this is no HTTP\r\n\r\n")
    raw.close()
    assert client.is_usable()


REWARDS: list[Any] = [
    {},
    {"reward": None},
    {"reward": "1"},
    {"reward": True},
    {"reward": [1]},
    {"reward": 10**400},
    {"reward": 1, "info": 5},
    {"reward": 1, "more": 1},
    [],
    "x",
]
SESSIONS: list[Any] = [
    {"tags": 5},
    {"ttl_s": "x"},
    {"ttl_s": 0},
    {"ttl_s": -1},
    {"ttl_s": 1e300},
    {"name": "x"},
    [1],
    "x",
]


def test_sessions_and_rewards_refuse_what_they_can_not_take(client: Client) -> None:
    for body in REWARDS:
        check_error("", *client.post(f"{client.path}/reward", body)[:2], {400})
    for body in SESSIONS:
        status, answer, _ = client.post("/sessions", body)
        check_error("", status, answer, {400})
    assert client.is_usable()
    assert client.post(f"{client.path}/reward", {"reward": 1})[0] == 200
