"""An ``sglang-router`` as a child process: launched, waited for, and gone with us like the servers behind it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import threading
import time
import weakref
from typing import Any

from torchrl_sglang.config import RouterConfig
from torchrl_sglang.errors import ConfigError, ServerStartError
from torchrl_sglang.server.command import join_url, probe_host
from torchrl_sglang.server.environment import is_trainers_own
from torchrl_sglang.server.managed_process import Child, read_end

__all__ = ["SGLangRouter"]

_POLL_S = 0.1
_INSTALL = (
    'pip install "torchrl-sglang[router]" (or --no-deps sglang-router, where pip must not touch SGLang\'s packages)'
)


class SGLangRouter:
    """A router process that belongs to this process; it knows no servers until it is told (:class:`RouterClient`).

    Args:
        config: how it is launched. Nothing is started yet.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self._port = config.port
        self._child: Child | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._lock = threading.RLock()

    def start(self) -> SGLangRouter:
        """Launch it and wait until it listens.

        Raises:
            ConfigError: sglang-router is not installed.
            ServerStartError: it did not come up; nothing is left of it but its log.
        """
        python = self._find_python()
        with self._lock:
            self.stop()
            self._child = Child.run(
                lambda port, metrics_port, _: [python, *self._words(port, metrics_port)],
                name="router",
                host=self.config.host,
                port=self._port,
                variables={name: value for name, value in os.environ.items() if not is_trainers_own(name)},
                log_dir=self.config.log_dir,
            )
            self._port = self._child.port
            self._finalizer = weakref.finalize(self, self._child.end)
        self._wait_listening(self._child)
        return self

    @property
    def url(self) -> str:
        """Base URL; known once it is started."""
        return join_url("http", probe_host(self.config.host), self._port)

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._child is not None and self._child.is_alive

    @property
    def pid(self) -> int | None:
        """Process id; ``None`` when it is not running."""
        child = self._child
        return child.pid if child is not None and child.is_alive else None

    @property
    def has_crashed(self) -> bool:
        """Whether it ended by itself with an error."""
        return self._child is not None and self._child.has_crashed

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of its log."""
        log = "" if self._child is None else read_end(self._child.log_path)
        return "\n".join(log.splitlines()[-lines:])

    def stop(self) -> None:
        """End it at once; requests on their way through it are lost."""
        with self._lock:
            child, self._child = self._child, None
            if child is None:
                return
            if self._finalizer is not None:
                self._finalizer.detach()
            child.keep_log = child.keep_log or child.has_crashed
            child.end()

    def _words(self, port: int, metrics_port: int) -> list[str]:
        return [
            *("-m", "sglang_router.launch_router", "--host", self.config.host, "--port", str(port)),
            *("--policy", self.config.policy),
            # Its metrics have a port of their own, the same one for every router of a machine if it isn't told.
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
            # By itself it sends a failed request to the next server, whether or not the first still works on it.
            "--disable-retries",
            *self.config.extra_args,
        ]

    def _find_python(self) -> str:
        if self.config.python is not None:
            found = shutil.which(self.config.python)
            if found is None:
                raise ConfigError(f"RouterConfig(python={self.config.python!r}) is not an executable file")
            return found
        if importlib.util.find_spec("sglang_router") is None:
            raise ConfigError(f"router=True needs the package sglang-router: {_INSTALL}")
        return sys.executable

    def _wait_listening(self, child: Child) -> None:
        deadline = time.monotonic() + self.config.start_timeout_s
        while not (child.is_listening and self._accepts()):
            if not child.is_alive or time.monotonic() > deadline:
                child.keep_log = True
                tail = self.log_tail()
                what = child.crash_report() if not child.is_alive else f"does not listen. Log: {child.log_path}"
                hint = f" Install it: {_INSTALL}." if "No module named" in tail else ""
                self.stop()
                raise ServerStartError(f"the router {what}{hint}", server=self.url, log_tail=tail)
            time.sleep(_POLL_S)

    def _accepts(self) -> bool:
        try:
            socket.create_connection((probe_host(self.config.host), self._port), timeout=1).close()
        except OSError:
            return False
        return True
