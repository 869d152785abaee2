"""Anthropic's own tools that a client runs, documents and search results, and the list of models in its form."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway_stand_in import StandInGateway, make_choice, make_turn
from torchrl_sglang.agents.types import ChatRequest

HI = {"role": "user", "content": "Hi"}


@pytest.fixture
def gateway() -> StandInGateway:
    return StandInGateway()


def send(gateway: StandInGateway, **fields: Any) -> Any:
    body = {"model": "m", "max_tokens": 16, "messages": [HI], **fields}
    return gateway.send("/sessions/s1/v1/messages", body)


def asked(gateway: StandInGateway) -> ChatRequest:
    request = gateway.session.requests[-1]
    assert isinstance(request, ChatRequest)
    return request


@pytest.mark.parametrize(
    ("kind", "name", "arguments", "without"),
    [
        ("bash_20250124", "bash", {"command", "restart"}, set()),
        ("text_editor_20250124", "str_replace_editor", {"command", "path", "new_str"}, {"insert_text"}),
        ("text_editor_20250728", "str_replace_based_edit_tool", {"command", "path", "insert_text"}, {"old_path"}),
        ("memory_20250818", "memory", {"command", "path", "old_path", "new_path"}, set()),
    ],
)
def test_tools_that_the_client_runs_are_functions(
    gateway: StandInGateway, kind: str, name: str, arguments: set[str], without: set[str]
) -> None:
    gateway.session.answers.append(make_turn(make_choice(content=None, calls=((name, '{"command": "view"}'),))))
    answer = send(gateway, tools=[{"type": kind, "name": name, "cache_control": {"type": "ephemeral"}}])
    assert answer.status_code == 200, answer.text
    (tool,) = asked(gateway).tools
    assert tool["function"]["name"] == name
    assert arguments <= set(tool["function"]["parameters"]["properties"])
    assert not without & set(tool["function"]["parameters"]["properties"])
    assert answer.json()["content"] == [{"type": "tool_use", "id": "call0", "name": name, "input": {"command": "view"}}]


@pytest.mark.parametrize("kind", ["computer_20250124", "web_search_20250305", "code_execution_20250522", "bash", "x"])
def test_tools_that_anthropics_servers_run_are_refused(gateway: StandInGateway, kind: str) -> None:
    answer = send(gateway, tools=[{"type": kind, "name": "tool"}])
    assert answer.status_code == 400
    assert "Anthropic's own tools" in answer.json()["error"]["message"]


def text(of: str) -> dict[str, Any]:
    return {"type": "text", "text": of}


DOCUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "It is 5."}}, "It is 5."),
    (
        {"type": "document", "title": "Sums", "source": {"type": "content", "content": [text("It "), text("is 5.")]}},
        "Sums\nIt is 5.",
    ),
    ({"type": "document", "source": {"type": "content", "content": "It is 5."}}, "It is 5."),
    (
        {"type": "search_result", "source": "http://a", "title": "Sums", "content": [text("It is 5.")]},
        "Sums\nhttp://a\nIt is 5.",
    ),
]


@pytest.mark.parametrize(("block", "read"), DOCUMENTS)
def test_documents_and_search_results_are_their_text(gateway: StandInGateway, block: dict[str, Any], read: str) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "find", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [block]}
    messages = [
        {"role": "user", "content": [block]},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    assert send(gateway, messages=messages).status_code == 200
    for message in (asked(gateway).messages[0], asked(gateway).messages[2]):
        assert "".join(part["text"] for part in message["content"]) == read


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "x"}}, "only a"),
        ({"type": "document", "source": {"type": "file", "file_id": "f1"}}, "only a document's text"),
        ({"type": "document"}, "source is missing"),
        ({**DOCUMENTS[0][0], "citations": {"enabled": True}}, "cite nothing"),
        ({"type": "search_result", "title": "x"}, "source is missing"),
    ],
)
def test_what_is_no_text_is_refused(gateway: StandInGateway, block: dict[str, Any], says: str) -> None:
    answer = send(gateway, messages=[{"role": "user", "content": [block]}])
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/v1/models"])
def test_the_list_of_models_has_anthropics_form_too(gateway: StandInGateway, path: str) -> None:
    page = gateway.send(f"/sessions/s1{path}", method="GET").json()
    (model,) = page["data"]
    assert (model["type"], model["id"], model["display_name"]) == ("model", "tiny", "tiny")
    assert model["created_at"].endswith("Z")
    assert (page["has_more"], page["last_id"]) == (False, "tiny")
