"""Importance weights for tokens that were sampled by other weights than the trainer's.

``N`` counts the response tokens of a batch, one answer after the other. ``mu`` is the policy that sampled a token, as
the server recorded it; ``pi`` is the trainer's model before the update. A token's term in the policy gradient is
multiplied by its weight.
"""

from __future__ import annotations

import torch

from torchrl_sglang.config.checking import require_number

__all__ = ["truncated_importance_weights"]


def truncated_importance_weights(log_pi_N: torch.Tensor, log_mu_N: torch.Tensor, *, cap: float = 2.0) -> torch.Tensor:
    """``min(pi / mu, cap)`` per token: truncated importance sampling (Ionides, 2008; the rho of V-trace, 2018).

    Weights below the cap are exact. Weights above it are biased down, which bounds the variance. All weights are 1 if
    server and trainer agree.

    Args:
        log_pi_N: float; log-probs under the trainer's model. No gradient flows through the weights.
        log_mu_N: float; log-probs recorded while sampling.
        cap: largest weight.

    Returns:
        ``(N,)`` weights in ``[0, cap]``.

    Raises:
        ConfigError: the cap is not positive.

    Examples:
        >>> log_mu = torch.tensor([0.5, 0.1, 0.2]).log()
        >>> truncated_importance_weights(torch.tensor([0.5, 0.9, 0.1]).log(), log_mu)
        tensor([1.0000, 2.0000, 0.5000])
    """
    require_number("cap", cap, above=0)
    return (log_pi_N.detach() - log_mu_N).clamp(max=20.0).exp().clamp(max=cap)
