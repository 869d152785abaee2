"""Runs as rows of a TensorDict: one row per trajectory, with the keys of TorchRL's LLM losses.

Shapes: ``B`` rows; ``P`` tokens of one row's prompt, ``R`` of its response, ``T = P + R``. Ragged: one tensor per row.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase

from torchrl_sglang.agents.collector.rewards import Reward
from torchrl_sglang.agents.collector.task_texts import task_label
from torchrl_sglang.agents.types import Trajectory
from torchrl_sglang.rollout.tensorclasses import sampled_row, stack_rows

__all__ = ["Group", "Run", "make_batch", "trained_trajectories"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One finished run of an agent.

    Attributes:
        session: id of its session.
        reward: its reward.
        trajectories: those that have sampled tokens of their own.
    """

    session: str
    reward: Reward
    trajectories: Sequence[Trajectory]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All runs of one task.

    Attributes:
        number: number of the task.
        task: the task.
        runs: its runs, in their order.
    """

    number: int
    task: Any
    runs: Sequence[Run]

    @property
    def num_rows(self) -> int:
        """Number of trajectories."""
        return sum(len(run.trajectories) for run in self.runs)

    def oldest_version(self) -> int | None:
        """The oldest weights that sampled a token that is trained on; ``None`` if their version is unknown."""
        versions = [
            version
            for run in self.runs
            for trajectory in run.trajectories
            for version, own in zip(trajectory.weight_versions, trajectory.own_mask, strict=True)
            if own and version >= 0
        ]
        return min(versions, default=None)


def trained_trajectories(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Those with a sampled token that no earlier one has."""
    return [trajectory for trajectory in trajectories if any(trajectory.own_mask)]


def make_batch(groups: Sequence[Group], *, decode: Callable[[Sequence[int]], str]) -> TensorDictBase:
    """All trajectories of complete groups, group by group and run by run.

    The prompt of a row ends before its first token that is trained on, so what earlier rows of the session have is in
    the prompt of later ones. The response has sampled tokens and, between them, those of tools and of the template.
    ``masks.all_assistant_mask`` marks the sampled ones. Log-probs are NaN everywhere else, where TorchRL's losses
    leave them out; ``generation.weight_version`` is -1 there. ``images`` has the URLs of a row's images, as JSON.

    Args:
        groups: at least one.
        decode: the text of tokens.

    Returns:
        A lazily stacked, ragged TensorDict of shape ``(B,)``.
    """
    rows = []
    for group in groups:
        about = {
            "group_id": torch.tensor(group.number),
            "position": torch.tensor(_position(group)),
            "query": NonTensorData(task_label(group.task)),
        }
        for member, run in enumerate(group.runs):
            of_run = {**about, "member": torch.tensor(member), **_reward(run.reward)}
            rows += [TensorDict({**_sequence(one, decode), **of_run}) for one in run.trajectories]
    has_right = all(row.get(("next", "right"), None) is not None for row in rows)
    if not has_right:
        rows = [row.exclude(("next", "right")) for row in rows]
    return stack_rows(rows, (len(rows),))


def _position(group: Group) -> int:
    """The task's own position, else its number."""
    position = group.task.get("position") if hasattr(group.task, "get") else None
    try:
        return operator.index(position)
    except TypeError:
        return group.number


def _reward(reward: Reward) -> dict[str, Any]:
    right = reward.info.get("right")
    no = torch.zeros(1, dtype=torch.bool)
    following: dict[str, Any] = {
        "reward": torch.tensor([[reward.value]], dtype=torch.float32),
        "done": ~no,
        "terminated": ~no,
        "truncated": no.clone(),
    }
    if isinstance(right, bool):
        following["right"] = torch.tensor([[right]])
    return {
        "next": TensorDict(following),
        "done": no.clone(),
        "terminated": no.clone(),
        "truncated": no.clone(),
        "info": NonTensorData(dict(reward.info)),
    }


def _sequence(trajectory: Trajectory, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    trained_T = trajectory.own_mask
    start = trained_T.index(1)
    ids_T = list(trajectory.token_ids)
    fields = sampled_row(
        ids_T,
        prompt_length=start,
        trained_T=[bool(own) for own in trained_T],
        log_probs_T=[p if own else math.nan for p, own in zip(trajectory.log_probs, trained_T, strict=True)],
        versions_T=[v if own else -1 for v, own in zip(trajectory.weight_versions, trained_T, strict=True)],
        temperature=_temperature(trajectory),
        exact=trajectory.exact_log_probs,
        finish_reason="length" if trajectory.finish_reason == "length" else "stop",
        texts=(decode(ids_T[:start]), decode(ids_T[start:])),
    )
    return {
        **fields,
        "session": NonTensorData(trajectory.session),
        "images": NonTensorData(json.dumps(trajectory.images)),
        "messages": NonTensorData(json.dumps(trajectory.messages, ensure_ascii=False, default=str)),
    }


def _temperature(trajectory: Trajectory) -> float:
    """The one temperature of all tokens that are trained on, else NaN."""
    used = {t for t, own in zip(trajectory.temperatures, trajectory.own_mask, strict=True) if own}
    return used.pop() if len(used) == 1 else math.nan
