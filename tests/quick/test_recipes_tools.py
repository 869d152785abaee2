"""Python as a tool, and conversations as sequences of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from torchrl_sglang import ConfigError
from torchrl_sglang.recipes import Conversations, PythonTool
from torchrl_sglang.recipes.data.rewards import score_number
from torchrl_sglang.recipes.tools.python_tool import find_program


def test_only_a_closed_block_is_a_program() -> None:
    assert find_program("```python\nprint(1)") is None
    assert find_program("```\nprint(1)\n```") is None
    assert find_program("a\n```py\nx = 1\nprint(x)\n```\nb\n```python\ny\n```") == "x = 1\nprint(x)"
    assert find_program("<run>1</run>", r"<run>(.*?)</run>") == "1"


@pytest.mark.parametrize("wrong", [{"max_turns": 0}, {"reply": "done"}, {"bonus": 1.0}, {"bonus": -0.1}])
def test_a_tool_refuses_invalid_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PythonTool(score_number, **wrong)


def turn(
    prompt: list[int], response: list[int], *, done: bool, reward: float = 0.0, version: int = 0
) -> TensorDictBase:
    return TensorDict(
        {
            "tokens": {"prompt": torch.tensor(prompt), "full": torch.tensor(prompt + response)},
            "log_probs": {"response": -torch.arange(1.0, 1 + len(response))},
            "generation": {
                "weight_version": torch.full((len(response),), version),
                "truncated": torch.tensor(not done),
            },
            "position": torch.tensor(7),
            "advantage": torch.full((1, 1), 0.5),
            "next": {
                "reward": torch.full((1, 1), reward),
                "right": torch.tensor([[done]]),
                "done": torch.tensor([done]),
            },
        }
    )


def test_a_conversation_is_one_sequence_with_a_mask_of_the_assistants_tokens() -> None:
    conversations = Conversations.from_turns(
        [
            turn([1, 2], [3, 4], done=False, reward=0.25),
            turn([1, 2, 3, 4, 50, 51], [6], done=True, reward=0.5, version=1),
            turn([1], [9], done=True),
        ]
    )
    tokens = conversations.tokens
    assert len(conversations) == 2
    assert [ids.tolist() for ids in tokens.prompt_B_T] == [[1, 2], [1]]
    assert [ids.tolist() for ids in tokens.response_B_R] == [[3, 4, 50, 51, 6], [9]]
    assert conversations.written_N.tolist() == [True, True, False, False, True, True]
    assert tokens.server_N.tolist() == [-1, -2, 0, 0, -1, -1]
    assert tokens.version_N.tolist() == [0, 0, -1, -1, 1, 0]
    assert tokens.reward_B.tolist() == [0.75, 0]
    assert tokens.right_B.tolist() == [True, True]
    assert tokens.truncated_B.tolist() == [False, False]
    assert tokens.position_B.tolist() == [7, 7]
    assert tokens.advantage_N is not None
    assert tokens.advantage_N.tolist() == [0.5] * 6
    assert conversations.turns_B.tolist() == [2, 1]
    assert conversations.num_written == 4


def test_tokens_that_changed_between_turns_are_refused() -> None:
    turns = [turn([1, 2], [3, 4], done=False), turn([1, 2, 34, 50], [6], done=True)]
    with pytest.raises(ConfigError, match="prompt of turn 2 .* prefer_tokens=True"):
        Conversations.from_turns(turns)


def test_an_incomplete_conversation_is_refused() -> None:
    with pytest.raises(ConfigError, match="yield_completed_trajectories=True"):
        Conversations.from_turns([turn([1], [2], done=True), turn([1], [2], done=False)])
