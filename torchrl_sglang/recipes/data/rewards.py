"""Scoring functions, and the transform that runs one inside a TorchRL environment.

A scoring function takes the answer's text, the reference answer, and whether the answer ended before the length limit.
It returns the reward, and whether the answer is right, for pass@k.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform
from torchrl.envs.llm import CountdownRewardParser

__all__ = ["RewardTransform", "Score", "Scorer", "score_countdown", "score_exact", "score_number", "score_sum"]

Score = tuple[float, bool]
Scorer = Callable[[str, str, bool], Score]


def score_sum(answer: str, truth: str, in_time: bool) -> Score:
    """Score a sum: 0.7 if the last number is right, plus 0.2 times the share of digits, plus 0.1 for ending in time.

    An answer without a number scores 0. The two smaller parts lead a model that is seldom right to short answers that
    contain a number.

    Examples:
        >>> score_sum("5 + 2 = 7", "7", False)  # 3 of 9 characters are digits
        (0.7666666666666666, True)
        >>> score_sum("I don't know", "7", True)
        (0.0, False)
    """
    numbers = re.findall(r"\d+", answer)
    right = bool(numbers) and numbers[-1] == truth
    digits = sum(map(len, numbers)) / max(len(answer), 1)
    return (0.7 * right + 0.2 * digits + 0.1 * in_time if numbers else 0.0), right


def score_number(answer: str, truth: str, in_time: bool) -> Score:
    r"""Score 1 if the answer's last number, or the one in ``\boxed{}``, is the reference's (after ``####``, if any).

    Examples:
        >>> score_number("so she has 1,250 apples left.", "5 * 250 = 1250 #### 1250", True)
        (1.0, True)
        >>> score_number(r"5 or 6, thus \boxed{5}, not 6", "5", True)
        (1.0, True)
    """
    found, expected = _last_number(answer), _last_number(truth.split("####")[-1])
    right = found is not None and found == expected
    return float(right), right


def score_exact(answer: str, truth: str, in_time: bool) -> Score:
    """Score 1 if the answer equals the reference, ignoring white space and letter case.

    Examples:
        >>> score_exact(" Paris ", "paris", True)
        (1.0, True)
    """
    right = " ".join(answer.split()).casefold() == " ".join(truth.split()).casefold()
    return float(right), right


def score_countdown(answer: str, truth: str, in_time: bool) -> Score:
    """Score 1 for an expression that reaches the target, 0.1 for any other in ``<answer>`` tags, by TorchRL's rules.

    Args:
        answer: the model's answer.
        truth: ``target=23, numbers=4,10,9``, as :class:`torchrl.envs.llm.CountdownEnv` writes it.
        in_time: not used.

    Examples:
        >>> score_countdown("<answer>4 + 10 + 9</answer>", "target=23, numbers=4,10,9", True)
        (1.0, True)
        >>> score_countdown("<answer>23</answer>", "target=23, numbers=4,10,9", True)
        (0.1, False)
    """
    _, expression = CountdownRewardParser.extract_tags(answer)
    target, _, numbers = truth.removeprefix("target=").partition(", numbers=")
    right = CountdownRewardParser.validate_expression(expression, int(target), [int(n) for n in numbers.split(",")])
    return (1.0, True) if right else (0.1 if expression else 0.0, False)


def _last_number(text: str) -> float | None:
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", boxed[-1] if boxed else text)
    return float(numbers[-1].replace(",", "")) if numbers else None


class RewardTransform(Transform):
    """Scores every answer of a step and ends the episode: one question, one answer.

    Writes ``reward`` (float32) and ``right`` (bool), both ``(*batch, 1, 1)``: TorchRL's losses and advantages require
    a token dimension.

    Args:
        score: the scoring function.
        answer_key: key of the reference answer.
    """

    def __init__(self, score: Scorer, *, answer_key: str = "answer") -> None:
        super().__init__(in_keys=[], out_keys=["reward", "right"])
        self.score = score
        self.answer_key = answer_key

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        answers, truths = tensordict["text", "response"], tensordict[self.answer_key]
        ended = (~tensordict["generation"].truncated).tolist()
        scores = [
            self.score(answer, str(truth), in_time)
            for answer, truth, in_time in zip(answers, truths, ended, strict=True)
        ]
        rewards_B, right_B = [reward for reward, _ in scores], [right for _, right in scores]
        return self._write(next_tensordict, rewards_B, right_B, done_B=[True] * len(scores))

    @staticmethod
    def _write(
        next_tensordict: TensorDictBase, rewards_B: list[float], right_B: list[bool], *, done_B: list[bool]
    ) -> TensorDictBase:
        shape = (*next_tensordict.batch_size, 1, 1)
        next_tensordict["reward"] = torch.tensor(rewards_B).reshape(shape)
        next_tensordict["right"] = torch.tensor(right_B).reshape(shape)
        for name in ("done", "terminated"):
            next_tensordict[name] = torch.tensor(done_B).reshape(next_tensordict[name].shape)
        return next_tensordict

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Add a token dimension and a value dimension to both entries."""
        shape: Any = (*reward_spec.shape, 1, 1)
        reward_spec["reward"] = Unbounded(shape)
        reward_spec["right"] = Unbounded(shape, dtype=torch.bool)
        return reward_spec
