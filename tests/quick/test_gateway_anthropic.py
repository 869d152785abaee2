"""Anthropic's Messages API over HTTP: blocks become messages, answers become blocks, streams become events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway_stand_in import StandInGateway, make_choice, make_turn
from torchrl_sglang.agents.types import ChatRequest
from torchrl_sglang.errors import ServerLostError

TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}


@pytest.fixture
def gateway() -> StandInGateway:
    return StandInGateway()


def send(gateway: StandInGateway, **fields: Any) -> Any:
    body = {"model": "m", "max_tokens": 16, "messages": [{"role": "user", "content": "Hi"}], **fields}
    return gateway.send("/sessions/s1/v1/messages", body)


def asked(gateway: StandInGateway) -> ChatRequest:
    request = gateway.session.requests[-1]
    assert isinstance(request, ChatRequest)
    return request


def test_an_answer_has_anthropics_form(gateway: StandInGateway) -> None:
    turn = make_turn(make_choice(content="Sum:", reasoning="Hm.", calls=(("add", '{"a": 1}'),)))
    gateway.session.answers.append(turn)
    body = send(gateway, system=[{"type": "text", "text": "Be kind."}], tools=[TOOL], stop_sequences=["END"]).json()
    assert asked(gateway).messages[0] == {"role": "system", "content": "Be kind."}
    assert asked(gateway).sampling == {"max_new_tokens": 16, "stop": ["END"]}
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    assert asked(gateway).tools == ({"type": "function", "function": function},)
    assert body["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"},
        {"type": "text", "text": "Sum:"},
        {"type": "tool_use", "id": "call0", "name": "add", "input": {"a": 1}},
    ]
    assert body["stop_reason"] == "tool_use"
    assert body["usage"]["input_tokens"] == 6
    assert body["usage"]["cache_read_input_tokens"] == 4


@pytest.mark.parametrize(
    ("choice", "reason", "sequence"),
    [
        (make_choice(), "end_turn", None),
        (make_choice(finish_reason="length"), "max_tokens", None),
        (make_choice(stop="END"), "stop_sequence", "END"),
    ],
)
def test_it_says_why_it_ended(gateway: StandInGateway, choice: Any, reason: str, sequence: str | None) -> None:
    gateway.session.answers.append(make_turn(choice))
    body = send(gateway, stop_sequences=["END"]).json()
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)


def test_a_stop_string_of_the_gateways_own_is_not_told_to_the_client(gateway: StandInGateway) -> None:
    gateway.session.answers.append(make_turn(make_choice(stop="</tool_call>")))
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    body = send(gateway, tools=[TOOL], tool_choice=choice, stop_sequences=["END"]).json()
    assert asked(gateway).parallel_tool_calls is False
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)


def test_blocks_become_messages(gateway: StandInGateway) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "2+3?", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"},
                {"type": "text", "text": "Sum:"},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "5"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    assert send(gateway, messages=messages).status_code == 200
    call = {"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    assert asked(gateway).messages == (
        {"role": "user", "content": [{"type": "text", "text": "2+3?"}]},
        {"role": "assistant", "content": "Sum:", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": [{"type": "text", "text": "5"}]},
        {"role": "user", "content": [{"type": "text", "text": "So?"}]},
    )


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", None),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}, None),
    ],
)
def test_a_tool_choice_is_translated(gateway: StandInGateway, choice: Any, expected: Any, parallel: Any) -> None:
    assert send(gateway, tools=[TOOL], tool_choice=choice).status_code == 200
    assert (asked(gateway).tool_choice, asked(gateway).parallel_tool_calls) == (expected, parallel)


def test_a_stream_tells_the_answer_in_events(gateway: StandInGateway) -> None:
    turn = make_turn(make_choice(content="Hello there", reasoning="Hm.", ids=(1, 2, 3), calls=(("add", '{"a": 1}'),)))
    gateway.session.answers.append(turn)
    text = send(gateway, stream=True, tools=[TOOL]).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    starts = {e["index"]: e["content_block"]["type"] for e in events if e["type"] == "content_block_start"}
    stops = [e["index"] for e in events if e["type"] == "content_block_stop"]
    assert starts == {0: "thinking", 1: "text", 2: "tool_use"}
    assert stops == [0, 1, 2]
    deltas = [e for e in events if e["type"] == "content_block_delta"]
    assert "".join(e["delta"].get("text", "") for e in deltas) == "Hello there"
    assert "".join(e["delta"].get("partial_json", "") for e in deltas) == '{"a": 1}'
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] == 3


def test_a_failed_stream_ends_with_the_failure(gateway: StandInGateway) -> None:
    gateway.session.fail_after = ServerLostError("the server died")
    last = json.loads(send(gateway, stream=True).text.strip().splitlines()[-1].removeprefix("data: "))
    assert last == {"type": "error", "error": {"type": "api_error", "message": "the server died"}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "must be one of"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "must be one of"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "Anthropic's own tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "chat template"),
        ({"mcp_servers": [{"url": "x"}]}, "nothing like it"),
        ({"max_token": 5}, "Did you mean 'max_tokens'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(gateway: StandInGateway, fields: dict[str, Any], says: str) -> None:
    answer = send(gateway, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "error"
    assert says in answer.json()["error"]["message"]
    assert not gateway.session.requests
