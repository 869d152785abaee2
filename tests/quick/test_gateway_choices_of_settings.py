"""Settings that ask for several choices, where the client's API has one answer: it gets the first."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.scripted_gateway import ScriptedGateway

REQUESTS: dict[str, dict[str, Any]] = {
    "messages": {"max_tokens": 50, "messages": [{"role": "user", "content": "q"}]},
    "responses": {"input": "q"},
}
TEXT = {"messages": ("content_block_delta", "text"), "responses": ("response.output_text.delta", None)}


@pytest.mark.parametrize("path", sorted(REQUESTS))
def test_a_stream_of_one_answer_has_nothing_of_the_other_choices(path: str) -> None:
    answers = iter(["The dog.", "A cat and the fox."])
    with ScriptedGateway(lambda _: next(answers), settings={"overrides": {"n": 2}}) as gateway:
        name, url, key = gateway.session()
        body = {"model": "any", "stream": True, **REQUESTS[path]}
        with httpx.Client(headers={"authorization": f"Bearer {key}"}, trust_env=False) as client:
            lines = client.post(f"{url}/{path}", json=body).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        kind, field = TEXT[path]
        deltas = [event["delta"] for event in events if event["type"] == kind]
        assert "".join(delta if field is None else delta[field] for delta in deltas) == "The dog."
        recorded, _ = gateway.recorded(name)
        assert len(recorded) == 2
