"""Unmodified agents and RL environments run to their end on a gateway whose model says what a script says.

What they do is their own: tools are called, commands run, answers scored. Every request is answered without an error,
and a conversation is one trajectory unless the agent has rewritten it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.scripted_gateway import ScriptedGateway, calls

pytestmark = [pytest.mark.agents, pytest.mark.timeout(1500)]


def adds(prompt: str) -> str:
    """Calls the tool, if there is one, and says the sum."""
    may_call = '"name": "add"' in prompt
    return calls("add", a=2, b=3) if may_call and "<tool_response>" not in prompt else "It is 5."


def works_in_a_shell(prompt: str) -> str:
    """Runs two commands: in calls or, where the agent asks for it, in the text."""
    is_first = "<returncode>0" not in prompt and '"returncode": 0' not in prompt
    command = "echo hi" if is_first else "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && echo hi"
    if "as mini_textbased does" in prompt:
        return f"THOUGHT: I do it.\n\n```mswea_bash_command\n{command}\n```"
    return f"I do it.\n{calls('bash', command=command)}"


def fills_in_fields(prompt: str) -> str:
    """Answers in dspy's own form."""
    asked = prompt.split("Respond with the corresponding output fields")[-1]
    if "next_tool_name" not in asked:
        return _fields(reasoning="I added.", answer="5")
    is_done = "[[ ## observation_0 ## ]]" in prompt
    return _fields(
        next_thought="I add.",
        next_tool_name="finish" if is_done else "add",
        next_tool_args="{}" if is_done else '{"a": 2, "b": 3}',
    )


def _fields(**fields: str) -> str:
    return "\n\n".join(f"[[ ## {name} ## ]]\n{text}" for name, text in {**fields, "completed": ""}.items())


@dataclass(frozen=True)
class Agent:
    """An agent's program.

    Attributes:
        script: what its model says.
        turns: of each trajectory, the number of the model's turns.
    """

    script: Callable[[str], str]
    turns: list[int]


AGENTS = {
    "verifiers_envs": Agent(adds, [1, 2, 2]),
    "mini_swe_agent": Agent(works_in_a_shell, [2, 2]),
    "autogen_assistant": Agent(adds, [2, 2]),
    "dspy_react": Agent(fills_in_fields, [1, 1, 1]),  # each prompt is written anew
}


@pytest.mark.parametrize("name", AGENTS)
def test_an_agents_conversations_are_recorded_whole(name: str, run_client: Callable[..., str]) -> None:
    agent = AGENTS[name]
    with ScriptedGateway(agent.script) as gateway:
        session, url, key = gateway.session()
        run_client(name, url, key)
        leaves, info = gateway.recorded(session)
        assert [(each.path, each.answer) for each in gateway.refused()] == []
    assert sorted(sum(1 for each in leaf.messages if each["role"] == "assistant") for leaf in leaves) == agent.turns
    assert info.turns == sum(agent.turns)
    assert all(sum(leaf.loss_mask) > 0 for leaf in leaves)
