"""The lock of weight updates and restarts, which threads that work for its holder may enter too."""

from __future__ import annotations

import threading
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
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._thread = threading.local()

    @contextmanager
    def as_helper(self) -> Iterator[None]:
        """Let this thread pass: it works for the holder, which waits for it."""
        before = self._is_helper
        self._thread.is_helper = True
        try:
            yield
        finally:
            self._thread.is_helper = before

    @property
    def _is_helper(self) -> bool:
        return getattr(self._thread, "is_helper", False)

    def acquire(self, timeout: float = -1) -> bool:
        """Wait for the lock, at most ``timeout`` seconds (-1: as long as it takes); whether it is held now."""
        return self._is_helper or self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        """Give it back."""
        if not self._is_helper:
            self._lock.release()

    def __enter__(self) -> UpdateLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()
