"""Unmodified agent frameworks run a tool conversation through the gateway on a real server, and it is recorded exactly.

The tiny model's calls are forced by a grammar (``tool_choice``), its last answer is free. What was recorded is fed to
transformers: where no grammar was at work, the log-probs agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from torchrl_sglang.agents.gateway import AgentGateway

pytestmark = [pytest.mark.agents, pytest.mark.timeout(1500)]

# The framework -> the conversations that its program has, each with the number of its turns.
FRAMEWORKS = {
    "openai_agents_sdk": [2, 2],
    "pydantic_ai_agent": [3],
    "smolagents_agent": [1, 1, 1],
    "langchain_agent": [2],
    "litellm_agent": [2],
    "anthropic_client": [2],
    "openai_javascript": [2],
    "vercel_ai": [2, 2, 2],
    "openai_agents_javascript": [2, 2],
    "langchain_javascript": [2],
}


@pytest.fixture(scope="session")
def trained(tiny_with_room: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_with_room, dtype=torch.float32).eval()


def runs(trajectory: Any) -> list[slice]:
    """The places of the sampled tokens, one slice per turn."""
    found: list[slice] = []
    start = None
    for index, mask in enumerate((*trajectory.loss_mask, 0)):
        if mask and start is None:
            start = index
        elif not mask and start is not None:
            found.append(slice(start, index))
            start = None
    return found


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_frameworks_conversation_is_recorded_exactly(
    name: str, gateway: AgentGateway, run_client: Callable[..., str], trained: Any
) -> None:
    session = gateway.create_session(tags={"framework": name})
    run_client(name, session.base_url, session.api_key)
    leaves = gateway.trajectories(session.id)
    assert sorted(len(runs(leaf)) for leaf in leaves) == sorted(FRAMEWORKS[name])
    assert gateway.get(session.id).turns == sum(FRAMEWORKS[name])
    for leaf in leaves:
        ids_1T = torch.tensor([leaf.token_ids])
        with torch.no_grad():
            log_probs_T = trained(ids_1T).logits[0, :-1].log_softmax(-1).gather(-1, ids_1T[0, 1:, None])[:, 0]
        answers = [message for message in leaf.messages if message["role"] == "assistant"]
        places = runs(leaf)  # the last answers: earlier ones that a framework has rewritten are text of a prompt
        for place, answer in zip(places, answers[len(answers) - len(places) :], strict=True):
            if answer.get("tool_calls"):
                continue  # the grammar took part in the sampling
            expected = log_probs_T[place.start - 1 : place.stop - 1]
            assert list(leaf.log_probs[place]) == pytest.approx(expected.tolist(), abs=1e-4)
