"""OpenAI's first form of tool calls, ``functions`` and ``function_call``, which older agents still send."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.gateway_stand_in import StandInGateway, make_choice, make_turn
from tests.scripted_gateway import ScriptedGateway, calls

ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}


@pytest.fixture
def gateway() -> StandInGateway:
    return StandInGateway()


def test_functions_are_tools_and_the_answer_has_the_old_form(gateway: StandInGateway) -> None:
    gateway.session.answers.append(make_turn(make_choice(content=None, calls=(("add", '{"a": 2}'),))))
    (choice,) = gateway.chat(functions=[ADD], function_call={"name": "add"}).json()["choices"]
    (request,) = gateway.session.requests
    assert request.tools == ({"type": "function", "function": ADD},)
    assert request.tool_choice == {"type": "function", "function": {"name": "add"}}
    assert request.parallel_tool_calls is False
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "add", "arguments": '{"a": 2}'}
    assert "tool_calls" not in choice["message"]


def test_a_streamed_call_has_the_old_form(gateway: StandInGateway) -> None:
    gateway.session.answers.append(make_turn(make_choice(content=None, calls=(("add", '{"a": 2}'),))))
    text = gateway.chat(functions=[ADD], stream=True).text
    chunks = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]
    assert [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]] == [
        {"name": "add", "arguments": '{"a": 2}'}
    ]
    assert chunks[-1]["finish_reason"] == "function_call"


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_choice_without_functions_that_asks_for_nothing_is_taken(gateway: StandInGateway, choice: str) -> None:
    assert gateway.chat(function_call=choice).status_code == 200


def test_a_conversation_in_the_old_form_is_one_trajectory() -> None:
    with ScriptedGateway(lambda prompt: "5" if "<tool_response>" in prompt else calls("add", a=2)) as gateway:
        name, url, key = gateway.session()
        messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 2 + 3?"}]
        with httpx.Client(headers={"authorization": f"Bearer {key}"}, trust_env=False) as client:
            for _ in range(2):
                body = {"model": "any", "messages": messages, "functions": [ADD]}
                message = client.post(f"{url}/chat/completions", json=body).json()["choices"][0]["message"]
                messages.append(message)
                if "function_call" in message:
                    messages.append({"role": "function", "name": "add", "content": "5"})
        assert message["content"] == "5"
        (whole,), info = gateway.recorded(name)
        assert info.turns == 2
        assert [each["role"] for each in whole.messages] == ["user", "assistant", "tool", "assistant"]
