"""The servers of a chaos run, each at an address that it keeps, and what can be done to them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tests.chaos.tcp_proxy import TcpProxy
from tests.fake_sglang import FakeSettings, Fault
from tests.loop.forked_processes import ForkedServer, ProcessFactory
from torchrl_sglang import ServerConfig
from torchrl_sglang.errors import ServerError
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.server.supervisor import tree_pids

__all__ = ["FakeSeat", "RealSeat", "Seat"]

_COLLECTIVE_S = 41.0
"""How long a rank waits in a group whose trainer was killed: what servers that this package launched read from the
group's name under the time limits of a chaos run. Others wait for torch's 30 minutes."""


class Seat(Protocol):
    """One address, and the server at it."""

    url: str
    proxy: TcpProxy | None

    def kill(self) -> None:
        """End the server by SIGKILL."""

    def restart(self) -> None:
        """Start a new one at the address, as a supervisor elsewhere does: with the checkpoint's weights."""

    def freeze(self) -> None:
        """Stop its processes; connections stay open."""

    def thaw(self) -> None:
        """Let them continue."""

    def arm(self, fault: Fault) -> None:
        """Make a fake server misbehave; a real one can't."""

    @property
    def is_running(self) -> bool:
        """Whether its server's process runs, or is being started."""

    def settle(self) -> None:
        """End what was armed, and wait for a restart under way."""

    def close(self) -> None:
        """End everything."""


class FakeSeat:
    """A fake server, forked in milliseconds."""

    def __init__(self, processes: ProcessFactory, model: Path, *, proxied: bool) -> None:
        self._processes = processes
        settings = FakeSettings(model_path=model, step_s=0.004, collective_timeout_s=_COLLECTIVE_S)
        self._server: ForkedServer = processes.start_server(settings)
        port = int(self._server.url.rsplit(":", 1)[1])
        self._settings = replace(self._server.settings, port=port)
        self.proxy = TcpProxy(("127.0.0.1", port)) if proxied else None
        self.url = self.proxy.url if self.proxy is not None else self._server.url

    def kill(self) -> None:
        self._server.kill()

    def restart(self) -> None:
        self._server.kill()
        self._server = self._processes.start_server(self._settings)

    def freeze(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._server.suspend()

    def thaw(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._server.resume()

    def arm(self, fault: Fault) -> None:
        with contextlib.suppress(OSError, urllib.error.URLError):  # it is dead or frozen
            self._server.arm(fault)

    @property
    def is_running(self) -> bool:
        return self._server.is_running

    def settle(self) -> None:
        with contextlib.suppress(OSError, urllib.error.URLError):
            self._server.disarm()

    def close(self) -> None:
        if self.proxy is not None:
            self.proxy.close()
        self._server.kill()


class RealSeat:
    """A real SGLang server on the CPU engine; a start takes half a minute."""

    def __init__(self, model: Path, folder: Path, *, proxied: bool) -> None:
        config = ServerConfig(
            model=str(model), device="cpu", log_dir=folder, stop_timeout_s=0, start_timeout_s=300, max_total_tokens=8192
        )
        self._server = SGLangServer(config).start()
        self._restarting: threading.Thread | None = None
        port = int(self._server.url.rsplit(":", 1)[1])
        self.proxy = TcpProxy(("127.0.0.1", port)) if proxied else None
        self.url = self._server.url if self.proxy is None else self.proxy.url

    def kill(self) -> None:
        self.settle()
        self._server.kill()

    def restart(self) -> None:
        self.settle()
        self._restarting = threading.Thread(target=self._restart, name="restart")
        self._restarting.start()

    def _restart(self) -> None:
        with contextlib.suppress(ServerError):  # the arena restarts what does not run
            self._server.restart()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        pid = self._server.pid
        for each in {pid, *tree_pids(pid)} if pid is not None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, number)

    def arm(self, fault: Fault) -> None:
        raise NotImplementedError("a real server has no faults to arm")

    @property
    def is_running(self) -> bool:
        return (self._restarting is not None and self._restarting.is_alive()) or self._server.is_running

    def settle(self) -> None:
        if self._restarting is not None:
            self._restarting.join()

    def close(self) -> None:
        self.settle()
        if self.proxy is not None:
            self.proxy.close()
        self._server.stop(kill=True)
