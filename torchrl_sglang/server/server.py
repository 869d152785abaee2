"""One SGLang server as a child process."""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ServerError
from torchrl_sglang.server import command
from torchrl_sglang.server.cpu import needs_cpu_engine
from torchrl_sglang.server.environment import child_environment
from torchrl_sglang.server.lifecycle import ProcessLifecycle
from torchrl_sglang.server.locate import find_python
from torchrl_sglang.server.managed_process import LaunchSpec
from torchrl_sglang.server.model_check import refuse_unsupported_model
from torchrl_sglang.server.saved_adapters import check_saved_adapters
from torchrl_sglang.server.start_phases import start_phase

__all__ = ["SGLangServer", "start_limit_s"]

_SLOWEST_DISK_BYTES_PER_S = 200e6
_PROBE_TIMEOUT_S = 5.0  # an old server's /health generates a token, about a second


class SGLangServer:
    """An SGLang server process that belongs to this process.

    All its processes end with :meth:`stop`, at the end of a ``with`` block, when this object is collected, at
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
        self._lifecycle = _lifecycle(config, port=config.port)

    # ------------------------------------------------------------------ start

    def start(
        self, *, progress: Callable[[str], None] | None = None, weight_version: str | None = None
    ) -> SGLangServer:
        """Launch and wait until the server takes requests.

        Args:
            progress: called about once a second with one line: what the server is doing, and seconds so far.
            weight_version: what the server calls the checkpoint's weights; ``None`` is SGLang's ``"default"``.

        Returns:
            This object.

        Raises:
            ConfigError: something that can be checked beforehand is wrong; nothing was started.
            ServerStartError: it did not become ready; its processes have ended, its log is kept.
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
        self._lifecycle.launch(partial(_launch_spec, self.config, weight_version))

    def wait_ready(self, *, progress: Callable[[str], None] | None = None) -> None:
        """Wait until the launched server takes requests; kill it when it doesn't.

        Args:
            progress: called about once a second with one line: what the server is doing, and seconds so far.

        Raises:
            ServerStartError: it ended, or is not ready within ``config.start_timeout_s``.
        """
        self._lifecycle.wait_ready(progress=progress)

    def restart(self, *, progress: Callable[[str], None] | None = None) -> None:
        """Kill the server if it runs, and start it again at its address, with the checkpoint's weights.

        Raises:
            ServerStartError: it did not become ready again.
        """
        self.kill()
        self.start(progress=progress)

    # ------------------------------------------------------------------ state

    @property
    def url(self) -> str:
        """Base URL that clients can use.

        Raises:
            ConfigError: no port is known yet, because :meth:`launch` picks it.
        """
        return self._lifecycle.url

    @property
    def pid(self) -> int | None:
        """Process id of the server's main process; ``None`` when it is not running, or on an attached copy."""
        return self._lifecycle.pid

    @property
    def is_running(self) -> bool:
        """Whether the process runs (on an attached copy: whether the server answers at all)."""
        return self._lifecycle.is_running

    @property
    def has_crashed(self) -> bool:
        """Whether it ended by itself with an error, and was neither stopped nor reaped since."""
        return self._lifecycle.has_crashed

    @property
    def log_path(self) -> Path | None:
        """The server's log; ``None`` before the launch, after the end, and on attached copies."""
        return self._lifecycle.log_path

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log, keys blacked out; of the previous run when the server does not run."""
        return self._lifecycle.log_tail(lines)

    def check(self) -> None:
        """Raise when the server is not running.

        Raises:
            ServerError: it is not running; after a crash with exit code, likely cause and the end of the log.
        """
        self._lifecycle.check()

    # ------------------------------------------------------------------ stop

    def reap(self) -> str | None:
        """Clean up after a crash; the log stays.

        Returns:
            The crash report: how it ended, the likely cause and the end of the log; ``None`` if it has not crashed.
        """
        return self._lifecycle.reap()

    def kill(self) -> None:
        """Kill the server, to start it again later."""
        self.stop(kill=True)

    def stop(self, *, kill: bool = False) -> None:
        """End all processes of the server. Does nothing when it is not running, and on an attached copy.

        Args:
            kill: kill at once, which is safe: SGLang has nothing to save. Otherwise the server gets SIGTERM, finishes
                its running requests, and is killed after ``config.stop_timeout_s``.
        """
        self._lifecycle.stop(terminate_s=0.0 if kill else self.config.stop_timeout_s)

    def __enter__(self) -> SGLangServer:
        return self if self._lifecycle.is_launched else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ServerError):
            self._lifecycle.keep_log()
        self.stop(kill=error is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "port": self._lifecycle.port}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config = state["config"]
        self._lifecycle = _lifecycle(self.config, port=state["port"], attached=True)

    def __repr__(self) -> str:
        where = self.url if self._lifecycle.port is not None else "not launched"
        return f"SGLangServer({self.config.model!r}, {where}{'' if self._lifecycle.is_owner else ', attached'})"


def _lifecycle(config: ServerConfig, *, port: int | None, attached: bool = False) -> ProcessLifecycle:
    return ProcessLifecycle(
        "server",
        port=port,
        url=partial(command.build_url, config),
        probe=partial(_probe_ready, config),
        start_timeout_s=start_limit_s(config),
        phase=start_phase,
        attached=attached,
    )


def start_limit_s(config: ServerConfig) -> float:
    """Seconds from launch to ready: the configured ones, and what a slow disk takes to read a local checkpoint.

    Examples:
        >>> start_limit_s(ServerConfig(model="Qwen/Qwen3-0.6B", start_timeout_s=60))
        60.0
    """
    folder = Path(config.model).expanduser()
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return config.start_timeout_s + num_bytes / _SLOWEST_DISK_BYTES_PER_S


def _launch_spec(config: ServerConfig, weight_version: str | None) -> LaunchSpec:
    """How to start the server.

    Raises:
        ConfigError: something that can be checked beforehand is wrong.
    """
    command.check_config(config)
    check_saved_adapters(config.extra_args)
    cpu = needs_cpu_engine(config)
    refuse_unsupported_model(config, cpu=cpu)
    same_python = find_python(config) == sys.executable

    def build_command(port: int, rendezvous_port: int, key_file: Path | None) -> list[str]:
        return command.build_command(
            config,
            port=port,
            rendezvous_port=rendezvous_port,
            cpu=cpu,
            key_file=key_file,
            weight_version=weight_version,
        )

    return LaunchSpec(
        build_command=build_command,
        environment=child_environment(config, os.environ, cpu=cpu, same_python=same_python),
        host=config.host,
        log_name="sglang",
        log_dir=config.log_dir,
        keys=command.keys_as_yaml(config),
        secrets=command.key_spellings(config),
    )


def _probe_ready(config: ServerConfig, port: int) -> bool | None:
    """Whether the server on ``port`` takes requests; ``None`` when nothing answers."""
    status = _http_status(config, port, "/ready")
    if status == 404:  # SGLang before it had /ready
        status = _http_status(config, port, "/health")
    return None if status is None else status == 200


def _http_status(config: ServerConfig, port: int, path: str) -> int | None:
    """HTTP status of ``path``; ``None`` when nothing answers. Uses no key and no proxy, and trusts any certificate."""
    host = command.probe_host(config.host)
    if command.uses_tls(config):
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
