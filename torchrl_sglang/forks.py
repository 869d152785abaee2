"""Objects whose connections and locks must not be shared with a forked child process."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["renew_in_forked_children"]


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


def _renew() -> None:
    for owner in list(_objects):
        owner.renew_after_fork()


os.register_at_fork(after_in_child=_renew)
