"""OpenAI's Responses API over HTTP: items become messages, answers become items, streams become events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway_stand_in import StandInGateway, make_choice, make_turn
from torchrl_sglang.agents.http.responses_request import read_input
from torchrl_sglang.agents.types import ChatRequest
from torchrl_sglang.errors import ServerLostError

TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}


@pytest.fixture
def gateway() -> StandInGateway:
    return StandInGateway()


def respond(gateway: StandInGateway, **fields: Any) -> Any:
    return gateway.send("/sessions/s1/v1/responses", {"model": "m", "input": "Hi", **fields})


def asked(gateway: StandInGateway) -> ChatRequest:
    request = gateway.session.requests[-1]
    assert isinstance(request, ChatRequest)
    return request


def test_an_answer_has_the_form_of_the_responses_api(gateway: StandInGateway) -> None:
    turn = make_turn(make_choice(content="Sum:", reasoning="Hm.", calls=(("add", '{"a": 1}'),)))
    gateway.session.answers.append(turn)
    body = respond(gateway, instructions="Be kind.", tools=[TOOL], max_output_tokens=9, temperature=0).json()
    assert asked(gateway).messages == ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    assert asked(gateway).sampling == {"temperature": 0, "max_new_tokens": 9}
    function = {name: value for name, value in TOOL.items() if name != "type"}
    assert asked(gateway).tools == ({"type": "function", "function": function},)
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "tiny")
    assert [item["type"] for item in body["output"]] == ["reasoning", "message", "function_call"]
    assert body["output"][1]["content"][0]["text"] == "Sum:"
    assert body["output"][2] | {"id": ""} == {
        "id": "",
        "type": "function_call",
        "call_id": "call0",
        "name": "add",
        "arguments": '{"a": 1}',
        "status": "completed",
    }
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 4, "cache_write_tokens": 0}
    assert body["instructions"] == "Be kind."


def test_the_items_of_an_answer_become_the_message_that_it_was() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "2+3?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Sum:", "annotations": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "add", "arguments": '{"a": 2}'},
        {"type": "function_call", "id": "fc_2", "call_id": "c2", "name": "add", "arguments": '{"a": 3}'},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "3"}]},
        {"type": "reasoning", "id": "rs_2", "summary": []},
        {"role": "assistant", "content": "5"},
        {"role": "assistant", "content": "More?"},
    ]
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "add", "arguments": f'{{"a": {i + 1}}}'}}
        for i in (1, 2)
    ]
    assert read_input(items) == [
        {"role": "user", "content": [{"type": "text", "text": "2+3?"}]},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": [{"type": "text", "text": "Sum:"}],
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": "5"},
        {"role": "assistant", "content": "More?"},
    ]


def test_previous_response_id_continues_the_conversation_without_its_instructions(gateway: StandInGateway) -> None:
    first = respond(gateway, instructions="Be kind.").json()["id"]
    second = respond(gateway, input="And now?", previous_response_id=first, instructions="Be brief.").json()["id"]
    contents = [message["content"] for message in asked(gateway).messages]
    assert contents == ["Be brief.", "Hi", "Hello there", "And now?"]
    respond(gateway, input="Bye", previous_response_id=second)
    assert [m["content"] for m in asked(gateway).messages] == ["Hi", "Hello there", "And now?", "Hello there", "Bye"]
    other = gateway.sessions.create()
    answer = gateway.send(
        f"/sessions/{other.id}/v1/responses", {"model": "m", "input": "x", "previous_response_id": first}, key=other.key
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "previous_response_id")


def test_a_stream_tells_the_answer_in_events(gateway: StandInGateway) -> None:
    turn = make_turn(make_choice(content="Hello there", reasoning="Hm.", ids=(1, 2, 3), calls=(("add", '{"a": 1}'),)))
    gateway.session.answers.append(turn)
    text = respond(gateway, stream=True, tools=[TOOL]).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert [event["type"] for event in events] == names
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "Hello there"
    added = [e["item"]["type"] for e in events if e["type"] == "response.output_item.added"]
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert added == [item["type"] for item in done] == ["reasoning", "message", "function_call"]
    assert events[-1]["response"]["output"] == done
    places = {e["item_id"]: e["output_index"] for e in events if "item_id" in e}
    assert places == {item["id"]: index for index, item in enumerate(done)}


def test_an_empty_answer_is_a_message_without_text(gateway: StandInGateway) -> None:
    gateway.session.answers += [make_turn(make_choice(content="", ids=(2,))) for _ in range(2)]
    (item,) = respond(gateway).json()["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")
    text = respond(gateway, stream=True).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.done"),
        *("content_part.done", "output_item.done", "completed"),
    ]
    # what the client sends back is the answer that it got
    again = respond(gateway, input=[{"role": "user", "content": "x"}, item, {"role": "user", "content": "y"}])
    assert again.status_code == 200
    assert [message["role"] for message in asked(gateway).messages] == ["user", "assistant", "user"]


def test_a_failed_stream_ends_with_the_failure(gateway: StandInGateway) -> None:
    gateway.session.fail_after = ServerLostError("the server died")
    last = json.loads(respond(gateway, stream=True).text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "the server died"}


def test_an_answer_that_is_cut_off_is_incomplete(gateway: StandInGateway) -> None:
    gateway.session.answers.append(make_turn(make_choice(finish_reason="length")))
    body = respond(gateway).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search_preview"}]}, "tools[0].type"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c1"}, "conversation"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.json_schema"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ],
)
def test_what_cannot_be_honoured_is_refused(gateway: StandInGateway, fields: dict[str, Any], param: str) -> None:
    answer = respond(gateway, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not gateway.session.requests
