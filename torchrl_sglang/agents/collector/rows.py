"""Runs as rows of a TensorDict: one row per trajectory, with the keys of TorchRL's LLM losses.

Shapes: ``B`` rows; ``P`` tokens of one row's prompt, ``R`` of its response, ``T = P + R``. Ragged: one tensor per row.
"""

from __future__ import annotations

import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase

from torchrl_sglang.agents.collector.advantages import rewards_are_equal
from torchrl_sglang.agents.collector.rewards import Reward
from torchrl_sglang.agents.collector.task_texts import task_label
from torchrl_sglang.agents.given_values import as_reward
from torchrl_sglang.agents.types import Trajectory
from torchrl_sglang.rollout.tensorclasses import sampled_row, stack_rows

__all__ = ["Group", "Role", "RowReward", "Run", "make_batch", "make_run", "trained_trajectories"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One finished run of an agent.

    Attributes:
        session: id of its session.
        reward: its reward.
        trajectories: those that have sampled tokens of their own.
        rewards: the reward of each of them; empty: that of the run.
        roles: which part each of them played; empty: the same.
    """

    session: str
    reward: Reward
    trajectories: Sequence[Trajectory]
    rewards: Sequence[float] = ()
    roles: Sequence[str] = ()

    def rows(self) -> list[tuple[Trajectory, float, str]]:
        """Each trajectory with its reward and its role."""
        count = len(self.trajectories)
        rewards, roles = self.rewards or [self.reward.value] * count, self.roles or [""] * count
        return list(zip(self.trajectories, rewards, roles, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All runs of one task.

    Attributes:
        number: number of the task.
        task: the task.
        runs: its runs, in their order.
        position: the task's place in its data set; ``None`` is its own ``"position"``, else its number.
    """

    number: int
    task: Any
    runs: Sequence[Run]
    position: Any = None

    @property
    def num_rows(self) -> int:
        """Number of trajectories."""
        return sum(len(run.trajectories) for run in self.runs)

    def has_equal_rewards(self) -> bool:
        """Whether no row's reward differs from that of another run's row of the same role: all advantages are 0."""
        of_role: dict[str, list[float]] = {}
        runs_with: Counter[str] = Counter()
        for run in self.runs:
            rows = run.rows()
            runs_with.update({role for _, _, role in rows})
            for _, reward, role in rows:
                of_role.setdefault(role, []).append(reward)
        return all(runs_with[role] < 2 or rewards_are_equal(rewards) for role, rewards in of_role.items())

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


RowReward = Callable[[Trajectory], Any]
"""The reward of one trajectory; it has the run's reward, info and tags."""
Role = Callable[[Trajectory], str]
"""Which part a trajectory played in its run: rewards are compared within a role."""


def make_run(
    session: str,
    trajectories: Sequence[Trajectory],
    reward: Reward,
    *,
    row_reward: RowReward | None = None,
    role: Role | None = None,
) -> Run:
    """A run of trajectories, each with its own reward and role where that is asked for.

    Raises:
        ConfigError: ``row_reward`` gave no finite number.
    """
    return Run(
        session=session,
        reward=reward,
        trajectories=trajectories,
        rewards=() if row_reward is None else [as_reward(row_reward(one)) for one in trajectories],
        roles=() if role is None else [str(role(one)) for one in trajectories],
    )


def make_batch(groups: Sequence[Group], *, decode: Callable[[Sequence[int]], str]) -> TensorDictBase:
    """All trajectories of complete groups, group by group and run by run.

    The prompt of a row ends before its first token that is trained on, so what earlier rows of the session have is in
    the prompt of later ones. The response has sampled tokens and, between them, those of tools and of the template.
    ``masks.all_assistant_mask`` marks the sampled ones. Log-probs are NaN everywhere else, where TorchRL's losses
    leave them out; ``generation.weight_version`` is -1 there, and so is ``turn``, the number
    of the answer in its conversation. ``images`` has the URLs of a row's images, as JSON.

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
            of_run = {**about, "member": torch.tensor(member)}
            rows += [
                TensorDict({**_sequence(one, decode), **of_run, **_reward(reward, run.reward.info, role)})
                for one, reward, role in run.rows()
            ]
    has_right = all(row.get(("next", "right"), None) is not None for row in rows)
    if not has_right:
        rows = [row.exclude(("next", "right")) for row in rows]
    return stack_rows(rows, (len(rows),))


def _position(group: Group) -> int:
    position = group.position
    if position is None and hasattr(group.task, "get"):
        position = group.task.get("position")
    try:
        return operator.index(position)
    except TypeError:
        return group.number


def _reward(reward: float, info: Mapping[str, Any], role: str) -> dict[str, Any]:
    right = info.get("right")
    no = torch.zeros(1, dtype=torch.bool)
    following: dict[str, Any] = {
        "reward": torch.tensor([[reward]], dtype=torch.float32),
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
        "info": NonTensorData(dict(info)),
        "role": NonTensorData(role),
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
        "turn": torch.tensor(_turns(trajectory), dtype=torch.long),
        "session": NonTensorData(trajectory.session),
        "images": NonTensorData(json.dumps(trajectory.images)),
        "messages": NonTensorData(json.dumps(trajectory.messages, ensure_ascii=False, default=str)),
    }


def _turns(trajectory: Trajectory) -> list[int]:
    """For each token that is trained on the number of its answer in the conversation, else -1."""
    turn, found = -1, []
    starts = set(trajectory.turn_starts)
    for index, own in enumerate(trajectory.own_mask):
        turn += index in starts
        found.append(turn if own else -1)
    return found


def _temperature(trajectory: Trajectory) -> float:
    """The one temperature of all tokens that are trained on, else NaN."""
    used = {t for t, own in zip(trajectory.temperatures, trajectory.own_mask, strict=True) if own}
    return used.pop() if len(used) == 1 else math.nan
