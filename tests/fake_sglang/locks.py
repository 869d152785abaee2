"""The two locks that requests and weight updates pass before the scheduler: the pause and the update lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.fake_sglang.scheduler import ServerStopped

__all__ = ["RequestLocks"]


class RequestLocks:
    """SGLang's pause guard and its update lock.

    A call that changes the pause, and an update of a paused server, hold the pause guard, so they exclude each other.
    The update lock lets requests run concurrently, and lets an update of a server that is *not* paused run alone.
    """

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped
        self._pause = threading.Condition()
        self._lock = threading.Condition()
        self._requests = 0
        self._updating = False
        self._updates_waiting = 0
        self.paused = False

    @contextmanager
    def for_pause(self) -> Iterator[None]:
        """Hold the pause guard, to change the pause."""
        with self._guard():
            yield

    @contextmanager
    def _guard(self) -> Iterator[None]:
        while not self._pause.acquire(timeout=0.2):
            if self._stopped.is_set():
                raise ServerStopped
        try:
            yield
        finally:
            self._pause.release()

    def notify_resumed(self) -> None:
        """Wake the requests that wait for the end of the pause; call with the pause guard held."""
        self._pause.notify_all()

    @property
    def is_busy(self) -> bool:
        """Whether a request or an update is running."""
        with self._lock:
            return self._requests > 0 or self._updating

    @contextmanager
    def for_request(self) -> Iterator[None]:
        """Wait for the end of a pause and of updates, then hold the update lock as one of several requests."""
        with self._guard():
            while self.paused:
                self._wait(self._pause)
        with self._lock:
            while self._updating or self._updates_waiting:
                self._wait(self._lock)
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1
                self._lock.notify_all()

    @contextmanager
    def for_update(self) -> Iterator[None]:
        """Hold the update lock alone: once all requests have ended, or at once in a pause, which then cannot end."""
        with self._guard():
            if self.paused:
                yield
                return
        with self._lock:
            self._updates_waiting += 1
            try:
                while self._updating or self._requests:
                    self._wait(self._lock)
                self._updating = True
            finally:
                self._updates_waiting -= 1
        try:
            yield
        finally:
            with self._lock:
                self._updating = False
                self._lock.notify_all()

    def _wait(self, condition: threading.Condition) -> None:
        condition.wait(0.2)
        if self._stopped.is_set():
            raise ServerStopped
