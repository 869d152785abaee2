"""Importance weights for tokens that other weights than the trainer's have sampled.

``N`` counts the response tokens of a batch, one after the other. The behaviour policy ``mu`` is what sampled a token,
as the server recorded it; ``pi`` is the trainer's model before the update. Both functions give the factor that a
token's term in the policy gradient is multiplied by.
"""

from __future__ import annotations

import torch

from torchrl_sglang.errors import ConfigError

__all__ = ["masked_importance_weights", "truncated_importance_weights"]


def truncated_importance_weights(log_pi_N: torch.Tensor, log_mu_N: torch.Tensor, *, cap: float = 2.0) -> torch.Tensor:
    """``min(pi / mu, cap)`` per token: truncated importance sampling (Ionides, 2008; the rho of V-trace, 2018).

    Weights below the cap are exact, those above it are biased down, which bounds the variance. With server and trainer
    in agreement all weights are 1.

    Args:
        log_pi_N: float; log-probs under the trainer's model. No gradient flows through the weights.
        log_mu_N: float; log-probs as recorded while sampling.
        cap: largest weight.

    Returns:
        ``(N,)`` weights in ``[0, cap]``.

    Raises:
        ConfigError: a cap that is not positive.

    Examples:
        >>> log_mu = torch.tensor([0.5, 0.1, 0.2]).log()
        >>> truncated_importance_weights(torch.tensor([0.5, 0.9, 0.1]).log(), log_mu)
        tensor([1.0000, 2.0000, 0.5000])
    """
    if not cap > 0:
        raise ConfigError(f"the cap of importance weights must be positive, got {cap}")
    return (log_pi_N.detach() - log_mu_N).clamp(max=20.0).exp().clamp(max=cap)


def masked_importance_weights(
    log_pi_N: torch.Tensor, log_mu_N: torch.Tensor, *, low: float = 0.5, high: float = 2.0
) -> torch.Tensor:
    """``pi / mu`` per token where it lies within ``[low, high]``, else 0: masked importance sampling.

    A token on which the two models disagree by more than that teaches nothing, instead of something wrong.

    Args:
        log_pi_N: float; log-probs under the trainer's model. No gradient flows through the weights.
        log_mu_N: float; log-probs as recorded while sampling.
        low: smallest ratio that counts.
        high: largest ratio that counts.

    Returns:
        ``(N,)`` weights, each 0 or in ``[low, high]``.

    Raises:
        ConfigError: bounds that don't enclose 1.

    Examples:
        >>> log_mu = torch.tensor([0.5, 0.1, 0.2]).log()
        >>> masked_importance_weights(torch.tensor([0.5, 0.9, 0.16]).log(), log_mu)
        tensor([1.0000, 0.0000, 0.8000])
    """
    if not 0 <= low <= 1 <= high:
        raise ConfigError(f"the bounds of importance weights must enclose 1, got low={low}, high={high}")
    ratio_N = (log_pi_N.detach() - log_mu_N).clamp(max=20.0).exp()
    return torch.where((ratio_N >= low) & (ratio_N <= high), ratio_N, torch.zeros_like(ratio_N))
