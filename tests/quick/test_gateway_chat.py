"""``/chat/completions`` over HTTP: what a request means to the session, and the form of the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway_stand_in import StandInGateway, make_choice, make_turn
from torchrl_sglang.agents.types import ChatRequest, TokenLogProb
from torchrl_sglang.errors import (
    ConfigError,
    ContextLengthError,
    OverloadedError,
    ProtocolError,
    RequestRejectedError,
    ServerError,
    ServerLostError,
    ServerTimeoutError,
    ServerUnreachableError,
    SessionFinishedError,
    SGLangError,
    WeightSyncError,
)

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def gateway() -> StandInGateway:
    return StandInGateway()


def asked(gateway: StandInGateway) -> ChatRequest:
    request = gateway.session.requests[-1]
    assert isinstance(request, ChatRequest)
    return request


def test_an_answer_has_openais_form(gateway: StandInGateway) -> None:
    answer = gateway.chat()
    assert answer.status_code == 200
    body = answer.json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello there", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert body["system_fingerprint"] == "weights-3"


def test_sampling_fields_reach_the_session_under_the_names_of_sampling_params(gateway: StandInGateway) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "seed": 7,
        "stop": "END",
        "presence_penalty": 0.1,
        "frequency_penalty": -0.2,
        "logit_bias": {"5": -100},
        "max_completion_tokens": 8.0,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "stop_token_ids": [3],
    }
    assert gateway.chat(**fields).status_code == 200
    assert asked(gateway).sampling == {
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "seed": 7,
        "stop": ["END"],
        "presence_penalty": 0.1,
        "frequency_penalty": -0.2,
        "logit_bias": {"5": -100},
        "max_new_tokens": 8,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "stop_token_ids": [3],
    }


def test_a_request_without_settings_leaves_all_to_the_sessions_defaults(gateway: StandInGateway) -> None:
    nulls = dict.fromkeys(["temperature", "stop", "tools", "tool_choice", "response_format", "stream", "n"])
    assert gateway.chat(**nulls, unknown_but_null=None).status_code == 200
    assert asked(gateway) == ChatRequest(messages=({"role": "user", "content": "Hi"},))


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "array"}}},
            {"type": "array"},
        ),
    ],
)
def test_a_response_format_becomes_a_grammar(gateway: StandInGateway, response_format: Any, schema: Any) -> None:
    assert gateway.chat(response_format=response_format).status_code == 200
    assert asked(gateway).sampling.get("json_schema") == schema


def test_fields_of_openais_platform_are_ignored(gateway: StandInGateway) -> None:
    assert gateway.chat(user="u", metadata={"a": "b"}, store=True, service_tier="auto").status_code == 200


def test_a_retry_is_told_to_the_session(gateway: StandInGateway) -> None:
    path = f"/sessions/{gateway.session.id}/v1/chat/completions"
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    gateway.send(path, body, headers={"Idempotency-Key": "abc", "x-stainless-retry-count": "2"})
    assert (asked(gateway).idempotency_key, asked(gateway).attempt) == ("abc", 2)
    gateway.send(path, body, headers={"x-stainless-retry-count": "0"})
    assert (asked(gateway).idempotency_key, asked(gateway).attempt) == (None, 0)


def test_tools_and_their_calls_pass_through(gateway: StandInGateway) -> None:
    gateway.session.answers.append(make_turn(make_choice(content=None, calls=(("add", '{"a": 1}'),))))
    answer = gateway.chat(tools=[TOOL], tool_choice="auto", parallel_tool_calls=False).json()["choices"][0]
    assert asked(gateway).tools == (TOOL,)
    assert asked(gateway).parallel_tool_calls is False
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    call = {"id": "call0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert answer["message"]["tool_calls"] == [call]


def test_log_probs_name_every_sampled_token_with_its_bytes(gateway: StandInGateway) -> None:
    top = ((TokenLogProb(token_id=72, text="H", log_prob=-0.1),), ())
    gateway.session.answers.append(make_turn(make_choice(ids=(72, 233), top=top)))
    content = gateway.chat(logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    assert asked(gateway).top_logprobs == 1
    assert content == [
        {
            "token": "H",
            "logprob": -0.5,
            "bytes": [72],
            "top_logprobs": [{"token": "H", "logprob": -0.1, "bytes": [72]}],
        },
        {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -0.5, "bytes": [233], "top_logprobs": []},
    ]


def test_an_effort_of_reasoning_goes_to_a_template_that_knows_it_and_is_refused_otherwise() -> None:
    knows = StandInGateway(template="{{ reasoning_effort }}")
    assert knows.chat(reasoning_effort="low", chat_template_kwargs={"a": 1}).status_code == 200
    assert asked(knows).template_kwargs == {"reasoning_effort": "low", "a": 1}
    answer = StandInGateway().chat(reasoning_effort="low")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reasoning_effort")


# ------------------------------------------------------------------------------------------------------------ streams


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def joined(chunks: list[Any], index: int, name: str) -> str:
    deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(delta.get(name) or "" for delta in deltas)


def test_the_pieces_of_a_stream_joined_are_the_answer(gateway: StandInGateway) -> None:
    gateway.session.answers.append(
        make_turn(
            make_choice(0, content="Hello there", reasoning="Hm.", ids=(1, 2, 3, 4)),
            make_choice(1, content="Bye", ids=(5, 6), finish_reason="length"),
        )
    )
    answer = gateway.chat(stream=True, n=2, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert joined(chunks, 0, "content") == "Hello there"
    assert joined(chunks, 0, "reasoning_content") == "Hm."
    assert joined(chunks, 1, "content") == "Bye"
    first = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert next(c["delta"].get("role") for c in first if c["index"] == 0) == "assistant"
    ended = {c["index"]: c["finish_reason"] for c in first if c["finish_reason"]}
    assert ended == {0: "stop", 1: "length"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6


def test_a_stream_has_no_usage_unless_asked(gateway: StandInGateway) -> None:
    assert all(chunk["choices"] for chunk in events(gateway.chat(stream=True).text))


def test_a_stream_ends_with_the_tool_calls(gateway: StandInGateway) -> None:
    calls = (("add", '{"a": 1}'), ("add", '{"a": 2}'))
    gateway.session.answers.append(make_turn(make_choice(content=None, calls=calls)))
    chunks = events(gateway.chat(stream=True, tools=[TOOL]).text)
    found = [call for chunk in chunks for c in chunk["choices"] for call in c["delta"].get("tool_calls", ())]
    assert [(call["index"], call["id"], call["function"]["arguments"]) for call in found] == [
        (0, "call0", '{"a": 1}'),
        (1, "call1", '{"a": 2}'),
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_stream_reports_every_tokens_log_prob_once(gateway: StandInGateway) -> None:
    gateway.session.answers.append(make_turn(make_choice(ids=(72, 105, 33))))
    chunks = events(gateway.chat(stream=True, logprobs=True).text)
    tokens = [
        entry["token"]
        for chunk in chunks
        for c in chunk["choices"]
        for entry in (c["logprobs"] or {}).get("content", ())
    ]
    assert tokens == ["H", "i", "!"]


def test_a_stream_that_fails_before_its_first_token_is_an_error_with_a_status(gateway: StandInGateway) -> None:
    gateway.session.answers.append(OverloadedError("busy", retry_after_s=2))
    answer = gateway.chat(stream=True)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "2"


def test_a_stream_that_fails_in_the_middle_says_so_in_an_event(gateway: StandInGateway) -> None:
    gateway.session.fail_after = ServerLostError("the server died")
    text = gateway.chat(stream=True).text
    last = json.loads([line for line in text.splitlines() if line][-1].removeprefix("data: "))
    assert last["error"]["message"] == "the server died"
    assert "[DONE]" not in text


# ------------------------------------------------------------------------------------------------------------- errors

BAD_FIELDS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"temprature": 1}, "temprature", "Did you mean 'temperature'"),
    ({"quux": 1}, "quux", "unknown field"),
    ({"temperature": "hot"}, "temperature", "must be a number"),
    ({"temperature": True}, "temperature", "must be a number"),
    ({"n": 0}, "n", "between 1 and 128"),
    ({"n": 1.5}, "n", "whole number"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "differ"),
    ({"stop": [""]}, "stop", "non-empty"),
    ({"stop": 3}, "stop", "non-empty"),
    ({"functions": [{"name": "f"}], "tools": [TOOL]}, "functions", "send one of them"),
    ({"modalities": ["text", "audio"]}, "modalities", "text only"),
    ({"audio": {"voice": "x"}}, "audio", "text only"),
    ({"web_search_options": {"a": 1}}, "web_search_options", "no web search"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "must be one of"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "",
    ),
    ({"response_format": {"type": "json_object"}, "regex": "a+"}, "response_format", "both constrain"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "only functions"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing"),
    ({"tools": [TOOL, TOOL]}, "tools", "earlier tool"),
    ({"tools": {"add": 1}}, "tools", "must be a list"),
    ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice", "required"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice", "'sub'"),
    ({"messages": []}, "messages", "empty"),
    ({"messages": None}, "messages", "missing"),
    ({"messages": "Hi"}, "messages", "must be a list"),
    ({"messages": ["Hi"]}, "messages[0]", "JSON object"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "must be one of"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "a string or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0].type", "one of"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing"),
    ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].tool_call_id", "missing"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "assistant"),
    ({"model": None}, "model", "missing"),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD_FIELDS)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(
    gateway: StandInGateway, fields: dict[str, Any], param: str | None, says: str
) -> None:
    answer = gateway.chat(**fields)
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not gateway.session.requests, "nothing was generated"
    assert gateway.chat().status_code == 200, "the session stays usable"


ERRORS: list[tuple[SGLangError, int, str]] = [
    (ContextLengthError("too long"), 400, "context_length_exceeded"),
    (ConfigError("seed=1: it would be ignored"), 400, "invalid_value"),
    (SessionFinishedError("it has its reward"), 409, "session_finished"),
    (OverloadedError("busy"), 429, "rate_limit_exceeded"),
    (ServerTimeoutError("slow"), 504, "upstream_timeout"),
    (ServerLostError("died"), 502, "upstream_error"),
    (RequestRejectedError("the grammar can't be compiled", status=400), 400, "invalid_value"),
    (RequestRejectedError("no", status=403), 502, "upstream_error"),
    (ProtocolError("odd"), 502, "upstream_error"),
    (ServerError("no server is left"), 503, "upstream_unavailable"),
    (ServerUnreachableError("nothing listens"), 503, "upstream_unavailable"),
    (WeightSyncError("mixed weights"), 503, "upstream_unavailable"),
]


@pytest.mark.parametrize(("error", "status", "code"), ERRORS, ids=[type(e).__name__ for e, _, _ in ERRORS])
def test_a_failure_of_the_session_has_a_status_and_a_code(
    gateway: StandInGateway, error: SGLangError, status: int, code: str
) -> None:
    gateway.session.answers.append(error)
    answer = gateway.chat()
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["message"].endswith(str(error))
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert gateway.chat().status_code == 200, "the session stays usable"


def test_openais_clients_are_told_not_to_repeat_a_request_to_a_finished_session(gateway: StandInGateway) -> None:
    gateway.session.answers.append(SessionFinishedError("it has its reward"))
    assert gateway.chat().headers["x-should-retry"] == "false"


def test_a_fault_of_the_gateway_itself_is_an_error_in_openais_form(gateway: StandInGateway) -> None:
    gateway.session.answers.append(RuntimeError("a bug"))
    answer = gateway.chat()
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "RuntimeError" in answer.json()["error"]["message"]
