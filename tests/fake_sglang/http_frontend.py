"""The HTTP frontend: sockets, keep-alive, and replies that break off."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.fake_sglang.calls import Call, Dropped, Lifecycle, Reply
from tests.fake_sglang.scheduler import ServerStopped
from tests.fake_sglang.settings import FakeSettings

__all__ = ["HttpFrontend"]

_Answer = Callable[[Call, str | None], Reply]


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], lifecycle: Lifecycle, keep_alive_s: float, answer: _Answer) -> None:
        super().__init__(address, _Handler)
        self.lifecycle = lifecycle
        self.keep_alive_s = keep_alive_s
        self.answer = answer
        self.open_connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.open_connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.open_connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect; print anything else, which is a bug in the fake server."""
        import sys

        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        self.timeout = self.server.keep_alive_s  # type: ignore[misc]  # an idle connection times out in the read of the next request line
        super().setup()

    def do_GET(self) -> None:
        """Answer the request, whatever its method."""
        self._serve()

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: ``/fake/events`` is the log."""

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = urlsplit(self.path)
        call = Call(
            method=self.command,
            path=parts.path,
            query=dict(parse_qsl(parts.query)),
            lifecycle=self.server.lifecycle,
            connected=self._connected,
        )
        try:
            call.body = json.loads(raw) if raw else None
            reply = self.server.answer(call, self.headers.get("authorization"))
        except json.JSONDecodeError as error:
            message = f"1 validation error:\n  {{'type': 'json_invalid', 'msg': 'JSON decode error: {error}'}}"
            body = {"object": "error", "message": message, "type": "Bad Request", "param": None, "code": 400}
            reply = Reply(status=400, body=body)
        except (Dropped, ServerStopped):
            self.close_connection = True
            return
        with contextlib.suppress(ServerStopped):
            if reply.stream is not None:
                self._send_stream(reply)
            else:
                self._send(reply)
            call.reach("replied")
            if not reply.then_close and not reply.half:
                return
        self.close_connection = True

    def _connected(self) -> bool:
        poll = select.poll()  # `select.select` takes no descriptor above 1023
        poll.register(self.connection, select.POLLIN)
        return not poll.poll(0) or bool(self.connection.recv(1, socket.MSG_PEEK))

    def _head(self, reply: Reply, headers: dict[str, str]) -> bytes:
        lines = [f"HTTP/1.1 {reply.status} {self.responses.get(reply.status, ('',))[0]}", "server: uvicorn"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def _send(self, reply: Reply) -> None:
        payload = reply.payload()
        headers = {"content-length": str(len(payload))}
        if not isinstance(reply.body, (str, type(None))):
            headers["content-type"] = "application/json"
        sent = payload[: len(payload) // 2] if reply.half else payload
        self.wfile.write(self._head(reply, headers) + sent)

    def _send_stream(self, reply: Reply) -> None:
        assert reply.stream is not None
        headers = {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"}
        self.wfile.write(self._head(reply, headers))
        for event in reply.stream:
            self._chunk(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
            if reply.half:
                return
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


class HttpFrontend:
    """Listens and calls ``answer`` for each request, in a thread per connection.

    Args:
        settings: address and keep-alive.
        lifecycle: whether the server runs.
        answer: turns a request and its ``Authorization`` header into a reply.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, settings: FakeSettings, lifecycle: Lifecycle, answer: _Answer) -> None:
        self._listener = _Listener((settings.host, settings.port), lifecycle, settings.keep_alive_s, answer)
        self.port: int = self._listener.server_address[1]
        self._thread = threading.Thread(
            target=self._listener.serve_forever, kwargs={"poll_interval": 0.05}, name="fake-http", daemon=True
        )

    def start(self) -> None:
        """Start accepting."""
        self._thread.start()

    def close(self) -> None:
        """Stop accepting and close every connection; idempotent, may be called from a handler's thread."""
        self._listener.socket.close()
        for connection in list(self._listener.open_connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        threading.Thread(target=self._listener.shutdown, daemon=True).start()
