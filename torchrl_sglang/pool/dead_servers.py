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
from torchrl_sglang.pool.state import PoolState, ServerState, WeightState
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["DeadServerTracker"]

_POLL_INTERVAL_S = 5.0
_LONGEST_INTERVAL_S = 60.0
"""For a server that answers and can't be used, however often that was tried."""
_POLLED = ("dead", "dirty", "joining")


class DeadServerTracker:
    """Polls the servers whose phase is ``dead``, ``dirty`` or ``joining``.

    One that answers and can't be used is asked half as often each time, until it does not answer once.

    Args:
        state: the pool's records.
        on_return: called for a server that answers again and holds weights at least as new as any that this pool has
            seen, with its record from before the poll and with the version string that it reports. It raises if the
            server can't be used. The version does not count where an adapter is in use: what is below it is compared
            when it is loaded.
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
        self._refused: dict[str, tuple[float, float]] = {}  # by URL: not before, and the interval until then
        self._answered: set[str] = set()

    def postpone(self, url: str) -> None:
        """A server has just died: wait before it is polled. What was found of it before counts no more."""
        with self._lock:
            self._polled_at = time.monotonic()
        self._answered.discard(url)
        self._refused.pop(url, None)

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
            due = [client for client in dead if none_left or self._is_due(client.url)]
            self._running = running = Task(lambda: self.ask(due), name="sglang-poll-dead-servers")
        if none_left:
            running.wait()

    def join(self, timeout_s: float) -> None:
        """Wait for a poll under way, at most this long, in seconds."""
        with self._lock:
            running = self._running
        if running is not None:
            running.wait(timeout_s)

    def ask(self, clients: Sequence[SGLangClient]) -> None:
        """Look at these servers now, and wait for it; those in other phases are left alone."""
        side_by_side({client.url: partial(self._ask_one, client) for client in clients})

    def _ask_one(self, client: SGLangClient) -> None:
        before = self._state.server(client.url)
        if before.phase not in _POLLED:  # something has happened to it since
            return
        try:
            held = client.weight_version()
        except SGLangError as error:
            if client.url in self._answered:  # what comes next is another process
                self._answered.discard(client.url)
                self._refused.pop(client.url, None)
                self._state.came_back_different(before, f"it does not answer any more ({error})")
            return
        self._answered.add(client.url)
        if not self._is_current(held, before):
            if before.phase == "dead":
                self._state.came_back_different(before, _about_version(held, self._state.weights))
            return
        try:
            self._on_return(before, held)
            self._refused.pop(client.url, None)
            self._answered.discard(client.url)
        except SGLangError:
            self._postpone(client.url)

    def _is_current(self, held: str, server: ServerState) -> bool:
        if server.phase == "joining":  # of a server that this pool has never used, the number alone says nothing
            return held in self._current_versions()
        version, weights = WeightVersion.parse(held), self._state.weights
        if version.dirty or weights.adapter is not None:
            return not version.dirty
        return weights.is_as_new(version) or held in self._current_versions()

    def _is_due(self, url: str) -> bool:
        return time.monotonic() >= self._refused.get(url, (0.0, 0.0))[0]

    def _postpone(self, url: str) -> None:
        interval = self._refused.get(url, (0.0, _POLL_INTERVAL_S))[1]
        interval = min(2 * interval, max(_LONGEST_INTERVAL_S, _POLL_INTERVAL_S))
        self._refused[url] = (time.monotonic() + interval, interval)


def _about_version(held: str, weights: WeightState) -> str:
    """Why a server that answers again gets no requests."""
    if WeightVersion.parse(held).dirty:
        return f"it answers again, and holds half-updated or unverified weights ({held})"
    return (
        f"it answers again, and holds weights of version {held!r}, older than {str(weights.newest_seen)!r}: the next "
        "weight update puts it to use"
    )
