"""Who may go on and who waits: the pause that holds new requests back, and the lock between requests and updates."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.fake_sglang.scheduler import Gone

__all__ = ["Gate"]


class Gate:
    """SGLang's two locks in front of the scheduler.

    One guards the pause: whoever changes it, and an update of a paused server, holds it, so those wait for each other.
    The other lets requests run side by side and an update of a server that is *not* paused run alone.
    """

    def __init__(self, gone: threading.Event) -> None:
        self._gone = gone
        self._pause = threading.Condition()
        self._lock = threading.Condition()
        self._requests = 0
        self._updating = False
        self._updates_waiting = 0
        self.paused = False

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Hold the pause guard."""
        with self._guard():
            yield

    @contextmanager
    def _guard(self) -> Iterator[None]:
        while not self._pause.acquire(timeout=0.2):
            if self._gone.is_set():
                raise Gone
        try:
            yield
        finally:
            self._pause.release()

    def wake(self) -> None:
        """Let the requests go that wait for the end of the pause; call with the pause guard held."""
        self._pause.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a request or an update is under way."""
        with self._lock:
            return self._requests > 0 or self._updating

    @contextmanager
    def request(self) -> Iterator[None]:
        """Wait for the end of a pause and of updates, then be a request."""
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
    def update(self) -> Iterator[None]:
        """Be an update: at once under a pause (which can't end meanwhile), else when all requests have ended."""
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
        if self._gone.is_set():
            raise Gone
