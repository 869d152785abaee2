"""The sampling mask: which ids top-k, top-p and min-p leave, reported per token so that log-probs are exact."""

from __future__ import annotations

import warnings
from dataclasses import replace

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError

__all__ = ["warn_of_truncation", "with_sampling_mask"]

_MOST_IN_MASK = 4096  # SGLang's own default of --sampling-mask-max-tokens (0.5.23)


def with_sampling_mask(sampling: SamplingParams, vocab_size: int | None) -> SamplingParams:
    """Request the ids that truncation leaves, if these parameters truncate.

    Raises:
        ConfigError: SGLang can't report so many ids.
    """
    if not sampling.truncates:
        return sampling
    if sampling.top_k == -1 and vocab_size is not None and vocab_size <= _MOST_IN_MASK:
        sampling = replace(sampling, top_k=vocab_size)  # removes no token, and makes the mask finite
    if not 1 <= sampling.top_k <= _MOST_IN_MASK:
        raise ConfigError(
            f"exact_log_probs needs a finite top_k of at most {_MOST_IN_MASK} with top_p or min_p, since SGLang "
            f"lists the ids that are left; got top_k={sampling.top_k} with a vocabulary of {vocab_size}. "
            "Add top_k, or record the log-probs before truncation (exact_log_probs=False)"
        )
    return replace(sampling, sampling_mask=True)


def warn_of_truncation() -> None:
    """Warn that recorded log-probs are those before truncation; Python shows it once per program."""
    warnings.warn(
        "top-p, top-k or min-p truncate the distribution that tokens are drawn from, but the recorded log-probs are "
        "those before truncation (Generation.exact_log_probs is False): importance ratios against a trainer that does "
        "not truncate are consistent, but the data is off-policy. exact_log_probs=True records the exact log-probs",
        stacklevel=4,
    )
