"""The lock of weight updates and restarts, which threads that work for its holder may enter too."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

__all__ = ["UpdateLock"]


class UpdateLock:
    """A re-entrant lock. An update that holds it checks and restarts servers in several threads of its own.

    Examples:
        >>> lock = UpdateLock()
        >>> with lock:
        ...     with lock.as_helper():  # in another thread, which the holder waits for
        ...         lock.acquire()
        True
        >>> with lock.held_for("a weight update"):
        ...     print(lock.holder)  # doctest: +ELLIPSIS
        a weight update, for 0 s (thread 'MainThread')
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._holders: list[tuple[str, float, str]] = []

    @contextmanager
    def as_helper(self) -> Iterator[None]:
        """Let this thread pass: it works for the holder, which waits for it."""
        before = self.is_helper
        self._thread.is_helper = True
        try:
            yield
        finally:
            self._thread.is_helper = before

    @property
    def is_helper(self) -> bool:
        """Whether this thread works for the holder."""
        return getattr(self._thread, "is_helper", False)

    @property
    def holder(self) -> str:
        """What the holder does, since when, and in which thread; for errors of those that wait."""
        holders = self._holders[:1]
        for purpose, since, thread in holders:
            return f"{purpose}, for {time.monotonic() - since:.0f} s (thread {thread!r})"
        return "nobody"

    @contextmanager
    def held_for(self, purpose: str, timeout_s: float | None = None) -> Iterator[None]:
        """Hold the lock in this block.

        Args:
            purpose: what it is held for, for :attr:`holder`.
            timeout_s: longest wait; ``None`` waits as long as it takes.

        Raises:
            TimeoutError: the lock was held by another thread all the time; says what for.
        """
        if not self.acquire(-1 if timeout_s is None else timeout_s, purpose):
            raise TimeoutError(self.holder)
        try:
            yield
        finally:
            self.release()

    def acquire(self, timeout: float = -1, purpose: str = "an update or a restart") -> bool:
        """Wait for the lock, at most ``timeout`` seconds (-1: as long as it takes); whether it is held now."""
        if self.is_helper:
            return True
        held = self._lock.acquire(timeout=timeout)
        if held:
            self._holders.append((purpose, time.monotonic(), threading.current_thread().name))
        return held

    def release(self) -> None:
        """Give it back."""
        if not self.is_helper:
            self._holders.pop()
            self._lock.release()

    def __enter__(self) -> UpdateLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()
