"""``trajectories_to_batch``: sessions that someone else has run, as the batch that an ``AgentCollector`` yields."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from tensordict import TensorDictBase

from torchrl_sglang.agents.collector.rewards import Reward
from torchrl_sglang.agents.collector.rows import Group, Role, RowReward, Run, make_batch, make_run, trained_trajectories
from torchrl_sglang.agents.types import Trajectory
from torchrl_sglang.errors import ConfigError

__all__ = ["trajectories_to_batch"]

_SHOWN = 5
_LARGEST = 2**63 - 1
"""Of int64."""


def trajectories_to_batch(
    trajectories: Iterable[Trajectory | Mapping[str, Any]],
    *,
    tokenizer: Any,
    group_by: str | Callable[[Trajectory], Hashable] = "group_id",
    row_reward: RowReward | None = None,
    role: Role | None = None,
) -> TensorDictBase:
    """Make a batch of finished sessions: one row per trajectory, for TorchRL's losses and the recipes.

    For agents that are run by someone else, such as an evaluation harness or jobs of a cluster: the trainer reads
    ``GET /sessions/ID/trajectories``, or a file of such answers.

    Args:
        trajectories: all trajectories of each session, once and in their order: what ``gateway.trajectories(id)``
            returns, or its JSON, of several sessions one after the other.
        tokenizer: the model's tokenizer, for the texts.
        group_by: which sessions are compared: those with the same value of this tag, which the session was created
            with, or of this function of a trajectory.
        row_reward: as in :class:`AgentCollector`.
        role: as in :class:`AgentCollector`.

    Returns:
        As :class:`AgentCollector` yields, shape ``(B,)``, group by group in the order of their first sessions.
        ``group_id`` is the tag where all are whole numbers of 64 bits, else the number of the group. ``query`` is the
        tag ``"task"``, or all tags; ``position`` the tag ``"position"``.

    Raises:
        ConfigError: a session has no reward, has expired, has sampled nothing, is not there as a whole, or lacks the
            tag; or something is no trajectory.

    Examples:
        >>> sessions = gateway.list_sessions("finished")                                        # doctest: +SKIP
        >>> found = [leaf for session in sessions for leaf in gateway.trajectories(session.id)] # doctest: +SKIP
        >>> batch = group_advantages(trajectories_to_batch(found, tokenizer=tokenizer))         # doctest: +SKIP
    """
    sessions: dict[str, list[Trajectory]] = {}
    for each in trajectories:
        one = each if isinstance(each, Trajectory) else Trajectory.from_json(each)
        sessions.setdefault(one.session, []).append(one)
    if not sessions:
        raise ConfigError("there is no trajectory: nothing was given to make a batch of")
    _check(sessions)
    runs: dict[Hashable, list[tuple[Run, Mapping[str, Any]]]] = {}
    for session, leaves in sessions.items():
        first = leaves[0]
        assert first.reward is not None
        reward = Reward(value=first.reward, info=first.info)
        run = make_run(session, trained_trajectories(leaves), reward, row_reward=row_reward, role=role)
        runs.setdefault(_group(first, group_by), []).append((run, first.tags))
    numbers = [key for key in runs if isinstance(key, int) and not isinstance(key, bool) and abs(key) <= _LARGEST]
    if len(numbers) < len(runs):
        numbers = list(range(len(runs)))
    groups = [
        Group(
            number=number,
            task=tags.get("task", tags),
            position=tags.get("position"),
            runs=[run for run, _ in members],
        )
        for number, members in zip(numbers, runs.values(), strict=True)
        for _, tags in members[:1]
    ]
    return make_batch(groups, decode=tokenizer.decode)


def _check(sessions: Mapping[str, Sequence[Trajectory]]) -> None:
    """Refuse what must not be trained on by accident."""
    problems: dict[str, Callable[[Sequence[Trajectory]], bool]] = {
        "expired, since its agent was silent for too long": lambda leaves: leaves[0].status == "expired",
        "has no reward yet": lambda leaves: leaves[0].reward is None,
        "is not there as a whole: give all its trajectories, in their order": _is_partial,
        "has sampled nothing": lambda leaves: not trained_trajectories(leaves),
    }
    for problem, is_so in problems.items():
        found = [session for session, leaves in sessions.items() if is_so(leaves)]
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ConfigError(
                f"session {', '.join(found[:_SHOWN])}{more} {problem}; leave it out of the batch, with its group if "
                "too few others are left"
            )


def _is_partial(leaves: Sequence[Trajectory]) -> bool:
    """Whether a trajectory shares tokens with one that is not before it."""
    for index, leaf in enumerate(leaves):
        start = leaf.token_ids[: leaf.shared_tokens]
        if start and all(earlier.token_ids[: leaf.shared_tokens] != start for earlier in leaves[:index]):
            return True
    return False


def _group(trajectory: Trajectory, group_by: str | Callable[[Trajectory], Hashable]) -> Hashable:
    if callable(group_by):
        return group_by(trajectory)
    try:
        value: Hashable = trajectory.tags[group_by]
        hash(value)
    except (KeyError, TypeError) as error:
        what = "has no tag" if isinstance(error, KeyError) else "has a list or an object as its tag"
        raise ConfigError(
            f"session {trajectory.session} {what} {group_by!r}, which says with which sessions it is compared: make "
            f"sessions with tags={{{group_by!r}: NUMBER}}, or give group_by as another tag's name or a function"
        ) from error
    return value
