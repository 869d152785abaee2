"""Polls servers that died, and restores those that have been restarted.

A process that restarts servers itself learns of their return from :class:`CrashMonitor` or a weight update. Pools in
other processes, and pools whose servers a cluster restarts, learn of it only by polling.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import SGLangError
from torchrl_sglang.parallel import Task, side_by_side
from torchrl_sglang.pool.state import PoolState, ServerState
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["DeadServerTracker"]

_POLL_INTERVAL_S = 5.0
_POLLED = ("dead", "dirty", "joining")


class DeadServerTracker:
    """Polls the servers whose phase is ``dead``, ``dirty`` or ``joining``.

    Args:
        state: the pool's records.
        on_return: called for a server that answers again and holds weights at least as new as any that this pool has
            seen, with its record from before the poll and with the version string that it reports. The version does
            not count where an adapter is in use: what is below it is compared when it is loaded.
        current_versions: returns the version strings of the current weights; a newcomer must hold one of them.
    """

    def __init__(
        self,
        state: PoolState,
        on_return: Callable[[ServerState, str], None],
        current_versions: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._state = state
        self._on_return = on_return
        self._current_versions = current_versions
        self._lock = threading.Lock()
        self._polled_at = time.monotonic()
        self._running: Task[None] | None = None

    def postpone(self) -> None:
        """A server has just died: wait before it is polled."""
        with self._lock:
            self._polled_at = time.monotonic()

    def poll(self, clients: Sequence[SGLangClient]) -> None:
        """Poll the dead servers in the background, at most every few seconds. If all are dead, poll now and wait.

        Args:
            clients: all servers of the pool.
        """
        dead = [client for client in clients if self._state.server(client.url).phase in _POLLED]
        none_left = len(dead) == len(clients)
        with self._lock:
            is_idle = self._running is None or self._running.done
            is_due = is_idle and time.monotonic() - self._polled_at > _POLL_INTERVAL_S
            if not dead or not (is_due or none_left):
                return
            self._polled_at = time.monotonic()
            self._running = running = Task(lambda: self._ask(dead), name="sglang-poll-dead-servers")
        if none_left:
            running.wait()

    def _ask(self, dead: Sequence[SGLangClient]) -> None:
        side_by_side({client.url: partial(self._ask_one, client) for client in dead})

    def _ask_one(self, client: SGLangClient) -> None:
        before = self._state.server(client.url)
        if before.phase not in _POLLED:  # something has happened to it since
            return
        try:
            held = client.weight_version()
            if self._is_current(held, before):
                self._on_return(before, held)
        except SGLangError:  # still dead, or the router does not admit it yet
            return

    def _is_current(self, held: str, server: ServerState) -> bool:
        if server.phase == "joining":  # of a server that this pool has never used, the number alone says nothing
            return held in self._current_versions()
        version, weights = WeightVersion.parse(held), self._state.weights
        if weights.adapter is not None:
            return not version.dirty
        return not version.dirty and version.number >= max(weights.version, weights.newest_seen)
