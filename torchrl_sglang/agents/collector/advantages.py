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
    """Write ``advantage``: a row's reward minus the mean of its group, divided by the group's standard deviation.

    Each run counts once in mean and deviation, however many trajectories it has: where its rows have rewards of their
    own, each counts as its share of the run. Rows of different roles are not compared. TorchRL's ``MCAdvantage`` counts
    trajectories instead, and needs the same number of them in every group. Where all rewards that are compared are
    equal, or one run alone has them, the advantage is exactly 0.

    Args:
        batch: what :class:`AgentCollector` yields, or :func:`trajectories_to_batch` makes, with complete groups.
        normalize: divide by the standard deviation.

    Returns:
        The same batch, with ``advantage``: float32 of shape ``(B, 1, 1)``.

    Raises:
        ConfigError: the batch lacks ``group_id``, ``session`` or the reward.
    """
    missing = [key for key in ("group_id", "session", ("next", "reward")) if batch.get(key, None) is None]
    if missing:
        raise ConfigError(f"the batch has no {missing}: it must be what an AgentCollector yields")
    sessions, rewards_B = _texts(batch["session"]), batch["next", "reward"].reshape(-1)
    roles = [""] * len(sessions) if batch.get("role", None) is None else _texts(batch["role"])
    compared: dict[tuple[int, str], dict[str, list[int]]] = {}
    for row, (group, role) in enumerate(zip(batch["group_id"].reshape(-1).tolist(), roles, strict=True)):
        compared.setdefault((group, role), {}).setdefault(sessions[row], []).append(row)
    advantage_B = torch.zeros_like(rewards_B)
    for rows_of in compared.values():
        rows = [row for of_session in rows_of.values() for row in of_session]
        if len(rows_of) < 2 or rewards_are_equal(rewards_B[rows].tolist()):
            continue
        values = {session: rewards_B[of_session].double() for session, of_session in rows_of.items()}
        mean = torch.stack([of_run.mean() for of_run in values.values()]).mean()
        square = torch.stack([((of_run - mean) ** 2).mean() for of_run in values.values()]).sum() / (len(values) - 1)
        scale = square.sqrt() if normalize else 1.0
        advantage_B[rows] = ((rewards_B[rows].double() - mean) / scale).to(advantage_B.dtype)
    batch.set("advantage", advantage_B.reshape(-1, 1, 1))
    return batch


def _texts(values: Any) -> list[str]:
    return list(values) if isinstance(values, (list, tuple)) else list(values.tolist())
