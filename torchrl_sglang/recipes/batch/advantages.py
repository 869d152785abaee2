"""Advantages per token, for answers that are stored one after the other.

``B`` answers; ``N`` response tokens of all answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchrl.objectives.value.functional import td0_advantage_estimate, vec_generalized_advantage_estimate

from torchrl_sglang.recipes.batch.group_advantage import equal_up_to_rounding

__all__ = ["token_advantages", "token_rewards", "whiten"]


def token_rewards(reward_B: torch.Tensor, penalty_N: torch.Tensor, lengths_B: Sequence[int]) -> torch.Tensor:
    """Reward per token: minus the token's penalty (scaled KL to a reference); the last token adds the answer's reward.

    Args:
        reward_B: float; one per answer.
        penalty_N: float; one per token.
        lengths_B: tokens per answer, each at least 1.

    Examples:
        >>> token_rewards(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.1, 0.0]), [2, 1])
        tensor([-0.1000,  0.9000,  2.0000])
    """
    rewards_N = -penalty_N
    rewards_N[_last_tokens(lengths_B, rewards_N.device)] += reward_B
    return rewards_N


def token_advantages(
    rewards_N: torch.Tensor, values_N: torch.Tensor, lengths_B: Sequence[int], *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016) within each answer, by TorchRL.

    TorchRL takes the tokens as one trajectory that terminates at the last token of each answer.

    Args:
        rewards_N: float; reward for choosing each token.
        values_N: float; estimated return before each token is chosen.
        lengths_B: tokens per answer, each at least 1.
        gamma: discount per token.
        lam: between 0 (one-step errors of the values) and 1 (sums of rewards).

    Returns:
        Advantages and returns (advantage + value), each ``(N,)``, without gradient.

    Examples:
        >>> advantages, returns = token_advantages(
        ...     torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.75]), [2], gamma=1.0, lam=1.0)
        >>> advantages, returns
        (tensor([0.5000, 0.2500]), tensor([1., 1.]))
    """
    values_N1 = values_N.detach()[:, None]
    ends_N1 = torch.zeros_like(values_N1, dtype=torch.bool)
    ends_N1[_last_tokens(lengths_B, values_N.device)] = True
    trajectory = {
        "state_value": values_N1,
        "next_state_value": values_N1.roll(-1, 0),  # not used where an answer ends
        "reward": rewards_N.detach()[:, None],
        "done": ends_N1,
        "terminated": ends_N1,
    }
    if (
        gamma * lam == 0
    ):  # torchrl 0.14.1 fails for it: the filter of vec_generalized_advantage_estimate has no dimension
        advantages_N = td0_advantage_estimate(gamma, **trajectory)[:, 0]
    else:
        advantages_N = vec_generalized_advantage_estimate(gamma, lam, **trajectory)[0][:, 0]
    return advantages_N, advantages_N + values_N.detach()


def whiten(values_N: torch.Tensor) -> torch.Tensor:
    """Shift and scale to mean 0 and standard deviation 1; equal values become 0.

    Examples:
        >>> whiten(torch.tensor([0.7, 0.7, 0.7])).tolist()
        [0.0, 0.0, 0.0]
    """
    if equal_up_to_rounding(values_N):  # else their mean's rounding error would be divided by 1e-8
        return torch.zeros_like(values_N)
    return (values_N - values_N.mean()) / (values_N.std(correction=0) + 1e-8)


def _last_tokens(lengths_B: Sequence[int], device: torch.device) -> torch.Tensor:
    """Index of each answer's last token; int64 of shape (B,)."""
    return torch.tensor(lengths_B, device=device).cumsum(0) - 1
