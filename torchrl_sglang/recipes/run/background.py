"""Rollouts beside training: a thread collects while the trainer trains, and never further ahead than is of use."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType

from tensordict import TensorDictBase

from torchrl_sglang.config.checking import require, require_positive
from torchrl_sglang.errors import ServerTimeoutError
from torchrl_sglang.parallel import Task

__all__ = ["BackgroundRollouts"]


class BackgroundRollouts:
    """Iterates a collector in a thread of its own; a ``with`` block.

    The thread starts the next batch as soon as fewer than ``ahead`` are finished or under way beyond those the trainer
    has taken. So generation never waits for a training step to end, unless what it would make would be older than
    ``ahead`` updates when it is trained on. Requests in flight go on over weight updates, as the scheme's ``pause``
    says.

    Args:
        batches: the collector, or anything that yields batches.
        ahead: batches beyond the one being trained on; 0 collects only while the trainer waits, which is synchronous
            training.
        timeout_s: longest that :meth:`take` waits.

    Raises:
        ConfigError: ``ahead`` is negative.

    Attributes:
        collect_s: seconds that collecting the batch taken last took, beside the trainer's own work.

    Examples:
        >>> with BackgroundRollouts(iter([1, 2, 3]), ahead=1) as rollouts:
        ...     rollouts.take(), rollouts.take()
        (1, 2)
    """

    def __init__(self, batches: Iterable[TensorDictBase], *, ahead: int, timeout_s: float = 600.0) -> None:
        require(ahead >= 0, f"ahead is a number of batches, got {ahead}")
        self.ahead = ahead
        self.timeout_s = timeout_s
        require_positive(self, "timeout_s")
        self._batches = batches
        self.collect_s = 0.0
        self._ready: deque[tuple[TensorDictBase, float]] = deque()
        self._changed = threading.Condition()
        self._started = 0
        self._taken = 0
        self._wanted = 0
        self._stopped = False
        self._task: Task[None] = Task(self._collect, name="rollouts", on_done=lambda task: self._wake())

    def take(self) -> TensorDictBase:
        """The oldest finished batch; waits for one if there is none.

        Raises:
            StopIteration: the collector has come to its end.
            ServerTimeoutError: none came within ``timeout_s``.
            The error that ended the collecting thread.
        """
        deadline = time.monotonic() + self.timeout_s
        with self._changed:
            self._wanted = 1
            self._changed.notify_all()
            while not self._ready and not self._task.done:
                if time.monotonic() > deadline:
                    raise ServerTimeoutError(f"no rollouts within {self.timeout_s:.0f} s; the collector still runs")
                self._changed.wait(1.0)
            self._wanted = 0
            if self._ready:
                self._taken += 1
                self._changed.notify_all()
                batch, self.collect_s = self._ready.popleft()
                return batch
        self._task.outcome().unwrap()
        raise StopIteration("the collector has no more batches")

    def close(self, wait_s: float = 30.0) -> None:
        """Let the batch under way end, at most ``wait_s`` long, and collect no more.

        What the thread may still fail with is of no interest any more.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._task.wait(wait_s)

    def __enter__(self) -> BackgroundRollouts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _collect(self) -> None:
        batches = iter(self._batches)
        while self._may_start():
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            with self._changed:
                self._ready.append((batch, time.perf_counter() - start))
                self._changed.notify_all()

    def _may_start(self) -> bool:
        """Wait until another batch is wanted; ``False`` when none ever will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._started - self._taken < max(self.ahead, self._wanted))
            self._started += 1
            return not self._stopped

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
