"""One SGLang server as a child process: launched, waited for, and gone with us, however we go."""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError, ServerError, ServerStartError
from torchrl_sglang.server import command
from torchrl_sglang.server.cpu import needs_cpu_engine
from torchrl_sglang.server.diagnosis import ADDRESS_IN_USE, last_meaningful_line
from torchrl_sglang.server.managed_process import Child, read_end

__all__ = ["SGLangServer"]

_POLL_S = 0.2
_PROBE_TIMEOUT_S = 5.0  # an old server's /health generates a token, about a second
_LAUNCH_TRIES = 3  # with a fresh port each time, should somebody else take the one we chose


class SGLangServer:
    """An SGLang server process that belongs to this process.

    Everything it started ends with :meth:`stop`, at the end of a ``with`` block, when this object is collected, at
    interpreter exit, and within a second when this process is killed, SIGKILL included. A copy in another process
    (pickled, or inherited by a fork) is *attached*: it knows the address, and its :meth:`stop` does nothing.

    Args:
        config: what to serve, and how. Nothing is started yet.

    Examples:
        A server for the time of a block::

            with SGLangServer(ServerConfig(model="Qwen/Qwen3-0.6B")) as server:
                requests.post(f"{server.url}/generate", json={...})

        >>> server = SGLangServer(ServerConfig(model="Qwen/Qwen3-0.6B", port=30000))
        >>> server.is_running, server.url
        (False, 'http://127.0.0.1:30000')
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._child: Child | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._lock = threading.RLock()
        self._port = config.port
        self._attached = False
        self._was_ready = False
        self._last_log = ""
        self._weight_version: str | None = None

    # ------------------------------------------------------------------ start

    def start(
        self, *, progress: Callable[[str], None] | None = None, weight_version: str | None = None
    ) -> SGLangServer:
        """Launch and wait until the server takes requests.

        Args:
            progress: called about once a second with one line: seconds so far and what the server last said.
            weight_version: what the server calls the checkpoint's weights; ``None`` is SGLang's ``"default"``.

        Returns:
            This object.

        Raises:
            ConfigError: something that can be checked beforehand is wrong; nothing was started.
            ServerStartError: it did not come up; nothing is left of it but its log.
        """
        self.launch(weight_version=weight_version)
        self.wait_ready(progress=progress)
        return self

    def launch(self, *, weight_version: str | None = None) -> None:
        """Start the process and return at once; :meth:`wait_ready` is the other half.

        Args:
            weight_version: what the server calls the checkpoint's weights; ``None`` is SGLang's ``"default"``.

        Raises:
            ConfigError: something that can be checked beforehand is wrong; nothing was started.
            ServerStartError: the port is taken, or the process could not be started.
        """
        with self._lock:
            if not self._is_owner():
                raise ConfigError("this is an attached copy: the process that launched the server starts and ends it")
            if self.is_running:
                raise ConfigError(f"the server at {self.url} is already running: stop() it first, or restart() it")
            self._release()
            command.check_config(self.config)
            self._weight_version = weight_version
            self._child = Child.launch(
                self.config, port=self._port, cpu=needs_cpu_engine(self.config), weight_version=weight_version
            )
            self._port = self._child.port
            self._finalizer = weakref.finalize(self, self._child.end)

    def wait_ready(self, *, progress: Callable[[str], None] | None = None) -> None:
        """Wait until the launched server takes requests; when it can't, end it.

        Args:
            progress: called about once a second with one line: seconds so far and what the server last said.

        Raises:
            ServerStartError: it ended, or is not ready within ``config.start_timeout_s``.
        """
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._fail)
            started = time.monotonic()
            for last_try in [False] * (_LAUNCH_TRIES - 1) + [True]:
                try:
                    self._wait_ready(started, progress)
                    break
                except ServerStartError as error:
                    may_move = self.config.port is None and not self._was_ready  # later on, clients know the address
                    if last_try or not may_move or not ADDRESS_IN_USE.search(error.log_tail):
                        raise
                # Somebody took our freshly chosen port before the server could bind it.
                self._fail()
                self._port = None
                self.launch(weight_version=self._weight_version)
            self._was_ready = True
            on_failure.pop_all()

    def restart(self, *, progress: Callable[[str], None] | None = None) -> None:
        """End the server, dead, stuck or well, and start it again at its address, with the checkpoint's weights.

        Raises:
            ServerStartError: it did not come up again.
        """
        self.kill()
        self.start(progress=progress)

    def kill(self) -> None:
        """End the server at once, for it to be started again."""
        self.stop(kill=True)

    # ------------------------------------------------------------------ state

    @property
    def url(self) -> str:
        """Base URL that clients can use.

        Raises:
            ConfigError: no port is known yet, because the server chooses it at :meth:`launch`.
        """
        if self._port is None:
            raise ConfigError("the server's address is known once it is launched: call start() first, or set a port")
        return command.build_url(self.config, self._port)

    @property
    def pid(self) -> int | None:
        """Process id of the server's main process; ``None`` when it is not running, or not ours."""
        child = self._child
        return child.pid if child is not None and self._is_owner() and child.is_alive else None

    @property
    def is_running(self) -> bool:
        """Whether the process lives (for an attached copy: whether the server answers at all)."""
        if self._is_owner():
            return self._child is not None and self._child.is_alive
        return self._port is not None and self._probe("/ready") is not None

    @property
    def has_crashed(self) -> bool:
        """Whether it ended by itself with an error, and nobody has stopped or buried it since."""
        child = self._child
        return child is not None and self._is_owner() and child.has_crashed

    def reap(self) -> str | None:
        """Clear up after a crash; the log stays.

        Returns:
            How it ended, the likely cause and the end of the log; ``None`` when it has not crashed.
        """
        with self._lock:
            child = self._child
            if child is None or not self.has_crashed:
                return None
            child.keep_log = True
            crash_report = child.crash_report()
            self._release()
            return crash_report

    @property
    def log_path(self) -> Path | None:
        """The server's log; ``None`` before the launch, after the end, and on attached copies."""
        return self._child.log_path if self._child is not None else None

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log, keys blacked out; of the last run, when none is on."""
        log = self._last_log if self._child is None else read_end(self._child.log_path)
        return "\n".join(log.splitlines()[-lines:])

    def check(self) -> None:
        """Raise when the server is not running.

        Raises:
            ServerError: it is not; with its exit code, the likely cause and the end of its log when it crashed.
        """
        if self.is_running:
            return
        url = self.url if self._port is not None else None
        if self._child is None or not self._is_owner():
            raise ServerError(f"the server{f' at {url}' if url else ''} is not running", server=url)
        raise ServerError(f"the server at {url} {self._child.crash_report()}", server=url)

    # ------------------------------------------------------------------ stop

    def stop(self, *, kill: bool = False) -> None:
        """End the server and everything it started. Does nothing when it is not running, or not ours.

        Args:
            kill: end it at once. SGLang has nothing to save, so this is safe; without it the server is asked first,
                finishes the requests it has, and is killed after ``config.stop_timeout_s``.
        """
        with self._lock:
            child = self._child
            if child is None or not self._is_owner():
                return
            if child.has_crashed:
                child.keep_log = True
            elif not kill and self.config.stop_timeout_s > 0:
                child.ask_to_end(self.config.stop_timeout_s)
            self._release()

    def __enter__(self) -> SGLangServer:
        return self.start() if self._child is None else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ServerError) and self._child is not None:
            self._child.keep_log = True
        self.stop(kill=error is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "port": self._port}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SGLangServer.__init__(self, state["config"])
        self._port = state["port"]
        self._attached = True

    def __repr__(self) -> str:
        where = self.url if self._port is not None else "not launched"
        return f"SGLangServer({self.config.model!r}, {where}{'' if self._is_owner() else ', attached'})"

    # ------------------------------------------------------------------ inside

    def _is_owner(self) -> bool:
        return not self._attached and (self._child is None or self._child.owner_pid == os.getpid())

    def _wait_ready(self, started: float, progress: Callable[[str], None] | None) -> None:
        deadline = started + self.config.start_timeout_s
        said_at = started
        endpoint = "/ready"
        while True:
            child = self._child
            if child is None:
                raise ServerStartError("the server was stopped while it was starting")
            if not child.is_alive:
                raise ServerStartError(f"the server {child.crash_report()}", server=self.url, log_tail=self.log_tail())
            status = self._probe(endpoint)
            if status == 404:  # before SGLang had /ready
                endpoint = "/health"
            elif status == 200 and child.is_listening:
                child.forget_keys()
                return
            now = time.monotonic()
            if now > deadline:
                raise ServerStartError(
                    f"the server is not ready after {self.config.start_timeout_s:g} s and was ended. Give it longer "
                    f"(start_timeout_s), or see why in the log {child.log_path}, which ends:\n{self.log_tail(15)}",
                    server=self.url,
                    log_tail=self.log_tail(),
                )
            if progress is not None and now - said_at >= 1:
                said_at = now
                progress(f"{now - started:.0f} s: {last_meaningful_line(self.log_tail()) or 'starting'}")
            time.sleep(_POLL_S)

    def _probe(self, path: str) -> int | None:
        """HTTP status of ``path``; ``None`` when nobody answers. Probes need no key, no proxy and no trust."""
        host, port = command.probe_host(self.config.host), self._port
        if command.uses_tls(self.config):
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=_PROBE_TIMEOUT_S, context=ssl._create_unverified_context()
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=_PROBE_TIMEOUT_S)
        with contextlib.closing(connection):
            try:
                connection.request("GET", path)
                return connection.getresponse().status
            except (OSError, http.client.HTTPException):
                return None

    def _fail(self) -> None:
        with self._lock:
            if self._child is not None:
                self._child.keep_log = True
            self.stop(kill=True)

    def _release(self) -> None:
        """End what the last run may have left, and forget it."""
        child, self._child = self._child, None
        if child is None:
            return
        if self._finalizer is not None:
            self._finalizer.detach()
        self._last_log = read_end(child.log_path)
        child.end()
