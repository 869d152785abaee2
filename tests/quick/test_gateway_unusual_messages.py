"""Messages that some clients send and OpenAI does not take: taken where their meaning is clear, else refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import AgentGateway

HI = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def fake(tiny_llama: Path) -> Iterator[FakeServer]:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(fake: FakeServer) -> Iterator[AgentGateway]:
    with AgentGateway(fake.url) as gateway:
        yield gateway


def post(gateway: AgentGateway, path: str, body: dict[str, Any]) -> httpx.Response:
    session = gateway.create_session()
    headers = {"Authorization": f"Bearer {session.api_key}"}
    body = {"model": "m", "max_tokens": 4, **body}
    return httpx.post(f"{session.base_url}{path}", json=body, headers=headers, verify=False, timeout=30)


def calls(*ids: str | None) -> dict[str, Any]:
    function = {"name": "add", "arguments": "{}"}
    made = [{"type": "function", "function": function, **({"id": each} if each else {})} for each in ids]
    return {"role": "assistant", "content": None, "tool_calls": made}


def prompt(fake: FakeServer, tokenizer: Any) -> str:
    sent = [event["body"]["input_ids"][0] for event in fake.events if event["path"] == "/generate"]
    return str(tokenizer.decode(sent[-1]))


def test_results_without_ids_answer_the_calls_in_their_order(
    gateway: AgentGateway, fake: FakeServer, tiny_llama: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    named = [HI, calls("c1", "c2"), *({"role": "tool", "tool_call_id": c, "content": c} for c in ("c1", "c2"))]
    bare = [HI, calls(None, None), *({"role": "tool", "content": c} for c in ("c1", "c2"))]
    prompts = []
    for messages in (named, bare):
        assert post(gateway, "/chat/completions", {"messages": messages}).status_code == 200
        prompts.append(prompt(fake, tokenizer))
    assert prompts[0] == prompts[1]


def test_a_result_without_a_call_needs_an_id(gateway: AgentGateway) -> None:
    once = [HI, calls("c1"), {"role": "tool", "content": "5"}, {"role": "tool", "content": "6"}]
    answer = post(gateway, "/chat/completions", {"messages": once})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[3].tool_call_id"


def test_a_result_may_be_empty(gateway: AgentGateway) -> None:
    result = {"role": "tool", "tool_call_id": "c1", "content": None}
    assert post(gateway, "/chat/completions", {"messages": [HI, calls("c1"), result]}).status_code == 200


def test_anthropics_prefill_is_refused_and_not_answered_by_something_else(gateway: AgentGateway) -> None:
    answer = post(gateway, "/messages", {"messages": [HI, {"role": "assistant", "content": "The answer is"}]})
    assert answer.status_code == 400
    assert "the last message is the assistant's" in answer.json()["error"]["message"]
