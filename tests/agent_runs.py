"""For tests of the collector: agents that speak plain HTTP, and a gateway before a fake server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

# verify=False: reading the system's certificates takes longer than the whole request, which is not encrypted.


def ask(base_url: str, api_key: str, messages: Sequence[dict[str, Any]], **settings: Any) -> list[str]:
    """The answers to a conversation; a plain function's way to the model."""
    body = {"model": "any", "messages": list(messages), "max_tokens": 6, **settings}
    headers = {"Authorization": f"Bearer {api_key}"}
    answer = httpx.post(f"{base_url}/chat/completions", json=body, headers=headers, timeout=60, verify=False)
    answer.raise_for_status()
    return [choice["message"]["content"] or "" for choice in answer.json()["choices"]]


async def ask_async(base_url: str, api_key: str, messages: Sequence[dict[str, Any]], **settings: Any) -> list[str]:
    """The answers to a conversation; an async function's way to the model."""
    body = {"model": "any", "messages": list(messages), "max_tokens": 6, **settings}
    headers = {"Authorization": f"Bearer {api_key}"}
    async with httpx.AsyncClient(timeout=60, verify=False) as client:
        answer = await client.post(f"{base_url}/chat/completions", json=body, headers=headers)
    answer.raise_for_status()
    return [choice["message"]["content"] or "" for choice in answer.json()["choices"]]


def says(text: str, role: str = "user") -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": text}


def two_turns(rewards: Callable[[Any], Iterator[float]]) -> Callable[[Any, str, str], Any]:
    """An async agent of two turns whose runs of a task earn what ``rewards(task)`` yields, one after the other."""
    left: dict[str, Iterator[float]] = {}

    async def agent(task: Any, base_url: str, api_key: str) -> float:
        reward = next(left.setdefault(repr(task), rewards(task)))
        first = await ask_async(base_url, api_key, [says(f"What is {task}?")])
        await ask_async(base_url, api_key, [says(f"What is {task}?"), says(first[0], "assistant"), says("Sure?")])
        return reward

    return agent
