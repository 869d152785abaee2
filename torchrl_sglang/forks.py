"""Objects whose connections and locks must not be shared with a forked child process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

__all__ = ["ForkSafeLock", "renew_in_forked_children"]


class Renewable(Protocol):
    """An object that can forget what it holds open."""

    def renew_after_fork(self) -> None:
        """Replace connections, locks and threads; called in a forked child before any other code of it runs."""


_objects: weakref.WeakSet[Renewable] = weakref.WeakSet()


def renew_in_forked_children(owner: Renewable) -> None:
    """Call ``owner.renew_after_fork()`` in every child process that is forked while ``owner`` lives.

    A forked child shares the parent's sockets: each could read the reply to the other's request. A lock that another
    thread held at the fork stays locked in the child for ever.
    """
    _objects.add(owner)


class ForkSafeLock:
    """A lock for ``with`` blocks that nobody holds in a forked child, whoever held it in the parent at that moment.

    Args:
        kind: makes the lock: ``threading.Lock`` or ``threading.RLock``.

    Examples:
        >>> lock = ForkSafeLock()
        >>> with lock:
        ...     print("held")
        held
    """

    def __init__(self, kind: Callable[[], Any] = threading.Lock) -> None:
        self._kind = kind
        self._lock = self._held = kind()
        renew_in_forked_children(self)

    def renew_after_fork(self) -> None:
        """Take a new lock. A block that forks inside itself releases the one that it holds."""
        self._lock = self._kind()

    def __enter__(self) -> None:
        lock = self._lock
        lock.acquire()
        self._held = lock

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._held.release()


def _renew() -> None:
    for owner in list(_objects):
        owner.renew_after_fork()


os.register_at_fork(after_in_child=_renew)
