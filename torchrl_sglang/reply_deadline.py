"""Bounds the time of a whole HTTP reply; a socket's time-out only bounds the silence between two pieces of it.

Without it a reply of which a byte comes now and then, through a proxy or from a host that swaps, never times out.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection

__all__ = ["DeadlineHttpConnection", "DeadlineHttpsConnection"]


class _DeadlineReader(io.RawIOBase):
    """Reads from a socket until a deadline: that many seconds from now as the socket's time-out says.

    Raises:
        TimeoutError: by a read after the deadline.
    """

    def __init__(self, sock: socket.socket) -> None:
        limit_s = sock.gettimeout()
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._deadline = None if limit_s is None else time.monotonic() + limit_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._deadline is not None:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("timed out")
            self._sock.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _DeadlineResponse(http.client.HTTPResponse):
    """A response of which all must come within the time-out that the socket has when the wait for it begins."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_DeadlineReader(sock))


class DeadlineHttpConnection(HTTPConnection):
    """An HTTP connection whose read time-out holds for the whole reply."""

    response_class = _DeadlineResponse


class DeadlineHttpsConnection(HTTPSConnection):
    """An HTTPS connection whose read time-out holds for the whole reply."""

    response_class = _DeadlineResponse
