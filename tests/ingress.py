"""A reverse proxy before a server that answers some requests by itself, in ways in which a cluster's proxies do.

::

    with Ingress(server.url) as ingress:
        ingress.on("/generate", answer(502, "<html><title>502 Bad Gateway</title></html>"), times=1)
        SGLangClient(ingress.url).send(...)
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from urllib.parse import urlsplit

__all__ = ["HTML_502", "Ingress", "answer", "chunks_cut_short", "drip", "reset_in_the_body"]

HTML_502 = "<html>\n<head><title>502 Bad Gateway</title></head>\n<body><center>nginx</center></body>\n</html>"

Forward = Callable[[], tuple[int, list[tuple[str, str]], bytes]]
"""Sends the request to the server; status, headers and body of its answer."""
Respond = Callable[[socket.socket, Forward], None]
"""Answers a request on its connection, which is closed afterwards."""


def answer(status: int, body: str = "", *, kind: str = "text/html", **headers: str) -> Respond:
    """Answer without asking the server."""

    def respond(connection: socket.socket, forward: Forward) -> None:
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        connection.sendall(_head(status, [("Content-Type", kind), *named], len(body.encode())) + body.encode())

    return respond


def drip(every_s: float) -> Respond:
    """The server's own answer, a byte at a time."""

    def respond(connection: socket.socket, forward: Forward) -> None:
        status, headers, body = forward()
        data = _head(status, headers, len(body)) + body
        for index in range(len(data)):
            connection.sendall(data[index : index + 1])
            time.sleep(every_s)

    return respond


def reset_in_the_body() -> Respond:
    """Half of the server's answer, then a reset."""

    def respond(connection: socket.socket, forward: Forward) -> None:
        status, headers, body = forward()
        connection.sendall(_head(status, headers, len(body)) + body[: len(body) // 2])
        time.sleep(0.1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    return respond


def chunks_cut_short() -> Respond:
    """Half of the server's answer in chunks, without the last one."""

    def respond(connection: socket.socket, forward: Forward) -> None:
        status, headers, body = forward()
        half = body[: len(body) // 2]
        head = _head(status, [*headers, ("Transfer-Encoding", "chunked")], None)
        connection.sendall(head + f"{len(half):x}\r\n".encode() + half + b"\r\n")

    return respond


class Ingress:
    """Forwards requests to a server, unless told otherwise by path. One request per connection.

    Args:
        backend: base URL of the server; may be changed at any time.
        prefix: path below which the server appears.
        host: address to listen on.
    """

    def __init__(self, backend: str, *, prefix: str = "", host: str = "127.0.0.1") -> None:
        self.backend = backend
        self._prefix = prefix
        self._host = host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family)
        self._listener.bind((host, 0))
        self._listener.listen(128)
        self._lock = threading.Lock()
        self._rules: list[tuple[str, Respond, int]] = []
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        """Base URL of the server, as it appears here."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._listener.getsockname()[1]}{self._prefix}"

    def on(self, path: str, respond: Respond, *, times: int = -1) -> None:
        """Answer requests to ``path`` (``"*"``: to any) so, this many times."""
        with self._lock:
            self._rules.insert(0, (path, respond, times))

    def clear(self) -> None:
        """Forward everything."""
        with self._lock:
            self._rules.clear()

    def __enter__(self) -> Ingress:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                request = _read_request(connection)
                if request is None:
                    return
                method, target, headers, body = request
                path = target.split("?")[0].removeprefix(self._prefix)
                self.seen.append(path)
                self._rule(path)(connection, lambda: self._forward(method, target, headers, body))
            except OSError:  # the client has gone
                return

    def _rule(self, path: str) -> Respond:
        with self._lock:
            for index, (pattern, respond, times) in enumerate(self._rules):
                if pattern in ("*", path) and times != 0:
                    self._rules[index] = (pattern, respond, times - 1)
                    return respond
        return _pass

    def _forward(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        parts = urlsplit(self.backend)
        upstream = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        try:
            upstream.request(method, target.removeprefix(self._prefix), body or None, headers)
            reply = upstream.getresponse()
            kept = [(name, value) for name, value in reply.getheaders() if name.lower() == "content-type"]
            return reply.status, kept, reply.read()
        except (OSError, http.client.HTTPException):
            return 502, [("Content-Type", "text/html")], HTML_502.encode()
        finally:
            upstream.close()


def _pass(connection: socket.socket, forward: Forward) -> None:
    status, headers, body = forward()
    connection.sendall(_head(status, headers, len(body)) + body)


def _head(status: int, headers: list[tuple[str, str]], length: int | None) -> bytes:
    lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _read_request(connection: socket.socket) -> tuple[str, str, dict[str, str], bytes] | None:
    reader = connection.makefile("rb")
    first = reader.readline().decode().split()
    if len(first) < 2:
        return None
    headers = {}
    while line := reader.readline().strip():
        name, _, value = line.decode().partition(":")
        headers[name.strip().lower()] = value.strip()
    body = reader.read(int(headers.get("content-length", 0)))
    kept = {name: value for name, value in headers.items() if name in ("authorization", "content-type")}
    return first[0], first[1], kept, body
