"""Which server a request goes to, and how many each has under way; further requests wait their turn."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import OverloadedError
from torchrl_sglang.pool import SGLangPool

__all__ = ["ServerSlots"]

_LOOK_AGAIN_S = 0.25
_FOLLOW_S = 1.0
"""A pool that is a copy, in another process than the trainer's, learns by then which servers have joined and left."""
_LONGEST_REFUSAL_S = 60.0
"""A refusal may be over sooner than its answer says: by then one request looks. Others would wait for it unheard."""
_SLACK = 8
"""Sequences that a server may have more than twice the least loaded one, before a conversation leaves it: its prefix
cache holds the conversation, and another server computes all of it again."""


class ServerSlots:
    """Divides requests over the healthy servers of a pool. Belongs to one event loop.

    Args:
        pool: the servers.
        max_in_flight: most sequences under way on each server.
        max_waiting: most sequences that wait for a server.
        no_server_wait_s: how long a sequence waits while no server is healthy, for example until a crashed one is back.
    """

    def __init__(self, pool: SGLangPool, *, max_in_flight: int, max_waiting: int, no_server_wait_s: float) -> None:
        self._pool = pool
        self._max_in_flight = max_in_flight
        self._max_waiting = max_waiting
        self._no_server_wait_s = no_server_wait_s
        self._load: defaultdict[str, int] = defaultdict(int)  # servers may join later
        self._waiting: deque[asyncio.Event] = deque()
        self._healthy_at = 0.0
        self._polling: asyncio.Task[None] | None = None
        self._polled_at = 0.0
        self._refuses_until: dict[str, float] = {}

    @property
    def in_flight(self) -> int:
        """Sequences under way on all servers."""
        return sum(self._load.values())

    @property
    def waiting(self) -> int:
        """Sequences that wait for a server."""
        return len(self._waiting)

    def refused(self, url: str, wait_s: float) -> None:
        """A server, or a proxy before it, has refused a request: it gets none for a time. Others get them meanwhile."""
        until = time.monotonic() + min(wait_s, _LONGEST_REFUSAL_S)
        self._refuses_until[url] = max(self._refuses_until.get(url, 0.0), until)

    @property
    def all_refuse(self) -> bool:
        """Whether every healthy server has refused a request, and is not to be asked yet."""
        return all(self._is_refusing(client.url) for client in self._pool.healthy)

    def _is_refusing(self, url: str) -> bool:
        is_over = self._refuses_until.get(url, 0.0) <= time.monotonic()
        if is_over:
            self._refuses_until.pop(url, None)
        return not is_over

    @asynccontextmanager
    async def take(self, preferred: str | None) -> AsyncIterator[SGLangClient]:
        """Hold a place on a server.

        Args:
            preferred: URL of the server that has the conversation in its prefix cache.

        Raises:
            OverloadedError: too many wait already.
            ServerError: no server has been healthy for a while.
        """
        client = self._choose(preferred) if not self._waiting else None
        if client is None:
            client = await self._wait(preferred)
        self._load[client.url] += 1
        try:
            yield client
        finally:
            self._load[client.url] -= 1
            self._wake_first()

    async def _wait(self, preferred: str | None) -> SGLangClient:
        if len(self._waiting) >= self._max_waiting:
            raise OverloadedError(
                f"{len(self._waiting)} requests wait for {len(self._pool.clients)} servers, each of which has "
                f"{self._max_in_flight} under way; try again later, or run fewer agents at once"
            )
        mine = asyncio.Event()
        self._waiting.append(mine)
        begun_at = time.monotonic()
        try:
            while self._waiting[0] is not mine:
                await mine.wait()
                mine.clear()
            while (client := self._choose(preferred)) is None:
                if time.monotonic() - max(begun_at, self._healthy_at) > self._no_server_wait_s:
                    self._pool.require_healthy("the turn was not generated")
                # Only the first one looks by the clock; a place that becomes free wakes it.
                timer = asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, mine.set)
                try:
                    await mine.wait()
                finally:
                    timer.cancel()
                mine.clear()
            return client
        finally:
            self._waiting.remove(mine)
            self._wake_first()

    def _wake_first(self) -> None:
        if self._waiting:
            self._waiting[0].set()

    def _choose(self, preferred: str | None) -> SGLangClient | None:
        """The server for the next sequence; ``None`` if all are full or none is healthy."""
        healthy = self._pool.healthy
        if healthy:
            self._healthy_at = time.monotonic()
        if len(healthy) < len(self._pool.clients) or time.monotonic() - self._polled_at > _FOLLOW_S:
            self._poll_servers()
        free = [client for client in healthy if self._load[client.url] < self._max_in_flight]
        if self._refuses_until:
            free = [client for client in free if not self._is_refusing(client.url)]
        if not free:
            return None
        least = min(free, key=lambda client: self._load[client.url])
        known = next((client for client in free if client.url == preferred), None)
        if known is not None and self._load[known.url] <= 2 * self._load[least.url] + _SLACK:
            return known
        return least

    def _poll_servers(self) -> None:
        """Look in the background whether servers are back, have joined or left; the pool limits how often."""
        if self._polling is None or self._polling.done():
            self._polled_at = time.monotonic()
            self._polling = asyncio.get_running_loop().create_task(asyncio.to_thread(self._pool.poll_dead_servers))
