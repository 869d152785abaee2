"""Advantages of runs relative to their group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from torchrl_sglang.errors import ConfigError

__all__ = ["group_advantages", "rewards_are_equal"]

_FLOAT32_EPS = 2.0**-23


def rewards_are_equal(rewards: Sequence[float]) -> bool:
    """Whether rewards differ by no more than the rounding of float32, in which they are trained on.

    Examples:
        >>> rewards_are_equal([0.7, 0.7, 0.1 + 0.6]), rewards_are_equal([0.7, 0.7001])
        (True, False)
    """
    return max(rewards) - min(rewards) <= 2 * _FLOAT32_EPS * max(abs(reward) for reward in rewards)


def group_advantages(batch: TensorDictBase, *, normalize: bool = True) -> TensorDictBase:
    """Write ``advantage``: a run's reward minus the mean of its group, divided by the group's standard deviation.

    Each run counts once in mean and deviation, however many trajectories it has, and all its trajectories get its
    advantage. TorchRL's ``MCAdvantage`` counts trajectories instead, and needs the same number of them in every group.
    Where all rewards of a group are equal, the advantage is exactly 0.

    Args:
        batch: what :class:`AgentCollector` yields, with complete groups.
        normalize: divide by the standard deviation.

    Returns:
        The same batch, with ``advantage``: float32 of shape ``(B, 1, 1)``.

    Raises:
        ConfigError: the batch lacks ``group_id``, ``session`` or the reward.
    """
    missing = [key for key in ("group_id", "session", ("next", "reward")) if batch.get(key, None) is None]
    if missing:
        raise ConfigError(f"the batch has no {missing}: it must be what an AgentCollector yields")
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(batch["group_id"].reshape(-1).tolist()):
        rows_of.setdefault(group, []).append(row)
    sessions, rewards_B = _texts(batch["session"]), batch["next", "reward"].reshape(-1)
    advantage_B = torch.zeros_like(rewards_B)
    for rows in rows_of.values():
        of_session = {sessions[row]: rewards_B[row] for row in rows}
        rewards_G = torch.stack(list(of_session.values()))
        if len(of_session) < 2 or rewards_are_equal(rewards_G.tolist()):
            continue
        scale = rewards_G.std() if normalize else 1.0
        for row in rows:
            advantage_B[row] = (rewards_B[row] - rewards_G.mean()) / scale
    batch.set("advantage", advantage_B.reshape(-1, 1, 1))
    return batch


def _texts(values: Any) -> list[str]:
    return list(values) if isinstance(values, (list, tuple)) else list(values.tolist())
