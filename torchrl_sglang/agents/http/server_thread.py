"""``ServerThread``: an ASGI application served by uvicorn in a thread of its own, with its own event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, wait
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import uvicorn

from torchrl_sglang.errors import ConfigError, ServerTimeoutError

__all__ = ["ServerThread"]

T = TypeVar("T")

_KEEP_ALIVE_S = 75
"""An idle connection is closed after this; clients close theirs sooner, so none is closed while a request is sent."""
_START_S = 30.0
_STOP_S = 2
_CALL_S = 120.0
"""Calls take milliseconds, those that return long conversations a second."""
_LOOK_AGAIN_S = 0.5
_BACKLOG = 4096
"""Connections that wait to be accepted: a thousand agents may start at once."""


class ServerThread:
    """Serves one application until :meth:`stop`.

    Args:
        application: called in the event loop; returns the application and what ends it.
        host: address to listen on.
        port: port to listen on; 0 for any free port.

    Attributes:
        port: the port.

    Raises:
        ConfigError: the address can't be listened on.
    """

    def __init__(
        self, application: Callable[[], Awaitable[tuple[Any, Callable[[], Awaitable[None]]]]], *, host: str, port: int
    ) -> None:
        self._application = application
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: uvicorn.Server | None = None
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="agent-gateway", daemon=True)

    def start(self) -> None:
        """Serve; returns when requests are answered.

        Raises:
            SGLangError: what ``application`` raised.
        """
        self._thread.start()
        self._ready.result(timeout=_START_S)

    @property
    def is_alive(self) -> bool:
        """Whether it serves."""
        return self._thread.is_alive() and self._ready.done()

    def call(self, work: Callable[[], Coroutine[Any, Any, T]], *, timeout_s: float = _CALL_S) -> T:
        """Run a coroutine in the event loop, and return its result.

        Raises:
            RuntimeError: called in the event loop itself, which would wait for itself; or it does not serve, or no
                longer.
            ServerTimeoutError: the event loop did not run it in time.
        """
        if self._loop is None or not self.is_alive:
            raise RuntimeError("the gateway is not running: use it in a `with` block, or call start()")
        if threading.current_thread() is self._thread:
            raise RuntimeError("this method waits for the gateway's event loop, and was called in it")
        running = asyncio.run_coroutine_threadsafe(work(), self._loop)
        deadline = time.monotonic() + timeout_s
        try:
            while not running.done() and self._thread.is_alive() and time.monotonic() < deadline:
                wait({running}, timeout=_LOOK_AGAIN_S)
            if running.done() and not running.cancelled():
                return running.result()
        finally:
            running.cancel()
        if running.cancelled() and self._thread.is_alive() and time.monotonic() >= deadline:
            raise ServerTimeoutError(
                f"the gateway's event loop did not answer within {timeout_s:g} s: its thread gets no time, or other "
                "work blocks it. Run the gateway in a process of its own (torchrl-sglang gateway)"
            )
        raise RuntimeError("the gateway was closed while this call waited for it")

    def stop(self) -> None:
        """End all requests, close all connections, and end the thread."""
        if self._server is not None and self._loop is not None and self._thread.is_alive():
            self._server.should_exit = True
            if threading.current_thread() is not self._thread:
                self._thread.join(timeout=_START_S)
        self._socket.close()

    def _run(self) -> None:
        try:
            _event_loops().run(self._serve())
        except BaseException as error:  # raised in start()
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        application, end = await self._application()
        config = uvicorn.Config(
            application,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_STOP_S,
            backlog=_BACKLOG,
        )
        self._server = _Server(config, self._ready, end)
        await self._server.serve(sockets=[self._socket])


class _Server(uvicorn.Server):
    """Says when it has started, and ends the application's work before it waits for connections to close."""

    def __init__(self, config: uvicorn.Config, ready: Future[None], end: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._ready = ready
        self._end = end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready.set_result(None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._end()
        await super().shutdown(sockets)


def _event_loops() -> Any:
    """uvloop, which takes less time, where it is installed; there is none for Windows."""
    return import_module("uvloop" if find_spec("uvloop") else "asyncio")


def _listen(host: str, port: int) -> socket.socket:
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=kind, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the gateway can't listen on {host}:{port}: {reason}. port=0 takes any free port") from error
    listener.setblocking(False)
    return listener
