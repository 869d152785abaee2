"""An ``sglang-router`` as a child process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from functools import partial
from pathlib import Path

from torchrl_sglang.config import RouterConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server.command import join_url, probe_host
from torchrl_sglang.server.diagnosis import INSTALL_ROUTER
from torchrl_sglang.server.environment import router_environment
from torchrl_sglang.server.lifecycle import ProcessLifecycle
from torchrl_sglang.server.managed_process import LaunchSpec

__all__ = ["SGLangRouter"]


class SGLangRouter:
    """A router process that belongs to this process; it has no servers until :class:`RouterClient` adds them.

    It ends like an :class:`SGLangServer`: with :meth:`stop`, when this object is collected, and with this process.

    Args:
        config: how it is launched. Nothing is started yet.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self._lifecycle = ProcessLifecycle(
            "router",
            port=config.port,
            url=partial(join_url, "http", probe_host(config.host)),
            probe=partial(_probe_accepts, config),
            start_timeout_s=config.start_timeout_s,
        )

    def start(self) -> SGLangRouter:
        """Launch it and wait until it listens; a router that runs is killed first.

        Raises:
            ConfigError: sglang-router is not installed.
            ServerStartError: it did not become ready; its process has ended, its log is kept.
        """
        self.stop()
        self._lifecycle.launch(partial(_launch_spec, self.config))
        self._lifecycle.wait_ready()
        return self

    @property
    def url(self) -> str:
        """Base URL.

        Raises:
            ConfigError: no port is known yet, because :meth:`start` picks it.
        """
        return self._lifecycle.url

    @property
    def is_running(self) -> bool:
        """Whether the process runs."""
        return self._lifecycle.is_running

    @property
    def pid(self) -> int | None:
        """Process id; ``None`` when it is not running."""
        return self._lifecycle.pid

    @property
    def has_crashed(self) -> bool:
        """Whether it ended by itself with an error, and was not stopped since."""
        return self._lifecycle.has_crashed

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of its log."""
        return self._lifecycle.log_tail(lines)

    def stop(self) -> None:
        """Kill it; requests that pass through it are lost."""
        self._lifecycle.stop()


def _launch_spec(config: RouterConfig) -> LaunchSpec:
    """How to start the router.

    Raises:
        ConfigError: sglang-router is not installed.
    """
    python = _find_python(config)

    def build_command(port: int, metrics_port: int, _key_file: Path | None) -> list[str]:
        return [
            *(python, "-m", "sglang_router.launch_router", "--host", config.host, "--port", str(port)),
            *("--policy", config.policy),
            # Metrics use a port of their own; the router's default is the same for all routers of a machine.
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
            # By default it sends a failed request to the next server, even when the first still works on it.
            "--disable-retries",
            *config.extra_args,
        ]

    return LaunchSpec(
        build_command=build_command,
        environment=router_environment(os.environ, config.host),
        host=config.host,
        log_name="router",
        log_dir=config.log_dir,
    )


def _find_python(config: RouterConfig) -> str:
    if config.python is not None:
        found = shutil.which(config.python)
        if found is None:
            raise ConfigError(f"RouterConfig(python={config.python!r}) is not an executable file")
        return found
    if importlib.util.find_spec("sglang_router") is None:
        raise ConfigError(f"router=True needs the package sglang-router: {INSTALL_ROUTER}")
    return sys.executable


def _probe_accepts(config: RouterConfig, port: int) -> bool | None:
    """``True`` when something accepts connections on ``port``, else ``None``."""
    try:
        socket.create_connection((probe_host(config.host), port), timeout=1).close()
    except OSError:
        return None
    return True
