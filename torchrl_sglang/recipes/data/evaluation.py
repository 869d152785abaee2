"""Evaluate a policy on held-out questions: unbiased pass@k."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from torchrl_sglang.config.checking import require

__all__ = ["evaluate", "mean_pass_at_k", "pass_at_k"]


def pass_at_k(num_answers: int, num_right: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of ``k`` answers is right.

    It is ``1 - C(n - c, k) / C(n, k)`` (Chen et al., 2021); ``1 - (1 - c/n)**k`` would be too low.

    Args:
        num_answers: n, the number of answers to one question.
        num_right: c, how many of them are right.
        k: at most ``num_answers``.

    Raises:
        ConfigError: ``num_right`` or ``k`` is out of range.

    Examples:
        >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
        (0.25, 0.5, 1.0)
    """
    require(0 <= num_right <= num_answers, f"{num_right} of {num_answers} answers can't be right")
    require(1 <= k <= num_answers, f"pass@{k} can't be estimated from {num_answers} answers")
    return 1.0 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)


def mean_pass_at_k(right_QA: torch.Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Mean of pass@k over questions.

    Args:
        right_QA: bool; which of each question's answers are right.
        ks: the values of k for pass@k.

    Returns:
        ``eval_pass_at_<k>`` for every k.

    Examples:
        >>> mean_pass_at_k(torch.tensor([[True, False], [False, False]]), [1, 2])
        {'eval_pass_at_1': 0.25, 'eval_pass_at_2': 0.5}
    """
    num_answers = right_QA.shape[1]
    chances = {k: [pass_at_k(num_answers, num_right, k) for num_right in right_QA.sum(-1).tolist()] for k in ks}
    return {f"eval_pass_at_{k}": sum(per_question) / len(per_question) for k, per_question in chances.items()}


def evaluate(
    env: Any, policy: Callable[[TensorDictBase], TensorDictBase], *, answers: int, ks: Sequence[int]
) -> dict[str, float]:
    """Let a policy answer an environment's questions, and compute reward and pass@k.

    Args:
        env: asks the evaluation questions in every reset, each ``answers`` times in a row, and writes ``reward`` and
            ``right`` (or ``success``) in one step: see :func:`make_test_env`.
        policy: generates the answers.
        answers: number of answers per question.
        ks: the values of k for pass@k.

    Returns:
        ``eval_reward_mean``, ``eval_pass_at_<k>`` for every k (means over the questions), and ``eval_truncated``, the
        fraction of answers that reached the length limit.
    """
    if hasattr(env, "reset_dataloader"):
        env.reset_dataloader()  # the same questions each time
    done = env.step(policy(env.reset()))
    right = done["next"].get("right", done["next"].get("success", None))
    right_QA = torch.as_tensor(right).reshape(-1, answers)
    return {
        "eval_reward_mean": float(done["next", "reward"].float().mean()),
        **mean_pass_at_k(right_QA, ks),
        "eval_truncated": float(done["generation", "truncated"].float().mean()),
    }
