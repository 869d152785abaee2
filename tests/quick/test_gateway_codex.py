"""Requests of agents on the Responses API (Codex, OpenAI's agents and the AI SDK in JavaScript), as they send them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.gateway_stand_in import StandInGateway, make_choice, make_turn
from tests.scripted_gateway import ScriptedGateway, calls
from torchrl_sglang.agents.types import ChatRequest

EXEC = {
    "type": "function",
    "name": "exec_command",
    "description": "Runs a command.",
    "strict": False,
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]},
}
SPAWN = {"type": "function", "name": "spawn_agent", "description": "Starts one.", "parameters": {"type": "object"}}
AGENTS = {"type": "namespace", "name": "multi_agent_v1", "description": "Sub-agents.", "tools": [SPAWN]}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Changes files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch"'},
}
ASKED = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Which number?"}]}
REQUEST: dict[str, Any] = {  # of Codex 0.171, shortened
    "model": "policy",
    "stream": True,
    "input": [
        {
            "type": "message",
            "id": "msg_1",
            "role": "developer",
            "content": [{"type": "input_text", "text": "Be safe."}],
        },
        {"type": "message", "id": "msg_2", "role": "developer", "content": [{"type": "input_text", "text": "Skills"}]},
        {"type": "message", "id": "msg_3", "role": "user", "content": [{"type": "input_text", "text": "<context>"}]},
        ASKED,
    ],
    "tools": [EXEC, AGENTS],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "01a217ec",
    "client_metadata": {"turn_id": "01a217ec", "x-codex-turn-metadata": "{}"},
}


def respond(gateway: StandInGateway, **fields: Any) -> httpx.Response:
    body = {name: value for name, value in {**REQUEST, "stream": False, **fields}.items() if value is not None}
    return gateway.send(f"/sessions/{gateway.session.id}/v1/responses", body)


def asked(gateway: StandInGateway) -> ChatRequest:
    request = gateway.session.requests[-1]
    assert isinstance(request, ChatRequest)
    return request


def answer(gateway: StandInGateway, *made: tuple[str, dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The answer whose calls are these."""
    written = tuple((name, json.dumps(arguments)) for name, arguments in made)
    gateway.session.answers.append(make_turn(make_choice(content=None, calls=written)))
    got = respond(gateway, **fields)
    assert got.status_code == 200, got.text
    return dict(got.json())


def events(got: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in got.text.splitlines() if line.startswith("data: ")]


def sent_back(gateway: StandInGateway, items: list[Any], **fields: Any) -> tuple[dict[str, Any], ...]:
    """The messages that a request with these items has."""
    got = respond(gateway, input=[ASKED, *items], **fields)
    assert got.status_code == 200, got.text
    return asked(gateway).messages[1:]


def test_its_first_request_is_read() -> None:
    gateway = StandInGateway()
    assert respond(gateway, stream=True).status_code == 200
    assert [message["role"] for message in asked(gateway).messages] == ["developer", "developer", "user", "user"]
    assert asked(gateway).template_kwargs == {}


# ------------------------------------------------------------------ its tools, and their calls


def test_functions_of_a_namespace_are_called_in_it() -> None:
    gateway = StandInGateway()
    body = answer(gateway, ("multi_agent_v1__spawn_agent", {"message": "Go"}))
    _, told = [tool["function"] for tool in asked(gateway).tools]
    assert told["name"] == "multi_agent_v1__spawn_agent"
    assert told["description"] == "Sub-agents.\n\nStarts one."
    (item,) = body["output"]
    assert (item["type"], item["namespace"], item["name"]) == ("function_call", "multi_agent_v1", "spawn_agent")
    assert json.loads(item["arguments"]) == {"message": "Go"}
    message, result = sent_back(
        gateway, [item, {"type": "function_call_output", "call_id": item["call_id"], "output": "started"}]
    )
    assert message["tool_calls"][0]["function"] == {
        "name": "multi_agent_v1__spawn_agent",
        "arguments": '{"message": "Go"}',
    }
    assert result["content"] == "started"


def test_a_free_text_tool_is_a_function_of_one_text() -> None:
    gateway = StandInGateway()
    text = "*** Begin Patch\n*** End Patch\n"
    body = answer(gateway, ("apply_patch", {"input": text}), tools=[PATCH])
    (tool,) = asked(gateway).tools
    parameters = tool["function"]["parameters"]
    assert parameters["required"] == ["input"]
    assert 'start: "*** Begin Patch"' in parameters["properties"]["input"]["description"]
    (item,) = body["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", text)
    message, result = sent_back(
        gateway,
        [
            item,
            {
                "type": "custom_tool_call_output",
                "call_id": item["call_id"],
                "output": [{"type": "input_text", "text": "ok"}],
            },
        ],
        tools=[PATCH],
    )
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"input": text}
    assert result == {"role": "tool", "tool_call_id": "call0", "content": [{"type": "text", "text": "ok"}]}


def test_a_free_text_call_is_streamed() -> None:
    gateway = StandInGateway()
    gateway.session.answers.append(make_turn(make_choice(content=None, calls=(("apply_patch", '{"input": "*** B"}'),))))
    got = events(respond(gateway, tools=[PATCH], stream=True))
    added = next(each for each in got if each["type"] == "response.output_item.added")
    assert (added["item"]["type"], added["item"]["input"]) == ("custom_tool_call", "")
    written = [each for each in got if "custom_tool_call_input" in each["type"]]
    assert [each["type"].rsplit(".", 1)[1] for each in written] == ["delta", "done"]
    assert written[0]["delta"] == written[1]["input"] == "*** B"
    done = next(each for each in got if each["type"] == "response.output_item.done")
    assert done["item"] == got[-1]["response"]["output"][0]
    assert done["item"]["input"] == "*** B"


def test_arguments_that_are_no_text_are_given_as_they_are() -> None:
    gateway = StandInGateway()
    (item,) = answer(gateway, ("apply_patch", {"patch": "x"}), tools=[PATCH])["output"]
    assert item["input"] == '{"patch": "x"}'


KINDS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    (
        "local_shell",
        {"command": ["echo", "hi"], "workdir": "/tmp"},
        {"action": {"type": "exec", "env": {}, "user": None, "command": ["echo", "hi"], "working_directory": "/tmp"}},
        {"output": "hi\n"},
        "hi\n",
    ),
    (
        "shell",
        {"commands": ["echo hi"], "timeout_ms": 1000},
        {"action": {"commands": ["echo hi"], "timeout_ms": 1000}},
        {"output": [{"stdout": "hi\n", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]},
        '[{"stdout": "hi\\n", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]',
    ),
    (
        "apply_patch",
        {"type": "create_file", "path": "a", "diff": "+hello"},
        {"operation": {"type": "create_file", "path": "a", "diff": "+hello"}},
        {"status": "completed", "output": "made"},
        "made",
    ),
]


@pytest.mark.parametrize(("kind", "arguments", "fields", "output", "content"), KINDS, ids=[kind[0] for kind in KINDS])
def test_a_tool_that_the_client_runs_as_the_api_defines_it(
    kind: str, arguments: dict[str, Any], fields: dict[str, Any], output: dict[str, Any], content: str
) -> None:
    gateway = StandInGateway()
    tools = [{"type": kind, "environment": {"type": "local"}} if kind == "shell" else {"type": kind}]
    (item,) = answer(gateway, (kind, arguments), tools=tools)["output"]
    assert item["type"] == f"{kind}_call"
    assert fields.items() <= item.items()
    result = {"type": f"{kind}_call_output", "call_id": item["call_id"], **output}
    message, told = sent_back(gateway, [item, result], tools=tools)
    assert message["tool_calls"][0]["function"]["name"] == kind
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == arguments
    assert told == {"role": "tool", "tool_call_id": item["call_id"], "content": content}


@pytest.mark.parametrize("arguments", [{"command": "echo hi"}, {"commands": ["x"]}, {"command": ["x"], "more": 1}, {}])
def test_a_call_of_such_a_tool_that_it_does_not_take_is_a_function_call(arguments: dict[str, Any]) -> None:
    gateway = StandInGateway()
    (item,) = answer(gateway, ("local_shell", arguments), tools=[{"type": "local_shell"}])["output"]
    assert (item["type"], item["name"]) == ("function_call", "local_shell")
    assert json.loads(item["arguments"]) == arguments


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ({"type": "custom", "name": "apply_patch"}, "apply_patch"),
        ({"type": "local_shell"}, "local_shell"),
        ({"type": "function", "name": "spawn_agent", "namespace": "multi_agent_v1"}, "multi_agent_v1__spawn_agent"),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "apply_patch"}]},
            "apply_patch",
        ),
    ],
)
def test_any_of_them_can_be_chosen(choice: dict[str, Any], name: str) -> None:
    gateway = StandInGateway()
    tools = [EXEC, AGENTS, PATCH, {"type": "local_shell"}]
    assert respond(gateway, tools=tools, tool_choice=choice).status_code == 200
    assert asked(gateway).tool_choice == {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": [{"type": "web_search", "external_web_access": True}]}, 'web_search = "disabled"'),
        ({"tools": [{"type": "mcp", "server_label": "x", "server_url": "y"}]}, "run by OpenAI's servers"),
        ({"tools": [PATCH, {"type": "apply_patch"}]}, "which an earlier tool has"),
        ({"tools": [{"type": "custom", "name": "x", "format": {"type": "grammar"}}]}, "tools[0].format.syntax"),
        ({"tools": [{"type": "namespace", "name": "x", "tools": [{"type": "shell"}]}]}, "tools[0].tools[0].type"),
        ({"tools": {"type": "custom"}}, "tools must be a list"),
        ({"input": [{"type": "item_reference", "id": "msg_none"}]}, "there is no item 'msg_none'"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "known items are"),
        ({"input": [{"type": "local_shell_call", "call_id": "c"}]}, "input[0].action is missing"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], says: str) -> None:
    gateway = StandInGateway()
    got = respond(gateway, **fields)
    assert got.status_code in (400, 404), got.text
    assert says in got.json()["error"]["message"]
    assert not gateway.session.requests


# ------------------------------------------------------------------ references to earlier items


def test_an_item_may_be_named_instead_of_sent() -> None:
    gateway = StandInGateway()
    gateway.session.answers.append(
        make_turn(make_choice(content="Sum:", reasoning="Hm.", calls=(("exec_command", "{}"),)))
    )
    output = respond(gateway).json()["output"]
    references = [{"type": "item_reference", "id": item["id"]} for item in output]
    result = {"type": "function_call_output", "call_id": "call0", "output": "5"}
    message, told = sent_back(gateway, [*references, result])
    assert message["reasoning_content"] == "Hm."
    assert message["content"] == [{"type": "text", "text": "Sum:"}]
    assert message["tool_calls"][0]["function"]["name"] == "exec_command"
    assert told["content"] == "5"
    other = gateway.sessions.create()  # another session knows nothing of it
    got = gateway.send(f"/sessions/{other.id}/v1/responses", {**REQUEST, "input": references}, key=other.key)
    assert got.status_code == 404


def test_references_and_filled_in_defaults_are_one_trajectory() -> None:
    tool = {
        "type": "function",
        "name": "add",
        "parameters": {"type": "object", "properties": {"exact": {"type": "boolean", "default": True}}},
    }
    said = "<think>\nadd them\n</think>\n\nAdding.\n" + calls("add", a=2, b=3)
    with ScriptedGateway(lambda prompt: "5" if "<tool_response>" in prompt else said) as gateway:
        name, url, key = gateway.session()
        body = {"model": "any", "input": [ASKED], "tools": [tool], "stream": False}
        with httpx.Client(headers={"authorization": f"Bearer {key}"}, trust_env=False) as client:
            reasoning, message, call = client.post(f"{url}/responses", json=body).json()["output"]
            body["input"] = [  # as the AI SDK sends it
                ASKED,
                {"type": "item_reference", "id": reasoning["id"]},
                {"type": "item_reference", "id": message["id"]},
                {**call, "arguments": '{"a":2,"b":3,"exact":true}'},
                {"type": "function_call_output", "call_id": call["call_id"], "output": '{"sum":5}'},
            ]
            client.post(f"{url}/responses", json=body).raise_for_status()
        (whole,), info = gateway.recorded(name)
        assert sum(whole.loss_mask) == info.sampled_tokens
