"""Claude Code's requests, as it sends them with an address of its own, and what it needs in the answers."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import pytest

from tests.gateway_stand_in import StandInGateway, make_choice, make_turn
from tests.scripted_gateway import ScriptedGateway, calls

READ = {
    "name": "Read",
    "description": "Reads a file.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"file_path": {"type": "string"}},
        "required": ["file_path"],
        "additionalProperties": False,
    },
}
CACHED = {"cache_control": {"type": "ephemeral"}}
REQUEST: dict[str, Any] = {  # of version 2.1.197, shortened
    "model": "policy",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>\nToday's date is 2026-11-26.\n</system-reminder>\n\n"},
                {"type": "text", "text": "Which number is in secret.txt?", **CACHED},
            ],
        },
        {"role": "system", "content": "Available agent types for the Agent tool:\n- claude"},
    ],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.4c5; cc_entrypoint=sdk-cli;"},
        {"type": "text", "text": "You are an agent.", **CACHED},
    ],
    "tools": [READ],
    "metadata": {"user_id": '{"session_id":"1b9dcf40"}'},
    "max_tokens": 32000,
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stream": True,
}
THINKS = "{% if enable_thinking %}<think>{% endif %}"


def send(gateway: StandInGateway, path: str = "/messages?beta=true", **fields: Any) -> httpx.Response:
    body = {name: value for name, value in {**REQUEST, **fields}.items() if value is not None}
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219"}
    return gateway.send(f"/sessions/{gateway.session.id}/v1/v1{path}", body, headers=headers)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


def test_its_first_request_is_read() -> None:
    gateway = StandInGateway()
    assert send(gateway).status_code == 200
    (asked,) = gateway.session.requests
    assert [message["role"] for message in asked.messages] == ["system", "user", "system"]  # type: ignore[union-attr]
    assert asked.messages[2]["content"].startswith("Available agent types")  # type: ignore[union-attr]
    assert asked.sampling == {"max_new_tokens": 32000}
    assert asked.template_kwargs == {}  # type: ignore[union-attr]


def test_a_system_message_in_the_middle_may_have_blocks() -> None:
    gateway = StandInGateway()
    blocks = [{"type": "text", "text": "One."}, {"type": "text", "text": " Two.", **CACHED}]
    messages = [*REQUEST["messages"][:1], {"role": "system", "content": blocks}]
    assert send(gateway, messages=messages).status_code == 200
    assert gateway.session.requests[0].messages[-1] == {"role": "system", "content": "One. Two."}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("thinking", "template", "variables"),
    [
        ({"type": "adaptive"}, "", {}),
        ({"type": "adaptive", "display": "summarized"}, THINKS, {}),
        ({"type": "enabled", "budget_tokens": 31999}, THINKS, {"enable_thinking": True}),
        ({"type": "disabled"}, THINKS, {"enable_thinking": False}),
        ({"type": "disabled"}, "", {}),
        ({"type": "enabled", "budget_tokens": 1024}, "{% if not thinking is defined %}", {"thinking": True}),
        ({"type": "enabled", "budget_tokens": 1024}, "<think>\n", {}),  # the model thinks in any case
    ],
)
def test_thinking_sets_the_templates_variable(
    thinking: dict[str, Any], template: str, variables: dict[str, Any]
) -> None:
    gateway = StandInGateway(template=template)
    assert send(gateway, thinking=thinking).status_code == 200
    assert gateway.session.requests[0].template_kwargs == variables  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("template", "variables"), [("", {}), ("{{ reasoning_effort }}", {"reasoning_effort": "high"})]
)
def test_effort_is_given_to_a_template_that_knows_it(template: str, variables: dict[str, Any]) -> None:
    gateway = StandInGateway(template=template)
    assert send(gateway).status_code == 200
    assert gateway.session.requests[0].template_kwargs == variables  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_a_schema_of_the_answer_is_a_grammar(name: str) -> None:
    gateway = StandInGateway()
    form = {"type": "json_schema", "schema": {"type": "object"}}
    given = {"format": form} if name == "output_config" else form
    assert send(gateway, **{name: given}).status_code == 200
    assert gateway.session.requests[0].sampling["json_schema"] == {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "has no thinking"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type must be one of"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort must be one of"),
        ({"output_config": {"efort": "low"}}, "Did you mean 'effort'"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "give the JSON schema"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": 1}]}}, "context_management"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 8}]}, "Anthropic's own tools"),
        ({"messages": [{"role": "system", "content": [{"type": "image"}]}]}, "messages[0].content[0].text"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], says: str) -> None:
    gateway = StandInGateway()
    answer = send(gateway, **fields)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]
    assert not gateway.session.requests


def test_thinking_has_a_signature_with_which_it_is_sent_back() -> None:
    gateway = StandInGateway()
    gateway.session.answers.append(make_turn(make_choice(content="Sum:", reasoning="Hm.")))
    got = events(send(gateway))
    deltas = [(each["index"], each["delta"]["type"]) for each in got if each["type"] == "content_block_delta"]
    assert deltas.index((0, "signature_delta")) == [index for index, _ in deltas].count(0) - 1
    signature = next(each["delta"]["signature"] for each in got if "signature" in each.get("delta", {}))
    assert signature
    thought = {"type": "thinking", "thinking": "Hm.", "signature": signature}
    sent_back = {"role": "assistant", "content": [thought, {"type": "text", "text": "Sum:"}]}
    again = [*REQUEST["messages"], sent_back, {"role": "user", "content": "So?"}]
    assert send(gateway, messages=again).status_code == 200
    assert gateway.session.requests[1].messages[3]["reasoning_content"] == "Hm."  # type: ignore[union-attr]


def test_its_context_management_has_an_answer() -> None:
    gateway = StandInGateway()
    assert events(send(gateway))[-2]["context_management"] == {"applied_edits": []}
    assert send(gateway, stream=False).json()["context_management"] == {"applied_edits": []}
    assert "context_management" not in send(gateway, stream=False, context_management=None).json()


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_its_address_answers_a_probe(method: str) -> None:
    gateway = StandInGateway()
    assert gateway.send(f"/sessions/{gateway.session.id}/v1", method=method, key=None).status_code == 200


# ------------------------------------------------------------------ with real sessions


def ask(url: str, key: str, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
    body = {name: value for name, value in {**REQUEST, "stream": False, **fields}.items() if value is not None}
    return httpx.post(f"{url}{path}", json=body, headers={"x-api-key": key}, timeout=30)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with ScriptedGateway(lambda prompt: "5" if "<tool_response>" in prompt else calls("Read", file_path="s")) as made:
        yield made


def test_counted_tokens_are_those_of_the_prompt(gateway: ScriptedGateway) -> None:
    name, url, key = gateway.session()
    for path in ("/v1/messages/count_tokens", "/messages/count_tokens"):
        answer = ask(url, key, path, max_tokens=None, stream=None)
        assert answer.status_code == 200, answer.text
        usage = ask(url, key).json()["usage"]
        assert answer.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert gateway.recorded(name)[1].turns == 2


def test_counting_of_a_bad_request_is_refused(gateway: ScriptedGateway) -> None:
    _, url, key = gateway.session()
    assert ask(url, key, "/v1/messages/count_tokens", messages=[]).json()["error"]["type"] == "invalid_request_error"
    assert ask(url, "wrong", "/v1/messages/count_tokens").status_code == 401


def test_a_context_that_is_too_short_is_told_in_the_words_that_its_clients_know(gateway: ScriptedGateway) -> None:
    _, url, key = gateway.session()
    length = ask(url, key, "/v1/messages/count_tokens").json()["input_tokens"]
    pool: Any = gateway.sessions.model.pool
    pool.context_length, pool.max_prompt_tokens = length + 100, length + 99
    told = ask(url, key).json()["error"]["message"]
    assert f"input length and `max_tokens` exceed context limit: {length} + 32000 > {length + 100}" in told
    assert ask(url, key, max_tokens=100).status_code == 200
    pool.context_length, pool.max_prompt_tokens = length - 10, length - 11
    told = ask(url, key).json()["error"]["message"]
    assert f"prompt is too long: {length} tokens > {length - 11} maximum" in told


def test_two_turns_are_one_trajectory(gateway: ScriptedGateway) -> None:
    name, url, key = gateway.session()
    message = ask(url, key).json()
    (use,) = message["content"]
    result = {"tool_use_id": use["id"], "type": "tool_result", "content": "5", "is_error": False, **CACHED}
    messages = [
        *REQUEST["messages"],
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": [result]},
    ]
    assert ask(url, key, messages=messages).json()["stop_reason"] == "end_turn"
    (whole,), info = gateway.recorded(name)
    assert sum(whole.loss_mask) == info.sampled_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_has_the_id_that_clients_report(stream: bool) -> None:
    gateway = StandInGateway()
    answer = send(gateway, stream=stream)
    name = events(answer)[0]["message"]["id"] if stream else answer.json()["id"]
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == name


def test_a_compressed_body_is_refused() -> None:
    gateway = StandInGateway()
    body = gzip.compress(json.dumps(REQUEST).encode())
    answer = gateway.send("/sessions/s1/v1/messages", body, headers={"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert "compressed" in answer.json()["error"]["message"]
