"""The server processes of an engine: starts more of them, and ends some, while the others generate."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config.checking import require, require_number
from torchrl_sglang.errors import ConfigError, ServerStartError
from torchrl_sglang.forks import ForkSafeLock
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server import SGLangServer, stop_fleet
from torchrl_sglang.server_url import base_url

__all__ = ["Fleet", "Launcher"]


class Launcher(Protocol):
    """Starts servers like those that an engine has launched."""

    def start(
        self,
        num_servers: int,
        running: Sequence[SGLangServer],
        *,
        gpus: Sequence[Sequence[int]] | None,
        progress: Callable[[str], None],
    ) -> Sequence[SGLangServer]:
        """Start servers and wait until they are ready.

        Args:
            num_servers: how many.
            running: those that run already.
            gpus: GPUs of each; ``None`` chooses free ones.
            progress: called with a line of text while they load; what it raises ends them.

        Raises:
            ConfigError: there is no room for them.
            ServerStartError: one did not become ready; all of them were ended.
        """


class Fleet:
    """The servers that one engine has launched.

    Args:
        pool: all servers of the engine; the first ones are those that it has launched.
        servers: the processes, in the pool's order.
        launcher: starts more; ``None`` if the engine launches none.
    """

    def __init__(self, pool: SGLangPool, servers: Sequence[SGLangServer], launcher: Launcher | None) -> None:
        self._pool = pool
        self._launcher = launcher
        self._processes = dict(zip([client.url for client in pool.clients], servers, strict=False)) if servers else {}
        self._joining: frozenset[str] = frozenset()
        self._changing = ForkSafeLock()
        self._ended = threading.Event()

    @property
    def servers(self) -> tuple[SGLangServer, ...]:
        """The processes."""
        return tuple(self._processes.values())

    @property
    def launched(self) -> tuple[tuple[SGLangClient, SGLangServer], ...]:
        """The processes with their clients, without those that are about to leave."""
        known, has_left = dict(self._processes), self._pool.state.has_left
        pairs = ((client, known.get(client.url)) for client in self._pool.clients if not has_left(client.url))
        return tuple((client, process) for client, process in pairs if process is not None)

    @property
    def own_urls(self) -> frozenset[str]:
        """The URLs of the processes, also of those that are just being taken into the pool."""
        return self._joining.union(self._processes)

    def end(self) -> None:
        """Start nothing more; a start under way is abandoned."""
        self._ended.set()

    def add(
        self, num_servers: int, *, gpus: Sequence[Sequence[int]] | None, progress: Callable[[str], None] | None
    ) -> tuple[str, ...]:
        """Launch servers and take them into the pool. All join, or none of them is left."""
        require_number("the number of servers to add", num_servers, whole=True, at_least=1)
        with self._changing:
            return self._add(num_servers, gpus, progress)

    def _add(
        self, num_servers: int, gpus: Sequence[Sequence[int]] | None, progress: Callable[[str], None] | None
    ) -> tuple[str, ...]:
        if self._launcher is None:
            raise ConfigError(
                "this engine has launched no servers and does not know how: start them yourself and give their URLs, "
                "engine.add(urls)"
            )
        self._pool.refuse_while_offloaded()
        started = self._launcher.start(num_servers, self.servers, gpus=gpus, progress=self._unless_ended(progress))
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(stop_fleet, started, kill=True)
            self._require_running()
            self._joining = frozenset(base_url(server.url) for server in started)
            try:
                urls = self._pool.add([server.url for server in started])
                self._processes.update(zip(urls, started, strict=True))
            finally:
                self._joining = frozenset()
            on_failure.pop_all()
        if self._ended.is_set():  # after shutdown() has ended those that it knew
            stop_fleet(started, kill=True)
        return urls

    def remove(self, urls: Sequence[str], *, drain: bool, timeout_s: float | None) -> None:
        """Take servers out of the pool, and end those that were launched."""
        self._pool.take_out(urls, drain=drain, timeout_s=timeout_s, on_left=self._stop)

    def _stop(self, url: str) -> None:
        process = self._processes.get(url)
        if process is not None:
            process.stop(kill=True)  # it has nothing to save, and SIGTERM takes up to 10 s
            self._processes.pop(url, None)

    def scale_to(
        self,
        num_servers: int,
        *,
        gpus: Sequence[Sequence[int]] | None,
        drain: bool,
        timeout_s: float | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        """Launch or end servers until the pool has this many."""
        require_number("the number of servers", num_servers, whole=True, at_least=1)
        with self._changing:
            missing = num_servers - len(self._pool.clients)
            require(gpus is None or missing > 0, "gpus are those of servers to launch, and none has to be launched")
            if missing > 0:
                self._add(missing, gpus, progress)
            elif missing < 0:
                self.remove(self._dispensable(-missing), drain=drain, timeout_s=timeout_s)

    def _dispensable(self, count: int) -> list[str]:
        """The launched servers to end: first those that take no requests, then the newest.

        Raises:
            ConfigError: there are fewer.
        """
        state = self._pool.state
        newest_first = [client.url for client, _ in reversed(self.launched)]
        if len(newest_first) < count:
            raise ConfigError(
                f"{count} servers would have to end, but this engine has launched only {len(newest_first)}: take the "
                "others out by name, engine.remove(urls)"
            )
        return sorted(newest_first, key=lambda url: state.server(url).is_routed)[:count]

    def _unless_ended(self, progress: Callable[[str], None] | None) -> Callable[[str], None]:
        def show(line: str) -> None:
            self._require_running()
            if progress is not None:
                progress(line)

        return show

    def _require_running(self) -> None:
        if self._ended.is_set():
            raise ServerStartError("the engine was shut down while servers were starting")
