"""Advantages within a group: exactly 0 where all rewards are equal, else those of plain Python in float64."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.objectives.llm import MCAdvantage

from torchrl_sglang import recipes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EQUAL = [0.7, 0.85, 0.1, 1 / 3, -0.3, 0.9666666666666667, 1e-3, 12345.678, 0.0, 1.0]
DIFFERENT = [[0.7, 0.7, 0.85, 0.1, 0.7, 0.0, 1.0, 0.3], [0.7] * 7 + [0.701], [0.0] * 7 + [1.0], [1e-3] * 4 + [2e-3] * 4]


def episodes(rewards_by_group: list[list[list[float]]], dtype: torch.dtype = torch.float32) -> TensorDictBase:
    """Every step of every conversation as a row; ragged as a collector's. Innermost list: one conversation's steps."""
    rows = [
        TensorDict(
            {
                "query": f"question {number}",
                "position": torch.tensor(number),
                "tokens": torch.arange(number + step + 1),
                "next": {
                    "reward": torch.tensor([[reward]], dtype=dtype),
                    "done": torch.tensor([step == len(steps) - 1]),
                },
            }
        )
        for number, conversations in enumerate(rewards_by_group)
        for steps in conversations
        for step, reward in enumerate(steps)
    ]
    return lazy_stack(rows)


def answers(rewards_by_group: list[list[float]], **options: Any) -> TensorDictBase:
    return episodes([[[reward] for reward in group] for group in rewards_by_group], **options)


def advantages(batch: TensorDictBase) -> list[float]:
    return [row["advantage"].item() for row in batch.unbind(0)]


def expected(rewards: list[float]) -> list[float]:
    mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / deviation for reward in rewards]


@pytest.mark.torchrl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 5, 8, 16])
def test_equal_rewards_have_an_advantage_of_exactly_zero(size: int, dtype: torch.dtype) -> None:
    batch = recipes.GroupAdvantage(size).inv(answers([[reward] * size for reward in EQUAL], dtype=dtype))
    assert advantages(batch) == [0.0] * size * len(EQUAL)


@pytest.mark.torchrl
def test_other_groups_have_the_advantages_of_plain_python() -> None:
    mixed = [DIFFERENT[0], [0.7] * 8, *DIFFERENT[1:], [0.85] * 8]
    found = advantages(recipes.GroupAdvantage(8).inv(answers(mixed)))
    wanted = [value for group in mixed for value in (expected(group) if len(set(group)) > 1 else [0.0] * 8)]
    assert found == pytest.approx(wanted, abs=2e-3)  # float32 keeps three digits of 0.7 - 0.701
    unchanged = [i for i, group in enumerate(mixed) if len(set(group)) > 1]
    torchrls = advantages(MCAdvantage(8).inv(answers(mixed)))
    assert all(found[8 * i : 8 * i + 8] == torchrls[8 * i : 8 * i + 8] for i in unchanged)


@pytest.mark.torchrl
def test_rewards_that_differ_by_their_rounding_count_as_equal() -> None:
    by_hand = [0.7 + 0.2 * 3 / 9, 0.7 + 0.2 * (3 / 9), 0.7 + 0.2 / 3, 0.2 / 3 + 0.7]
    one_unit = [0.7, math.nextafter(0.7, 1), 0.7 + 2**-24, 0.7]
    batch = recipes.GroupAdvantage(4).inv(answers([by_hand, one_unit, [0.7, 0.7, 0.7, 0.70001]]))
    assert advantages(batch)[:8] == [0.0] * 8
    assert advantages(batch)[8:] == pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-2)


def test_conversations_with_equal_sums_of_rewards_have_none() -> None:
    """The same total, added up in different orders and from different numbers of steps."""
    equal = [[0.1, 0.2, 0.4], [0.7], [0.4, 0.2, 0.1], [0.3, 0.3, 0.1], [0.7], [0.0, 0.7], [0.35, 0.35], [0.6, 0.1]]
    different = [*equal[:-1], [0.6, 0.2]]
    found = recipes.GroupAdvantage(8, prompt_key="position", trajectory_return="sum").inv(episodes([equal, different]))
    steps = sum(map(len, equal))
    values = advantages(found)
    assert values[:steps] == [0.0] * steps
    wanted = [value for value, one in zip(expected([0.7] * 7 + [0.8]), different, strict=True) for _ in one]
    assert values[steps:] == pytest.approx(wanted, abs=1e-4)


def test_a_group_that_arrives_in_parts_is_treated_the_same() -> None:
    transform = recipes.GroupAdvantage(8)
    batch = answers([[0.7] * 8])
    assert transform.inv(batch[:3]) is None
    assert advantages(transform.inv(batch[3:])) == [0.0] * 8


def test_a_question_asked_twice_makes_two_groups() -> None:
    batch = answers([[0.7] * 8 + [0.7] * 7 + [0.2]])
    found = advantages(recipes.GroupAdvantage(8).inv(batch))
    assert found[:8] == [0.0] * 8
    assert found[8:] == pytest.approx(expected([0.7] * 7 + [0.2]), abs=1e-5)


@pytest.mark.torchrl
def test_a_replay_buffer_stores_zeros() -> None:
    buffer = ReplayBuffer(storage=LazyStackStorage(16), batch_size=4, transform=recipes.GroupAdvantage(8))
    buffer.extend(answers([[0.85] * 8, DIFFERENT[0]]))
    assert advantages(buffer[:8]) == [0.0] * 8
    assert advantages(buffer[8:]) == pytest.approx(expected(DIFFERENT[0]), abs=1e-5)


def test_whitening_equal_values_gives_zeros() -> None:
    for value in EQUAL:
        for count in (1, 3, 7, 8, 100):
            assert recipes.whiten(torch.full((count,), value)).tolist() == [0.0] * count
    values = [0.7, 0.7, 0.8]
    mean, deviation = statistics.mean(values), statistics.pstdev(values)
    assert recipes.whiten(torch.tensor(values)).tolist() == pytest.approx(
        [(v - mean) / deviation for v in values], 1e-5
    )


def test_no_recipe_uses_torchrls_class_directly() -> None:
    users = [path.name for path in EXAMPLES.glob("*.py") if re.search(r"\bMCAdvantage\(", path.read_text())]
    assert users == ["grpo_minimal.py"], "tests/test_readme.py checks what that one does"
