"""Policy and value losses per token, as functions. ``N`` counts the response tokens of a batch."""

from __future__ import annotations

import torch

__all__ = ["clipped_policy_loss", "clipped_value_loss"]


def clipped_policy_loss(
    log_probs_N: torch.Tensor, old_log_probs_N: torch.Tensor, advantage_N: torch.Tensor, *, clip_epsilon: float
) -> torch.Tensor:
    """PPO's clipped surrogate (Schulman et al., 2017), one loss per token.

    Args:
        log_probs_N: float, with gradient; log-probs under the policy being trained.
        old_log_probs_N: float; log-probs before the first step on this batch.
        advantage_N: float.
        clip_epsilon: moving the ratio new / old beyond ``1 +- clip_epsilon`` does not lower the loss.

    Returns:
        ``(N,)`` losses; minimise their mean.

    Examples:
        >>> old = torch.tensor([0.5, 0.5]).log()
        >>> clipped_policy_loss(torch.tensor([0.9, 0.5]).log(), old, torch.tensor([1.0, -1.0]), clip_epsilon=0.2)
        tensor([-1.2000,  1.0000])
    """
    ratio_N = (log_probs_N - old_log_probs_N).exp()
    clipped_N = ratio_N.clamp(1 - clip_epsilon, 1 + clip_epsilon)
    return -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)


def clipped_value_loss(
    values_N: torch.Tensor, old_values_N: torch.Tensor, returns_N: torch.Tensor, *, clip_epsilon: float
) -> torch.Tensor:
    """PPO's clipped value loss: half the squared error, without gain from moving further than ``clip_epsilon``.

    Args:
        values_N: float, with gradient.
        old_values_N: float; estimates before the first step on this batch.
        returns_N: float; the returns that the estimates should match.
        clip_epsilon: how far an estimate may move on one batch, in units of the return.

    Returns:
        ``(N,)`` losses.

    Examples:
        >>> clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), clip_epsilon=0.2)
        tensor([0.3200])
    """
    moved_N = old_values_N + (values_N - old_values_N).clamp(-clip_epsilon, clip_epsilon)
    return 0.5 * torch.maximum((values_N - returns_N).square(), (moved_N - returns_N).square())
