"""Collect rollouts in a thread while the trainer trains, at most a given number of batches ahead."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType

from tensordict import TensorDictBase

from torchrl_sglang.config.checking import require_number
from torchrl_sglang.errors import ServerTimeoutError
from torchrl_sglang.parallel import Task

__all__ = ["BackgroundRollouts"]


class BackgroundRollouts:
    """Iterates a collector in a background thread; a ``with`` block.

    The thread starts a batch whenever fewer than ``ahead`` batches are finished or in progress beyond those that the
    trainer has taken. So generation waits for training only if a batch would otherwise be older than ``ahead`` updates
    when it is trained on. Requests in flight during a weight update are handled as the scheme's ``pause`` says.

    Args:
        batches: the collector, or any iterable of batches.
        ahead: batches beyond the one being trained on; 0 collects only while the trainer waits, which is synchronous
            training.
        timeout_s: maximum time that :meth:`take` waits; longer than the time-out of a generate request (1,800 s), so
            that its error, which says more, comes first.

    Raises:
        ConfigError: ``ahead`` is negative.

    Attributes:
        collect_s: seconds that the thread needed to collect the batch taken last.

    Examples:
        >>> with BackgroundRollouts(iter([1, 2, 3]), ahead=1) as rollouts:
        ...     rollouts.take(), rollouts.take()
        (1, 2)
    """

    def __init__(self, batches: Iterable[TensorDictBase], *, ahead: int, timeout_s: float = 3600.0) -> None:
        require_number("ahead", ahead, whole=True, at_least=0)
        require_number("timeout_s", timeout_s, above=0)
        self.ahead = ahead
        self.timeout_s = timeout_s
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
        """Return the oldest finished batch; wait for one if there is none.

        Raises:
            StopIteration: the collector has no more batches.
            ServerTimeoutError: no batch was finished within ``timeout_s``.
            Exception: the error that ended the collecting thread.
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
        """Wait at most ``wait_s`` for the batch in progress, and collect no more; errors of that batch are ignored."""
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
        """Wait until another batch may start; ``False`` after :meth:`close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._started - self._taken < max(self.ahead, self._wanted))
            self._started += 1
            return not self._stopped

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
