"""Runs the agents of groups side by side, and replaces groups that give nothing to train on. In one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.agents.collector.clean_up import until_done
from torchrl_sglang.agents.collector.failures import Counts, RunFailure, SkipReason
from torchrl_sglang.agents.collector.rows import Group, Run
from torchrl_sglang.agents.collector.task_stream import NumberedTask, TaskStream
from torchrl_sglang.errors import AgentsFailedError, ConfigError

__all__ = ["GroupSettings", "Groups"]

_log = logging.getLogger(__name__)

_KEPT_FAILURES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """How groups are run.

    Attributes:
        group_size: runs of each task.
        groups_per_batch: groups of a batch.
        concurrency: most runs at a time.
        retries: how often a failed run is run again before its group fails.
        skip_equal: whether groups with equal rewards are replaced.
        max_skips: most groups that are replaced one after the other.
        max_failures: most groups that fail one after the other.
        ahead: batches that are run beyond those taken.
        max_staleness: most weight updates since a group's oldest token was sampled.
    """

    group_size: int
    groups_per_batch: int
    concurrency: int
    retries: int
    skip_equal: bool
    max_skips: int
    max_failures: int
    ahead: int
    max_staleness: int | None


RunOnce = Callable[[NumberedTask, int], Any]
"""Runs an agent once for a task, as the member of this number; awaited, it gives a :class:`Run` or a failure."""


class _Place:
    """The place of one group in a batch. Groups keep their order, so a slow one is not overtaken for ever."""

    __slots__ = ("group", "work")

    def __init__(self) -> None:
        self.group: Group | None = None
        self.work: asyncio.Task[None] | None = None


class Groups:
    """The groups that are under way, and those that wait to be taken.

    A batch is started when fewer than ``ahead`` batches are finished or under way beyond those taken, or when someone
    waits for it: without ``ahead`` nothing runs while the trainer trains. So a group's tokens are at most ``ahead``
    updates old, if there is one update per batch.

    Args:
        run_once: runs an agent.
        tasks: the tasks.
        settings: how groups are run.
        weight_version: the version of the weights on the servers.

    Attributes:
        counts: numbers since the beginning.
        failures: the latest runs that failed.
    """

    def __init__(
        self, run_once: RunOnce, tasks: TaskStream, settings: GroupSettings, *, weight_version: Callable[[], int]
    ) -> None:
        self.counts = Counts()
        self.failures: deque[RunFailure] = deque(maxlen=_KEPT_FAILURES)
        self._run_once = run_once
        self._tasks = tasks
        self._settings = settings
        self._weight_version = weight_version
        self._places: deque[_Place] = deque()
        self._changed = asyncio.Event()
        self._free = asyncio.Semaphore(settings.concurrency)
        self._is_wanted = False
        self._is_exhausted = False
        self._skipped_in_a_row: list[str] = []
        self._error: BaseException | None = None

    async def take(self) -> list[Group]:
        """The groups of the next batch; fewer at the end of the tasks, none after it.

        Raises:
            ConfigError: there is no task at all.
            AgentsFailedError: ``max_skips`` groups one after the other were replaced, ``max_failures`` failed, or all
                tasks gave no good group.
        """
        self._is_wanted = True
        try:
            while True:
                self._start()
                if self._error is not None:
                    raise self._error
                ready = self._first()
                if ready is not None and not self._drop_stale(ready):
                    return self._deliver(ready)
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._is_wanted = False

    async def close(self) -> None:
        """Give up everything that is under way, and wait until its sessions and processes are gone."""
        work = [place.work for place in self._places if place.work is not None]
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        self._places.clear()

    # ------------------------------------------------------------------ places

    def _start(self) -> None:
        batches = max(self._settings.ahead, int(self._is_wanted))
        while len(self._places) < batches * self._settings.groups_per_batch and not self._is_exhausted:
            place = _Place()
            self._places.append(place)
            self._fill(place)

    def _fill(self, place: _Place) -> None:
        place.group = None
        place.work = asyncio.get_running_loop().create_task(self._find_group(place))
        place.work.add_done_callback(self._noted)

    def _noted(self, work: asyncio.Task[None]) -> None:
        if not work.cancelled() and work.exception() is not None:
            self._error = work.exception()
        self._changed.set()

    def _first(self) -> list[_Place] | None:
        """The places of the next batch, when all of them are done."""
        first = [self._places[index] for index in range(min(self._settings.groups_per_batch, len(self._places)))]
        is_whole = len(first) == self._settings.groups_per_batch or self._is_exhausted
        return first if is_whole and all(place.group is not None for place in first) else None

    def _deliver(self, ready: Sequence[_Place]) -> list[Group]:
        if not ready and not self._tasks.has_given:
            raise ConfigError(
                "tasks gave nothing: it is an iterator that has no task, or has been used up before. Give a list, or a "
                "new iterator"
            )
        if not ready and not self.counts.groups and self._skipped_in_a_row:
            raise self._failed(f"all {len(self._skipped_in_a_row)} tasks were tried, and none gave a group to train on")
        groups = []
        for place in ready:
            self._places.popleft()
            assert place.group is not None
            self._tasks.done(place.group.number)
            groups.append(place.group)
        self._skipped_in_a_row.clear()
        self._is_wanted = False
        self._start()
        self.counts.groups += len(groups)
        return groups

    def _drop_stale(self, ready: Sequence[_Place]) -> bool:
        """Replace groups that are too old; whether there were some."""
        limit, now = self._settings.max_staleness, self._weight_version()
        stale = []
        for place in ready if limit is not None else ():
            assert place.group is not None
            assert limit is not None
            oldest = place.group.oldest_version()
            if oldest is not None and now - oldest > limit:
                stale.append(place)
                self._skip("stale", place.group.number, f"its oldest token is {now - oldest} updates old")
        for place in stale:
            self._fill(place)
        return bool(stale)

    # ------------------------------------------------------------------ groups

    async def _find_group(self, place: _Place) -> None:
        """Run tasks until one gives a group to train on."""
        while self._error is None:
            task = self._tasks.take()
            if task is None:
                self._is_exhausted = True
                with contextlib.suppress(ValueError):
                    self._places.remove(place)
                return
            group = await self._run_group(task)
            if isinstance(group, RunFailure):
                self._skip("failed", task.number, str(group))
            elif self._settings.skip_equal and group.has_equal_rewards():
                self._skip("equal", task.number, f"all rewards are {group.runs[0].reward.value:g}")
            else:
                # a group may still become too old while it waits to be taken
                self._skipped_in_a_row = [each for each in self._skipped_in_a_row if each.startswith("stale")]
                place.group = group
                return

    def _skip(self, reason: SkipReason, number: int, why: str) -> None:
        self.counts.skipped[reason] += 1
        self._tasks.done(number)
        self._skipped_in_a_row.append(f"{reason}: {why}")
        _log.info("the group of task %d is replaced: %s: %s", number, reason, why)
        latest = self._skipped_in_a_row[-self._settings.max_failures :]
        all_failed = len(latest) == self._settings.max_failures and all(each.startswith("failed") for each in latest)
        if all_failed or len(self._skipped_in_a_row) >= self._settings.max_skips:
            raise self._failed(f"{len(self._skipped_in_a_row)} groups one after the other gave nothing to train on")

    def _failed(self, what: str) -> AgentsFailedError:
        reasons = [line.partition(":")[0] for line in self._skipped_in_a_row]
        found = [f"{reasons.count(reason)} {text}" for reason, text in _REASONS.items() if reason in reasons]
        advice = " ".join(_ADVICE[reason] for reason in _REASONS if reason in reasons)
        last = self._skipped_in_a_row[-1] if self._skipped_in_a_row else "none"
        return AgentsFailedError(
            f"{what} ({', '.join(found)}). The last one: {last}. {advice}",
            failures=tuple(str(failure) for failure in self.failures),
        )

    async def _run_group(self, task: NumberedTask) -> Group | RunFailure:
        """Run a group's agents; after one that fails the others are given up."""
        members = [asyncio.ensure_future(self._run_member(task, index)) for index in range(self._settings.group_size)]
        try:
            for finished in asyncio.as_completed(members):
                result = await finished
                if isinstance(result, RunFailure):
                    return result
        finally:
            for member in members:
                member.cancel()
            await until_done(members)
        runs: list[Any] = [member.result() for member in members]
        return Group(number=task.number, task=task.task, runs=runs)

    async def _run_member(self, task: NumberedTask, index: int) -> Run | RunFailure:
        for attempt in range(self._settings.retries + 1):
            async with self._free:
                result: Run | RunFailure = await self._run_once(task, index)
            self.counts.runs += 1
            if isinstance(result, Run):
                return result
            self.counts.failed_runs[result.kind] += 1
            self.failures.append(result)
            _log.warning("%s (attempt %d of %d)", result, attempt + 1, self._settings.retries + 1)
        return result


_REASONS: dict[SkipReason, str] = {"failed": "failed", "equal": "had equal rewards", "stale": "were too old"}
_ADVICE: dict[SkipReason, str] = {
    "failed": "Correct the agent, or the limits of time and context under which it runs.",
    "equal": (
        "Equal rewards give no advantage: the tasks are too easy or too hard, the reward is too coarse, or the agent "
        "sets temperature=0, at which all runs are the same (SessionSettings.overrides replaces it); skip_equal=False "
        "keeps such groups."
    ),
    "stale": "Raise max_staleness, or lower ahead.",
}
