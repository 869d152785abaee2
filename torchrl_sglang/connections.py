"""HTTP connections to one server: how many, how old, and how a host that vanished is noticed."""

from __future__ import annotations

import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import requests
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import ServerTimeoutError
from torchrl_sglang.reply_deadline import DeadlineHttpConnection, DeadlineHttpsConnection
from torchrl_sglang.tls import trusted_authorities

__all__ = ["IDLE_LIMIT_S", "ServerConnections", "socket_options"]

Purpose = Literal["generate", "stream", "control"]

IDLE_LIMIT_S = 3.0
"""uvicorn closes a connection that was idle for 5 s (SGLANG_TIMEOUT_KEEP_ALIVE). A connection that was idle for nearly
as long is not used again: if the server closes it while a request is on its way, nobody knows whether the request
ran."""

_KEEP_ALIVE_PROBES = (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4))
"""The kernel asks a silent host after 20 s, then every 10 s, and gives up after the fourth question: a host that was
powered off breaks the connection after a minute. A running host answers, however long its server computes."""
_USER_TIMEOUT_MS = 60_000
"""How long sent bytes may stay unacknowledged: a request to a host that vanished fails after a minute."""


class ServerConnections:
    """Connections to one server, in sessions: a paused server may hold all connections of generate requests.

    The reply to a request must have come as a whole when its time-out is over, and a stream's next piece.

    Thread-safe.

    Args:
        url: base URL of the server, for errors.
        config: number of connections and TLS settings.
    """

    def __init__(self, url: str, config: ClientConfig) -> None:
        self._url = url
        self._config = config
        self._lock = threading.Lock()
        self._sessions: dict[Purpose, requests.Session] = {}
        self._slots = threading.BoundedSemaphore(config.max_connections)
        self._num_generating = 0
        self._elsewhere: dict[object, Callable[[], None]] = {}
        self._cut = threading.Event()

    @contextmanager
    def slot(self, purpose: Purpose, wait_s: float) -> Iterator[float]:
        """Hold one of ``max_connections`` connections for generate requests; others need none.

        Args:
            purpose: what the connection is for.
            wait_s: longest time to wait for a connection and the reply together, in seconds.

        Yields:
            What is left of ``wait_s``, in seconds.

        Raises:
            ServerTimeoutError: all connections stayed in use; nothing was sent.
        """
        if purpose == "control":
            yield wait_s
            return
        start = time.monotonic()
        if not self._slots.acquire(timeout=wait_s):
            raise ServerTimeoutError(
                f"all {self._config.max_connections} connections to {self._url} were in use for {wait_s:g} s; the "
                "request was not sent. Send fewer requests at once, or raise ClientConfig.max_connections",
                server=self._url,
            )
        with self._lock:
            self._num_generating += 1
        try:
            yield max(0.1, wait_s - (time.monotonic() - start))
        finally:
            with self._lock:
                self._num_generating -= 1
            self._slots.release()

    @contextmanager
    def sent_elsewhere(self, cut: Callable[[], None]) -> Iterator[None]:
        """Count a generate request that has a connection of another kind, such as one of an event loop.

        Args:
            cut: breaks that connection; called from any thread.
        """
        key = object()
        with self._lock:
            self._elsewhere[key] = cut
        try:
            yield
        finally:
            with self._lock:
                del self._elsewhere[key]

    @property
    def num_generating(self) -> int:
        """Number of generate requests under way."""
        with self._lock:
            return self._num_generating + len(self._elsewhere)

    @property
    def when_cut(self) -> threading.Event:
        """Set by the next :meth:`cut`, for generate requests that wait until they may be sent again."""
        with self._lock:
            return self._cut

    def cut(self) -> None:
        """Break the connections of all generate requests under way: each fails as if the server had broken it."""
        with self._lock:
            self._cut.set()
            self._cut = threading.Event()
            sessions = [session for purpose, session in self._sessions.items() if purpose != "control"]
            elsewhere = list(self._elsewhere.values())
        for cut in elsewhere:
            cut()
        for session in sessions:
            for scheme in ("http://", "https://"):
                adapter = session.get_adapter(scheme)
                if isinstance(adapter, _Adapter):
                    adapter.cut()

    def session(self, purpose: Purpose) -> requests.Session:
        """The session for requests of this kind."""
        with self._lock:
            session = self._sessions.get(purpose)
            if session is None:
                self._sessions[purpose] = session = requests.Session()
                session.trust_env = False  # no proxy and no .netrc: the servers are the trainer's own
                session.verify = trusted_authorities(self._config.ca_certificate)
                kind = _StreamAdapter if purpose == "stream" else _Adapter
                adapter = kind(
                    pool_connections=1, pool_maxsize=self._config.max_connections, pool_block=False, max_retries=0
                )
                session.mount("http://", adapter)
                session.mount("https://", adapter)
            return session

    def close(self) -> None:
        """Close idle connections; later requests open new ones."""
        with self._lock:
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()


class _Adapter(HTTPAdapter):
    """Opens connections with TCP keepalive, and never reuses one that was idle for long."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, socket_options=socket_options(), **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools()

    def _pools(self) -> dict[str, Any]:
        return {"http": _HttpPool, "https": _HttpsPool}

    def cut(self) -> None:
        """Break the connections in use."""
        pools = self.poolmanager.pools
        for key in list(pools.keys()):
            pool = pools.get(key)
            if pool is not None:
                pool.cut()


class _StreamAdapter(_Adapter):
    def _pools(self) -> dict[str, Any]:
        return {"http": _HttpStreamPool, "https": _HttpsStreamPool}


class _AgeingPool(HTTPConnectionPool):
    """A connection pool that knows which of its connections are in use, and when each other was last used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last_used: dict[int, float] = {}
        self._in_use: weakref.WeakSet[Any] = weakref.WeakSet()

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection = super()._get_conn(timeout)
        last_used = self._last_used.pop(id(connection), None)
        if last_used is not None and time.monotonic() - last_used > IDLE_LIMIT_S:
            connection.close()  # the next request on it connects again
        self._in_use.add(connection)
        return connection

    def cut(self) -> None:
        """Shut down the sockets of connections in use; the threads that wait for them see a broken connection."""
        for connection in list(self._in_use):
            sock = getattr(connection, "sock", None)
            if sock is not None:
                with suppress(OSError):  # it is closed already
                    sock.shutdown(socket.SHUT_RDWR)

    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            self._in_use.discard(conn)
            self._last_used[id(conn)] = time.monotonic()
        super()._put_conn(conn)


class _HttpStreamPool(_AgeingPool):
    pass


class _HttpsStreamPool(_AgeingPool, HTTPSConnectionPool):
    pass


class _HttpPool(_AgeingPool):
    ConnectionCls = DeadlineHttpConnection


class _HttpsPool(_AgeingPool, HTTPSConnectionPool):
    ConnectionCls = DeadlineHttpsConnection


def socket_options() -> list[tuple[int, int, int]]:
    """TCP options with which a host that vanished is noticed."""
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    # Names that exist on Linux only.
    options += [
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in _KEEP_ALIVE_PROBES
        if hasattr(socket, name)
    ]
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        options.append((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS))
    return options
