"""Replies, whole and streamed, are what the types of the ``openai`` and ``anthropic`` packages say."""

from __future__ import annotations

import importlib
import json
import os
from functools import lru_cache
from typing import Any

import pytest

from tests.gateway_stand_in import StandInGateway, make_choice, make_turn

pydantic = pytest.importorskip("pydantic")
adapter = lru_cache(pydantic.TypeAdapter)  # made once: it takes a second for events of responses

TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
CASES: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("/chat/completions", "openai.types.chat", "ChatCompletion", "ChatCompletionChunk", CHAT),
    (
        "/chat/completions",
        "openai.types.chat",
        "ChatCompletion",
        "ChatCompletionChunk",
        {**CHAT, "logprobs": True, "tools": [{"type": "function", "function": TOOL}]},
    ),
    ("/completions", "openai.types", "Completion", "Completion", {"model": "m", "prompt": "Hi", "logprobs": 1}),
    ("/responses", "openai.types.responses", "Response", "ResponseStreamEvent", {"model": "m", "input": "Hi"}),
    (
        "/responses",
        "openai.types.responses",
        "Response",
        "ResponseStreamEvent",
        {
            "model": "m",
            "input": "Hi",
            "tools": [{"type": "function", **TOOL}],
            "include": ["message.output_text.logprobs"],
        },
    ),
    ("/messages", "anthropic.types", "Message", "RawMessageStreamEvent", CHAT),
    (
        "/messages",
        "anthropic.types",
        "Message",
        "RawMessageStreamEvent",
        {
            **CHAT,
            "tools": [{"name": "add", "input_schema": TOOL["parameters"]}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
    ),
]
ANSWERS: dict[str, dict[str, Any]] = {
    "text": {"content": "Hello there"},
    "nothing": {"content": "", "ids": (2,)},
    "reasoning": {"content": "Sum:", "reasoning": "Hm."},
    "calls": {"content": "Sum:", "reasoning": "Hm.", "calls": (("add", '{"a": 1}'), ("add", "{}"))},
    "cut": {"finish_reason": "length"},
    "stopped": {"stop": "END"},
}


def types_of(module: str) -> Any:
    """The package's types. A development environment may lack the package, the continuous integration's must not."""
    return importlib.import_module(module) if os.environ.get("CI") else pytest.importorskip(module)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{index}" for index, case in enumerate(CASES)])
def test_a_reply_has_the_packages_type(case: Any, answer: str) -> None:
    path, module, whole, piece, body = case
    types = types_of(module)
    fields = {name: value for name, value in ANSWERS[answer].items() if name != "calls" or path != "/completions"}
    gateway = StandInGateway()
    gateway.session.answers += [make_turn(make_choice(**fields)) for _ in range(2)]
    url = f"/sessions/{gateway.session.id}/v1{path}"
    adapter(getattr(types, whole)).validate_python(gateway.send(url, body).json())
    text = gateway.send(url, {**body, "stream": True}).text
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events
    for event in events:
        if event != "[DONE]":
            adapter(getattr(types, piece)).validate_python(_without_null_reasons(path, json.loads(event)))


def _without_null_reasons(path: str, event: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's API streams ``finish_reason: null`` of completions, which the package's type leaves out."""
    if path != "/completions":
        return event
    return {**event, "choices": [{**c, "finish_reason": c["finish_reason"] or "stop"} for c in event["choices"]]}
