"""``Batcher``: merges calls that several threads make at the same time into one batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torchrl_sglang.forks import renew_in_forked_children

__all__ = ["Batcher"]

Item = TypeVar("Item")
Result = TypeVar("Result")


_QUIET_S = 0.01
_MAX_QUIET_S = 0.1


@dataclass(eq=False, slots=True)
class _Call(Generic[Item, Result]):
    kind: Hashable
    items: Sequence[Item]
    run: Callable[[Sequence[Item]], Sequence[Result]]
    deadline: float
    since: float = field(default_factory=time.monotonic)
    future: Future[Sequence[Result]] = field(default_factory=Future)


class Batcher(Generic[Item, Result]):
    """Collects items of calls made at the same time and runs them as one batch.

    The batcher has no thread: one of the callers in a batch runs it for all. Batches run concurrently, since a server
    processes several requests at once. A batch starts when ``min_items`` have arrived and no further call has come for
    10 ms (threads that call together don't arrive together), or when ``max_items`` have arrived, or ``wait_s`` after
    its first call.

    Args:
        min_items: start when this many items have arrived.
        max_items: most items in one batch; a single call with more runs alone. ``None`` is no limit.
        wait_s: longest time a call waits for ``min_items``, in seconds.

    Examples:
        >>> batcher = Batcher(min_items=1)
        >>> batcher.submit([1, 2], lambda items: [10 * i for i in items])
        [10, 20]
    """

    def __init__(self, *, min_items: int = 1, max_items: int | None = None, wait_s: float = 10.0) -> None:
        self.min_items = min_items
        self.max_items = max_items
        self.wait_s = wait_s
        self._begin()
        renew_in_forked_children(self)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[_Call[Item, Result]] = []
        self._num_running = 0

    def renew_after_fork(self) -> None:
        """Forget the parent's calls, which wait in threads that only it has; called in a forked child."""
        self._begin()

    def submit(
        self, items: Sequence[Item], run: Callable[[Sequence[Item]], Sequence[Result]], *, kind: Hashable = None
    ) -> Sequence[Result]:
        """Run ``items`` together with those of other callers of the same ``kind`` and return this call's results.

        Args:
            items: what to run.
            run: takes items and returns one result per item, in order; called from several threads at once. Calls of
                one kind must pass equivalent ones.
            kind: only calls with equal kinds share a batch.

        Raises:
            CancelledError: :meth:`cancel` was called while this call waited.
        """
        call = _Call(kind, items, run, time.monotonic() + self.wait_s)
        with self._changed:
            self._queue.append(call)
            try:
                self._wait_and_lead(call)
            except BaseException:  # e.g. Ctrl-C: the caller no longer waits for these results
                if call in self._queue:
                    self._queue.remove(call)
                    self._changed.notify_all()
                raise
        return call.future.result()

    def _wait_and_lead(self, call: _Call[Item, Result]) -> None:
        """Wait until ``call`` is in a running batch, and run that batch if this caller is the first to see it ready.

        Called with the lock held.
        """
        while call in self._queue:
            ready_in = self._ready_in(call.kind)
            if ready_in > 0:
                self._changed.wait(ready_in)
            elif call in (batch := self._next_batch(call.kind)):
                self._lead(batch)
            else:  # one of the batch's callers runs it; this call is in a later batch
                self._changed.notify_all()
                self._changed.wait()

    def _ready_in(self, kind: Hashable) -> float:
        """Seconds until the next batch of this kind may start."""
        calls = [call for call in self._queue if call.kind == kind]
        arrived = sum(len(call.items) for call in calls)
        if self.max_items is not None and arrived >= self.max_items:
            return 0.0
        start = calls[0].deadline
        if arrived >= self.min_items:
            start = min(start, calls[-1].since + _QUIET_S, calls[0].since + _MAX_QUIET_S)
        return start - time.monotonic()

    def _lead(self, batch: Sequence[_Call[Item, Result]]) -> None:
        """Run one batch; called with the lock held, which is released while the batch runs."""
        self._queue = [call for call in self._queue if call not in batch]
        self._num_running += 1
        self._changed.notify_all()  # wakes the batch's callers
        self._changed.release()
        try:
            self._run(batch)
        finally:
            self._changed.acquire()
            self._num_running -= 1

    @staticmethod
    def _run(batch: Sequence[_Call[Item, Result]]) -> None:
        items = [item for call in batch for item in call.items]
        try:
            results = batch[0].run(items)
            if len(results) != len(items):
                raise RuntimeError(f"a batch of {len(items)} items gave {len(results)} results")
        except BaseException as error:  # noqa: BLE001 -- every caller of the batch raises it
            for call in batch:
                call.future.set_exception(error)
            return
        start = 0
        for call in batch:
            call.future.set_result(results[start : start + len(call.items)])
            start += len(call.items)

    def _next_batch(self, kind: Hashable) -> list[_Call[Item, Result]]:
        arrived = 0
        batch: list[_Call[Item, Result]] = []
        for call in self._queue:
            if call.kind != kind:
                continue
            if batch and self.max_items is not None and arrived + len(call.items) > self.max_items:
                break
            batch.append(call)
            arrived += len(call.items)
        return batch

    def cancel(self) -> None:
        """End every waiting call with :class:`~concurrent.futures.CancelledError`."""
        with self._changed:
            for call in self._queue:
                call.future.set_exception(CancelledError("the batch was cancelled by cleanup_batching()"))
            self._queue.clear()
            self._changed.notify_all()

    def flush(self) -> None:
        """Let every waiting call run now, without waiting for more calls."""
        with self._changed:
            for call in self._queue:
                call.deadline = 0.0
            self._changed.notify_all()

    @property
    def state(self) -> dict[str, int | bool]:
        """Number of waiting items and calls, and whether a batch runs."""
        with self._changed:
            waiting = sum(len(call.items) for call in self._queue)
            return {"queue_size": waiting, "pending_futures": len(self._queue), "processing": self._num_running > 0}
