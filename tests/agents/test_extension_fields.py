"""vLLM's fields, OpenAI's old functions and several prompts, through the gateway on a real server."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from torchrl_sglang.agents.gateway import AgentGateway, AgentSession

pytestmark = [pytest.mark.agents, pytest.mark.timeout(600)]

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def session(gateway: AgentGateway) -> AgentSession:
    return gateway.create_session()


def ask(session: AgentSession, path: str = "/chat/completions", **fields: Any) -> dict[str, Any]:
    body = {"model": "policy", "max_tokens": 24, **({"messages": HI} if "prompt" not in fields else {}), **fields}
    headers = {"Authorization": f"Bearer {session.api_key}"}
    answer = httpx.post(f"{session.base_url}{path}", json=body, headers=headers, timeout=120, verify=False)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


@pytest.mark.parametrize(
    "fields", [{"guided_choice": ["yes", "no (1.5-2)"]}, {"guided_regex": "(yes|no [(]1[.]5-2[)])"}]
)
def test_an_answer_is_one_of_the_choices(session: AgentSession, fields: dict[str, Any]) -> None:
    for _ in range(3):
        assert ask(session, **fields)["choices"][0]["message"]["content"] in ("yes", "no (1.5-2)")


def test_an_answer_has_the_schema_of_any_of_the_fields(session: AgentSession) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [2]}}, "required": ["a"], "additionalProperties": False}
    for fields in (
        {"guided_json": schema},
        {"structured_outputs": {"json": schema}},
        {"response_format": {"type": "json_object", "schema": schema}},
    ):
        content = ask(session, **fields, max_tokens=48)["choices"][0]["message"]["content"]
        written = "".join(content.split())  # a random model writes white space without end
        assert len(written) >= 4
        assert '{"a":2}'.startswith(written)


def test_returned_token_ids_are_those_of_the_trajectory(gateway: AgentGateway, session: AgentSession) -> None:
    answer = ask(session, return_token_ids=True, logprobs=True, return_tokens_as_token_ids=True)
    (leaf,) = gateway.trajectories(session.id)
    (choice,) = answer["choices"]
    assert tuple(answer["prompt_token_ids"] + choice["token_ids"]) == leaf.token_ids
    assert sum(leaf.loss_mask) == len(choice["token_ids"])
    assert [each["token"] for each in choice["logprobs"]["content"]] == [f"token_id:{i}" for i in choice["token_ids"]]


def test_a_stop_string_is_kept_where_that_is_asked_for(session: AgentSession) -> None:
    fields = {"regex": "abc", "stop": ["b"], "temperature": 0}
    trimmed = ask(session, **fields)["choices"][0]
    kept = ask(session, **fields, include_stop_str_in_output=True)["choices"][0]
    assert (trimmed["message"]["content"], kept["message"]["content"][:2]) == ("a", "ab")


def test_several_prompts_are_several_trajectories(gateway: AgentGateway, session: AgentSession) -> None:
    answer = ask(session, "/completions", prompt=["Once", "Twice"], n=2, temperature=1.0)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len(gateway.trajectories(session.id)) == 4


def test_a_function_in_the_old_form_is_called_and_answered(gateway: AgentGateway, session: AgentSession) -> None:
    add = {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"enum": [2]}}, "required": ["a"]},
    }
    first = ask(session, functions=[add], function_call={"name": "add"}, max_tokens=200)["choices"][0]
    assert first["finish_reason"] == "function_call"
    assert first["message"]["function_call"]["name"] == "add"
    result = {"role": "function", "name": "add", "content": "5"}
    ask(session, messages=[*HI, first["message"], result], functions=[add])
    (leaf,) = gateway.trajectories(session.id)
    assert [each["role"] for each in leaf.messages] == ["user", "assistant", "tool", "assistant"]
