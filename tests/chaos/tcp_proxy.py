"""A TCP proxy before a server, which cuts connections, delays what passes, or lets nothing pass."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from typing import Literal

__all__ = ["TcpProxy"]

Mode = Literal["open", "slow", "silent", "refuse"]
"""``open``: bytes pass; ``slow``: each piece waits before it passes; ``silent``: connections are accepted and stay
open, and nothing passes; ``refuse``: existing connections are reset, new ones refused."""

_PIECE = 65536
_POLL_S = 0.05


class TcpProxy:
    """Listens on a free port and forwards to ``target`` until it is closed; a ``with`` block.

    Args:
        target: host and port.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._mode: Mode = "open"
        self._delay_s = 0.0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closed = False
        self._listener: socket.socket | None = None
        self._listen(0)
        assert self._listener is not None
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="tcp-proxy", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Base URL for clients of the server."""
        return f"http://127.0.0.1:{self.port}"

    def set(self, mode: Mode, *, delay_s: float = 0.2) -> None:
        """Change what happens to connections, existing ones included."""
        with self._lock:
            self._mode, self._delay_s = mode, delay_s
        if mode == "refuse":
            self._stop_listening()
            self._reset_all()
        elif self._listener is None and not self._closed:
            self._listen(self.port)

    def close(self) -> None:
        """End all connections and stop listening."""
        self._closed = True
        self._stop_listening()
        self._reset_all()
        self._thread.join()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _listen(self, port: int) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(256)
        listener.settimeout(_POLL_S)
        self._listener = listener

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def _reset_all(self) -> None:
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for each in sockets:
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends a reset
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while not self._closed:
            listener = self._listener
            if listener is None:
                time.sleep(_POLL_S)
                continue
            try:
                client, _ = listener.accept()
            except OSError:  # time-out, or closed by set()
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket()
        with self._lock:
            self._sockets |= {client, server}
        try:
            server.connect(self._target)
            self._forward(client, server)
        except (OSError, ValueError):  # either end is gone; a closed socket has the descriptor -1
            pass
        finally:
            with self._lock:
                self._sockets -= {client, server}
            client.close()
            server.close()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        with selectors.DefaultSelector() as selector:
            for each in other:
                selector.register(each, selectors.EVENT_READ)
            while not self._closed:
                for key, _ in selector.select(_POLL_S):
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    while self._mode == "silent" and not self._closed:
                        time.sleep(_POLL_S)
                    piece = source.recv(_PIECE)
                    if not piece:
                        return
                    if self._mode == "slow":
                        time.sleep(self._delay_s)
                    other[source].sendall(piece)
