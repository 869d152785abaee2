"""What a gateway knows of its servers and settings reaches its routes."""

from __future__ import annotations

import httpx

from tests.fake_sglang import FakeServer
from torchrl_sglang import AgentGateway, SessionSettings


def test_the_model_list_has_the_servers_context_and_efforts_are_left_out_as_the_settings_say(fake: FakeServer) -> None:
    settings = SessionSettings(overrides={"reasoning_effort": None}, generation={"max_new_tokens": 2})
    with AgentGateway(fake.url, settings=settings) as gateway:
        session = gateway.create_session()
        headers = {"Authorization": f"Bearer {session.api_key}"}
        with httpx.Client(headers=headers, base_url=session.base_url, trust_env=False) as client:
            (model,) = client.get("/models").json()["data"]
            assert model["max_model_len"] == gateway.sessions.model.pool.context_length
            assert model["max_model_len"] > 0
            body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "low"}
            answer = client.post("/chat/completions", json={**body, "return_token_ids": True}).json()
        (leaf,) = gateway.trajectories(session.id)
        assert tuple(answer["prompt_token_ids"] + answer["choices"][0]["token_ids"]) == leaf.token_ids
