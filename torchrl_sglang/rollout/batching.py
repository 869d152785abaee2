"""Concurrent callers in one request: prompts of many threads are collected and generated together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["Batcher"]

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class _Call(Generic[Item, Result]):
    kind: Hashable
    items: Sequence[Item]
    run: Callable[[Sequence[Item]], Sequence[Result]]
    deadline: float
    future: Future[Sequence[Result]] = field(default_factory=Future)


class Batcher(Generic[Item, Result]):
    """Collects items of calls made at the same time and runs them as one batch.

    There is no thread of its own: among the waiting callers one leads, takes what has gathered and runs it; the next
    batch gathers meanwhile. A batch starts as soon as ``min_items`` have gathered, or ``wait_s`` after its first call.

    Args:
        min_items: start when this many items have gathered.
        max_items: most items in one batch; a single call with more runs alone. ``None`` is no limit.
        wait_s: longest time a call waits for company, in seconds.

    Examples:
        >>> batcher = Batcher(min_items=1)
        >>> batcher.submit([1, 2], lambda items: [10 * i for i in items])
        [10, 20]
    """

    def __init__(self, *, min_items: int = 1, max_items: int | None = None, wait_s: float = 10.0) -> None:
        self.min_items = min_items
        self.max_items = max_items
        self.wait_s = wait_s
        self._changed = threading.Condition()
        self._queue: list[_Call[Item, Result]] = []
        self._running = False

    def submit(
        self, items: Sequence[Item], run: Callable[[Sequence[Item]], Sequence[Result]], *, kind: Hashable = None
    ) -> Sequence[Result]:
        """Run ``items`` together with those of other callers of the same ``kind`` and return this call's results.

        Args:
            items: what to run.
            run: takes items and returns one result per item, in order. Calls of one kind must pass equivalent ones.
            kind: only calls with equal kinds share a batch.

        Raises:
            CancelledError: :meth:`cancel` was called meanwhile.
        """
        call = _Call(kind, items, run, time.monotonic() + self.wait_s)
        with self._changed:
            self._queue.append(call)
            self._changed.notify_all()
            while not call.future.done():
                if self._running:
                    self._changed.wait()
                    continue
                ready_in = self._ready_in()
                if ready_in > 0:
                    self._changed.wait(ready_in)
                    continue
                self._lead()
        return call.future.result()

    def _ready_in(self) -> float:
        """Seconds until the first batch may start."""
        first = self._queue[0]
        gathered = sum(len(call.items) for call in self._queue if call.kind == first.kind)
        return 0.0 if gathered >= self.min_items else first.deadline - time.monotonic()

    def _lead(self) -> None:
        """Run one batch; called with the lock held, which is released while the batch runs."""
        batch = self._take()
        self._running = True
        self._changed.release()
        error: BaseException | None = None
        results: Sequence[Result] = ()
        items = [item for call in batch for item in call.items]
        try:
            results = batch[0].run(items)
            if len(results) != len(items):
                raise RuntimeError(f"a batch of {len(items)} items gave {len(results)} results")
        except BaseException as raised:  # noqa: BLE001 -- belongs to every caller of the batch: each of them raises it
            error = raised
        finally:
            self._changed.acquire()
            self._running = False
            start = 0
            for call in batch:
                if error is not None:
                    call.future.set_exception(error)
                else:
                    call.future.set_result(results[start : start + len(call.items)])
                start += len(call.items)
            self._changed.notify_all()

    def _take(self) -> list[_Call[Item, Result]]:
        first, gathered = self._queue[0], 0
        taken: list[_Call[Item, Result]] = []
        for call in self._queue:
            if call.kind != first.kind:
                continue
            if taken and self.max_items is not None and gathered + len(call.items) > self.max_items:
                break
            taken.append(call)
            gathered += len(call.items)
        self._queue = [call for call in self._queue if call not in taken]
        return taken

    def cancel(self) -> None:
        """End every waiting call with :class:`~concurrent.futures.CancelledError`."""
        with self._changed:
            for call in self._queue:
                call.future.set_exception(CancelledError("the batch was given up by cleanup_batching()"))
            self._queue.clear()
            self._changed.notify_all()

    def flush(self) -> None:
        """Let every waiting call run now, without waiting for more company."""
        with self._changed:
            for call in self._queue:
                call.deadline = 0.0
            self._changed.notify_all()

    @property
    def state(self) -> dict[str, int | bool]:
        """How many calls and items wait, and whether a batch runs."""
        with self._changed:
            waiting = sum(len(call.items) for call in self._queue)
            return {"queue_size": waiting, "pending_futures": len(self._queue), "processing": self._running}
