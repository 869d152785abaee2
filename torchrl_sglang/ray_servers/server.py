"""One server in a Ray actor: :class:`RayServer` in the trainer's process, and the actor that runs the server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError, ServerError, ServerStartError
from torchrl_sglang.ray_servers.placement import PlacementGroup
from torchrl_sglang.ray_servers.ray_calls import get_result, import_ray, is_done
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.server.server import start_limit_s
from torchrl_sglang.server.start_phases import start_phase

__all__ = ["RayServer"]

_START_MARGIN_S = 60.0  # Ray first starts a Python process and imports torch in it; only then the server starts


class RayServer:
    """One server in a Ray actor, with the methods of :class:`~torchrl_sglang.SGLangServer`.

    Args:
        config: what to serve, and how.
        group: the placement group.
        index: this server's bundle in the group.
        host: address to listen on; ``None`` is the node's.

    Attributes:
        actor: Ray's handle of the actor; ``None`` when there is none.
    """

    def __init__(self, config: ServerConfig, group: PlacementGroup, index: int, host: str | None) -> None:
        self.config = config
        self._group = group
        self._index = index
        self._host = host
        self._url: str | None = None
        self.actor: Any = None
        self._starting: Any = None

    @property
    def url(self) -> str:
        """Base URL.

        Raises:
            ConfigError: the server has not started, and Ray chooses its node.
        """
        if self._url is None:
            raise ConfigError("the server's address is known once it has started: Ray chooses the node")
        return self._url

    def start(self, *, progress: Callable[[str], None] | None = None, weight_version: str | None = None) -> RayServer:
        """Launch and wait, see :meth:`SGLangServer.start`."""
        self.launch(weight_version=weight_version)
        self.wait_ready(progress=progress)
        return self

    def launch(self, *, weight_version: str | None = None) -> None:
        """Start the actor, which starts the server, and return at once."""
        if self.actor is not None:
            self._end_actor()
        self.actor = self._group.start_actor(self._index, _ServerActor, self.config, self._host)
        self._starting = self.actor.start.remote(weight_version)

    def wait_ready(self, *, progress: Callable[[str], None] | None = None) -> None:
        """Wait until the launched server takes requests; kill it when it doesn't.

        One that has run before keeps its bundle after a failure: it has to come back there, and to its address.

        Raises:
            ServerStartError: it did not become ready.
        """
        limit_s = start_limit_s(self.config) + _START_MARGIN_S
        deadline = time.monotonic() + limit_s
        actor, starting = self.actor, self._starting  # stop() in another thread forgets them
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.kill if self._url is not None else partial(self.stop, kill=True))
            while not is_done(starting):
                if time.monotonic() > deadline:
                    raise ServerStartError(
                        f"server {self._index} and its Ray actor were not ready after {limit_s:.0f} s and were killed: "
                        "see `ray status`"
                    )
                if progress is not None:
                    phase = actor.phase.remote()
                    progress(f"server {self._index}: {get_result(phase) if is_done(phase) else 'Ray starts its actor'}")
            self._url = get_result(starting, ServerStartError)
            # After a restart the server must be at the address that clients know.
            host, port = self._url.rsplit("://")[-1].rsplit(":", 1)
            self._host, self.config = self._host or host.strip("[]"), replace(self.config, port=int(port))
            on_failure.pop_all()

    def restart(self, *, progress: Callable[[str], None] | None = None) -> None:
        """Kill the server and start it again, with the checkpoint's weights."""
        self.kill()
        self.start(progress=progress)

    def kill(self) -> None:
        """Kill the server to start it again later: its bundle stays reserved."""
        self._call("stop", None, kill=True)
        self._end_actor()

    @property
    def pid(self) -> int | None:
        """Process id of the server on its node; ``None`` when it is not running."""
        return cast("int | None", self._call("pid", None))

    @property
    def is_running(self) -> bool:
        """Whether the process runs."""
        return bool(self._call("is_running", False))

    @property
    def has_crashed(self) -> bool:
        """Whether the server, its actor or its node ended by itself."""
        return self.actor is not None and bool(self._call("has_crashed", True))

    def reap(self) -> str | None:
        """Clean up after a crash and return the crash report; ``None`` when it has not crashed."""
        if not self.has_crashed:
            return None
        crash_report = self._call("reap", "ended with its Ray actor, or its node")
        self._end_actor()
        return str(crash_report)

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log, keys blacked out; empty when the actor is gone."""
        return str(self._call("log_tail", "", lines))

    def stop(self, *, kill: bool = False) -> None:
        """Stop the server and its actor. After the last server of a launch Ray gets the bundles back."""
        self._call("stop", None, kill=kill)
        self._end_actor()
        if import_ray().is_initialized():
            self._group.release(self._index)

    def __repr__(self) -> str:
        return f"RayServer({self.config.model!r}, {self._url or 'not started'})"

    def _call(self, name: str, if_gone: Any, *args: Any, **options: Any) -> Any:
        """An attribute of the server in the actor, or the result of its method; ``if_gone`` without an actor."""
        if self.actor is None or not import_ray().is_initialized():
            return if_gone
        with contextlib.suppress(ServerError):  # the actor is dead or unreachable, and so is its server
            return get_result(self.actor.call.remote(name, *args, **options))
        return if_gone

    def _end_actor(self) -> None:
        actor, self.actor, self._starting = self.actor, None, None
        if actor is not None and import_ray().is_initialized():
            import_ray().kill(actor)


class _ServerActor:
    """Runs in the actor and owns the server. Ray calls its methods from several threads."""

    def __init__(self, config: ServerConfig, host: str | None) -> None:
        self._server = SGLangServer(replace(config, host=host or import_ray().util.get_node_ip_address()))

    def start(self, weight_version: str | None) -> str:
        """Start and return the address."""
        self._server.start(weight_version=weight_version)
        return self._server.url

    def phase(self) -> str:
        """What the server is doing while it starts."""
        return start_phase(self._server.log_tail(100_000))

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """An attribute of the server, or the result of its method."""
        found = getattr(self._server, name)
        return found(*args, **options) if callable(found) else found
