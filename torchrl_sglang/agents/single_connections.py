"""``SingleConnections``: connections to one server, each used by one request at a time."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from torchrl_sglang.connections import IDLE_LIMIT_S, socket_options
from torchrl_sglang.tls import trusted_authorities

__all__ = ["SingleConnections"]


class SingleConnections:
    """Keeps idle connections for the next requests. Belongs to one event loop.

    Each connection has a pool of its own. One pool for all would look at every pair of its connections before and after
    each request (httpcore 1.0): with 64 requests under way that is half of the gateway's CPU time.

    Args:
        ca_certificate: PEM file of a private authority; ``None`` trusts the public ones.
    """

    def __init__(self, ca_certificate: str | None) -> None:
        authorities = trusted_authorities(ca_certificate)
        self._tls = ssl.create_default_context(cafile=authorities if isinstance(authorities, str) else None)
        self._idle: list[httpx.AsyncHTTPTransport] = []

    @asynccontextmanager
    async def take(self) -> AsyncIterator[httpx.AsyncHTTPTransport]:
        """A connection for one request, which is opened with the request unless one is idle."""
        connection = self._idle.pop() if self._idle else self._new()
        try:
            yield connection
        finally:
            self._idle.append(connection)

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await self._idle.pop().aclose()

    def _new(self) -> httpx.AsyncHTTPTransport:
        return httpx.AsyncHTTPTransport(
            verify=self._tls,
            trust_env=False,  # no proxy and no .netrc: the servers are the trainer's own
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=IDLE_LIMIT_S),
            socket_options=socket_options(),
        )
