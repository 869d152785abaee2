"""The scripted gateway, on which unmodified agents are run, does what a gateway does."""

from __future__ import annotations

import httpx

from tests.scripted_gateway import ScriptedGateway, calls

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_a_conversation_with_a_call_is_one_trajectory() -> None:
    with ScriptedGateway(lambda prompt: "5" if "<tool_response>" in prompt else calls("add", a=2, b=3)) as gateway:
        name, url, key = gateway.session()
        messages = [{"role": "user", "content": "What is 2 + 3?"}]
        with httpx.Client(headers={"authorization": f"Bearer {key}"}, trust_env=False) as client:
            for _ in range(2):
                body = {"model": "any", "messages": messages, "tools": [ADD]}
                message = client.post(f"{url}/chat/completions", json=body).json()["choices"][0]["message"]
                messages += [message] + [
                    {"role": "tool", "tool_call_id": call["id"], "content": "5"}
                    for call in message.get("tool_calls", ())
                ]
        assert message["content"] == "5"
        (whole,), info = gateway.recorded(name)
        assert sum(whole.loss_mask) == info.sampled_tokens
        assert [(each.method, each.status) for each in gateway.seen] == [("POST", 200)] * 2
        assert gateway.refused() == []
