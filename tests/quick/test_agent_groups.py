"""The order of groups, and groups that become too old, without any agent."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from torchrl_sglang.agents.collector.failures import RunFailure
from torchrl_sglang.agents.collector.groups import Groups, GroupSettings
from torchrl_sglang.agents.collector.rewards import Reward
from torchrl_sglang.agents.collector.rows import Group, Run
from torchrl_sglang.agents.collector.task_stream import NumberedTask, TaskStream
from torchrl_sglang.agents.types import Trajectory
from torchrl_sglang.errors import AgentsFailedError


class Model:
    """Weights that are updated, and runs that a test lets end."""

    def __init__(self) -> None:
        self.version = 0
        self.held: dict[int, asyncio.Event] = {}
        self.started: list[int] = []

    async def run(self, task: NumberedTask, member: int) -> Run | RunFailure:
        self.started.append(task.number)
        version = self.version
        await asyncio.sleep(0)
        if task.number in self.held:
            await self.held[task.number].wait()
        if task.task == "fails":
            return RunFailure(kind="error", message="no", group_id=task.number, member=member)
        trajectory = Trajectory(
            token_ids=(1, 2, 3),
            loss_mask=(0, 1, 1),
            log_probs=(0.0, -1.0, -1.0),
            weight_versions=(-1, version, self.version),
            finish_reason="stop",
            messages=(),
            parent=None,
        )
        return Run(session=f"{task.number}-{member}", reward=Reward(value=float(member)), trajectories=[trajectory])


def make(model: Model, tasks: Any = range(100), **settings: Any) -> Groups:
    given: dict[str, Any] = {
        "group_size": 2,
        "groups_per_batch": 2,
        "concurrency": 8,
        "retries": 0,
        "skip_equal": True,
        "max_skips": 8,
        "max_failures": 8,
        "ahead": 0,
        "max_staleness": None,
        **settings,
    }
    return Groups(model.run, TaskStream(tasks), GroupSettings(**given), weight_version=lambda: model.version)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def numbers(groups: list[Group]) -> list[int]:
    return [group.number for group in groups]


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_with_one_update_per_batch_tokens_are_at_most_ahead_updates_old() -> None:
    async def train(ahead: int) -> list[int]:
        model = Model()
        groups, ages = make(model, ahead=ahead), []
        for _ in range(6):
            batch = await groups.take()
            ages.append(max(model.version - (group.oldest_version() or 0) for group in batch))
            await settle()  # training, while agents run on
            model.version += 1
        await groups.close()
        return ages

    async def check() -> None:
        assert await train(0) == [0] * 6
        for ahead in (1, 2, 3):
            ages = await train(ahead)
            assert max(ages) == ahead

    run(check())


def test_groups_keep_the_order_of_their_tasks_and_a_slow_one_is_waited_for() -> None:
    async def check() -> None:
        model = Model()
        model.held[1] = asyncio.Event()
        groups = make(model, ahead=2)
        taking = asyncio.ensure_future(groups.take())
        await settle()
        assert not taking.done()
        assert set(model.started) == {0, 1, 2, 3}, "the next batch is under way, and no other"
        model.held[1].set()
        assert numbers(await taking) == [0, 1]
        assert numbers(await groups.take()) == [2, 3]
        await groups.close()

    run(check())


def test_a_replaced_group_leaves_its_place_to_the_next_task() -> None:
    async def check() -> None:
        groups = make(Model(), ["a", "fails", "b", "fails", "c"])
        assert numbers(await groups.take()) == [0, 2]
        assert numbers(await groups.take()) == [4]
        assert await groups.take() == []
        assert groups.counts.skipped["failed"] == 2
        await groups.close()

    run(check())


def test_groups_that_are_too_old_are_replaced_when_they_are_taken() -> None:
    async def check() -> None:
        model = Model()
        groups = make(model, ahead=1, max_staleness=2)
        assert numbers(await groups.take()) == [0, 1]
        await settle()
        model.version = 2
        assert numbers(await groups.take()) == [2, 3], "two updates old, as they may be"
        await settle()
        model.version = 5
        batch = await groups.take()
        assert numbers(batch) == [6, 7]
        assert [group.oldest_version() for group in batch] == [5, 5]
        assert groups.counts.skipped["stale"] == 2
        await groups.close()

    run(check())


def test_collecting_ends_when_groups_are_always_too_old() -> None:
    async def check() -> None:
        class Restless(Model):
            async def run(self, task: NumberedTask, member: int) -> Run | RunFailure:
                made = await super().run(task, member)
                self.version += 1
                return made

        groups = make(Restless(), max_staleness=0, max_skips=6)
        with pytest.raises(AgentsFailedError, match="Raise max_staleness") as error:
            await groups.take()
        assert "were too old" in str(error.value)
        await groups.close()

    run(check())


def test_after_a_run_that_fails_the_others_of_its_group_are_given_up() -> None:
    async def check() -> None:
        cancelled: list[int] = []

        async def run_once(task: NumberedTask, member: int) -> RunFailure:
            if member == 1:
                return RunFailure(kind="error", message="no", group_id=task.number, member=member)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(member)
                raise
            raise AssertionError

        model = Model()
        model.run = run_once  # type: ignore[assignment]
        groups = make(model, group_size=4, max_failures=1)
        with pytest.raises(AgentsFailedError, match="run 1 of task"):
            await groups.take()
        await groups.close()
        assert sorted(set(cancelled)) == [0, 2, 3]

    run(check())
