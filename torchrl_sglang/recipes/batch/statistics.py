"""Statistics that show whether the trainer learns from what it assumes: log-prob gaps, importance ratios, KL, age.

``N`` counts the response tokens of a batch, one answer after the other. All functions are pure and pass no gradient.
"""

from __future__ import annotations

import torch

__all__ = ["effective_sample_size", "kl_estimates", "staleness_histogram", "staleness_text", "training_signal"]

_LOG_RATIO_LIMIT = 20.0
"""exp(20) is 5e8: large enough to show an error, and finite in float32 sums."""


def training_signal(
    *,
    trainer_N: torch.Tensor,
    server_N: torch.Tensor,
    clip_epsilon: float,
    reference_N: torch.Tensor | None = None,
    entropy_N: torch.Tensor | None = None,
) -> dict[str, float]:
    """Compare the trainer's log-probs of sampled tokens with those that the server recorded.

    Args:
        trainer_N: float; log-probs under the trainer's model before the update.
        server_N: float; log-probs recorded while sampling.
        clip_epsilon: importance ratios outside ``1 +- clip_epsilon`` count as clipped.
        reference_N: float; log-probs under a reference model.
        entropy_N: float; entropy of the trainer's distribution at each token, in nats.

    Returns:
        ``logprob_gap_mean`` and ``_max`` (nats); of the importance ratio trainer / server ``ratio_mean``,
        ``ratio_max``, ``ess`` (effective sample size as a fraction of N) and ``clip_fraction``; ``kl_behaviour_k1`` and
        ``_k3``; with a reference ``kl_reference_k1`` and ``_k3``; with entropies ``entropy``. NaN without tokens.

    Examples:
        >>> same = torch.tensor([-1.0, -2.0])
        >>> signal = training_signal(trainer_N=same, server_N=same, clip_epsilon=0.2)
        >>> signal["logprob_gap_max"], signal["ess"], signal["clip_fraction"]
        (0.0, 1.0, 0.0)
    """
    trainer_N, server_N = trainer_N.detach().double(), server_N.detach().double()
    log_ratio_N = (trainer_N - server_N).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    ratio_N, gap_N = log_ratio_N.exp(), (trainer_N - server_N).abs()
    k1, k3 = kl_estimates(log_sampled_N=server_N, log_other_N=trainer_N)
    found = {
        "logprob_gap_mean": _mean(gap_N),
        "logprob_gap_max": _max(gap_N),
        "ratio_mean": _mean(ratio_N),
        "ratio_max": _max(ratio_N),
        "ess": effective_sample_size(ratio_N),
        "clip_fraction": _mean(((ratio_N - 1).abs() > clip_epsilon).double()),
        "kl_behaviour_k1": k1,
        "kl_behaviour_k3": k3,
    }
    if reference_N is not None:
        k1, k3 = kl_estimates(log_sampled_N=trainer_N, log_other_N=reference_N.detach().double())
        found |= {"kl_reference_k1": k1, "kl_reference_k3": k3}
    if entropy_N is not None:
        found["entropy"] = _mean(entropy_N.detach().double())
    return found


def kl_estimates(*, log_sampled_N: torch.Tensor, log_other_N: torch.Tensor) -> tuple[float, float]:
    """Two estimates of KL(sampled || other) in nats per token, from tokens drawn from ``sampled``.

    Args:
        log_sampled_N: float; log-probs under the distribution that the tokens were drawn from.
        log_other_N: float; log-probs of the same tokens under the other distribution.

    Returns:
        ``k1``, the mean of the log-ratio: unbiased, may be negative; ``k3``, the mean of ``r - 1 - log r`` with
        ``r = other / sampled``: unbiased, never negative, lower variance (Schulman, 2020).

    Examples:
        >>> p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
        >>> drawn = [0, 0, 0, 1]
        >>> k1, k3 = kl_estimates(log_sampled_N=p[drawn], log_other_N=q[drawn])
        >>> exact = float((p.exp() * (p - q)).sum())
        >>> abs(k1 - exact) < 1e-6, abs(k3 - exact) < 1e-6
        (True, True)
    """
    log_ratio_N = (log_other_N - log_sampled_N).detach().clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return _mean(-log_ratio_N), _mean(log_ratio_N.exp() - 1 - log_ratio_N)


def effective_sample_size(weights_N: torch.Tensor) -> float:
    """Kish's effective sample size as a fraction of N: 1 if all weights are equal, 1/N if one dominates.

    Examples:
        >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        0.5
    """
    if weights_N.numel() == 0:
        return float("nan")
    weights_N = weights_N.detach().double()
    return float(weights_N.sum() ** 2 / (weights_N.square().sum() * weights_N.numel()))


def staleness_histogram(version_N: torch.Tensor, current_version: int) -> dict[int, int]:
    """Count tokens by the age of the weights that sampled them, in versions.

    Args:
        version_N: int64; the weight version of every token (:attr:`Generation.weight_version`).
        current_version: version of the weights being trained.

    Returns:
        Age to number of tokens, in ascending order. Tokens of unknown version (-1) are left out.

    Examples:
        >>> staleness_histogram(torch.tensor([3, 3, 4, 5, -1]), current_version=5)
        {0: 1, 1: 1, 2: 2}
    """
    lag_N = current_version - version_N[version_N >= 0]
    lags, counts = torch.unique(lag_N, return_counts=True)
    return dict(zip(lags.tolist(), counts.tolist(), strict=True))


def staleness_text(histogram: dict[int, int]) -> str:
    """Format a histogram as one field of a table.

    Examples:
        >>> staleness_text({0: 12, 2: 3})
        '0:12 2:3'
    """
    return " ".join(f"{lag}:{count}" for lag, count in histogram.items())


def _mean(values_N: torch.Tensor) -> float:
    return float(values_N.mean())


def _max(values_N: torch.Tensor) -> float:
    return float(values_N.max()) if values_N.numel() else float("nan")
