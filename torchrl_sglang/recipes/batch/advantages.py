"""Generalised advantage estimation over the tokens of single answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["token_advantages", "token_rewards", "whiten"]


def token_rewards(reward_B: torch.Tensor, penalty_N: torch.Tensor, lengths_B: Sequence[int]) -> torch.Tensor:
    """A reward per token: the answer's at its last token, less a penalty at every one (KL to a reference, scaled).

    Args:
        reward_B: float; one per answer.
        penalty_N: float; one per token.
        lengths_B: tokens per answer, each at least 1.

    Examples:
        >>> token_rewards(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.1, 0.0]), [2, 1])
        tensor([-0.1000,  0.9000,  2.0000])
    """
    rewards_N = -penalty_N
    last_B = torch.tensor(lengths_B, device=rewards_N.device).cumsum(0) - 1
    rewards_N[last_B] += reward_B
    return rewards_N


def token_advantages(
    rewards_N: torch.Tensor, values_N: torch.Tensor, lengths_B: Sequence[int], *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE (Schulman et al., 2016) within each answer; after its last token nothing comes, so its value there is 0.

    Args:
        rewards_N: float; reward for choosing each token.
        values_N: float; estimated return before each token is chosen.
        lengths_B: tokens per answer.
        gamma: discount per token.
        lam: 0 trusts the values, 1 the rewards.

    Returns:
        Advantages and returns (advantage + value), each ``(N,)``, without gradient.

    Examples:
        >>> advantages, returns = token_advantages(
        ...     torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.75]), [2], gamma=1.0, lam=1.0)
        >>> advantages, returns
        (tensor([0.5000, 0.2500]), tensor([1., 1.]))
    """
    values_N = values_N.detach()
    advantages = []
    for rewards_R, values_R in zip(
        torch.split(rewards_N, list(lengths_B)), torch.split(values_N, list(lengths_B)), strict=True
    ):
        next_R = torch.cat([values_R[1:], values_R.new_zeros(1)])
        errors = (rewards_R + gamma * next_R - values_R).tolist()
        running, found = 0.0, []
        for error in reversed(errors):
            running = error + gamma * lam * running
            found.append(running)
        advantages.append(values_R.new_tensor(found[::-1]))
    advantages_N = torch.cat(advantages)
    return advantages_N, advantages_N + values_N


def whiten(values_N: torch.Tensor) -> torch.Tensor:
    """Shift and scale to mean 0 and standard deviation 1; values that are all equal become 0.

    Examples:
        >>> whiten(torch.tensor([1.0, 1.0])).tolist()
        [0.0, 0.0]
    """
    return (values_N - values_N.mean()) / (values_N.std(correction=0) + 1e-8)
