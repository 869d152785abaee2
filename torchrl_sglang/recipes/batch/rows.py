"""Statistics of a batch of answers, for a row of ``metrics.csv``."""

from __future__ import annotations

from typing import Any

from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.batch.statistics import staleness_histogram, staleness_text

__all__ = ["batch_numbers"]


def batch_numbers(batch: Sequences, *, weight_version: int) -> dict[str, Any]:
    """Statistics of reward, length and token age.

    Args:
        batch: the answers of the step.
        weight_version: version of the weights that the step updates; a token's age is the difference to it.

    Returns:
        ``reward_mean``, ``reward_std``, ``right_rate``, ``response_tokens_mean``, ``truncated_fraction``,
        ``staleness_mean``, ``staleness_max``, and ``staleness_histogram`` as text (``age:tokens age:tokens``).
    """
    ages = staleness_histogram(batch.version_N, weight_version)
    known = sum(ages.values())
    return {
        "reward_mean": float(batch.reward_B.mean()),
        "reward_std": float(batch.reward_B.std()),
        "right_rate": float(batch.right_B.float().mean()),
        "response_tokens_mean": batch.num_tokens / len(batch),
        "truncated_fraction": float(batch.truncated_B.float().mean()),
        "staleness_mean": sum(age * count for age, count in ages.items()) / known if known else float("nan"),
        "staleness_max": max(ages, default=0),
        "staleness_histogram": staleness_text(ages),
    }
