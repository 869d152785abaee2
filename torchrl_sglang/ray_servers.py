"""SGLang servers on a Ray cluster: one actor and one placement-group bundle each, on whichever node has room.

::

    ray.init(address="auto")
    with launch_on_ray("Qwen/Qwen3-8B", num_servers=4, tp_size=2) as engine:
        policy, scheme = SGLangWrapper(engine), SGLangWeightSyncScheme(engine)

An actor starts its server on its own node, with the GPUs that Ray has lent to it, and listens on the node's address.
A server never outlives its actor, and an actor never outlives the program that launched it. Everything else, prompts
and weights, goes straight between the trainer and the servers, as it does without Ray.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig, ServerConfig
from torchrl_sglang.config.checking import require, require_positive
from torchrl_sglang.engine import AsyncSGLang
from torchrl_sglang.engine.launching import client_config, server_configs
from torchrl_sglang.errors import ConfigError, ServerError, ServerStartError, SGLangError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server import SGLangServer, stop_fleet
from torchrl_sglang.server.diagnosis import last_meaningful_line

__all__ = ["RayPlacement", "RayServer", "import_ray", "launch_on_ray"]

_ANSWER_TIMEOUT_S = 30.0
"""An actor does nothing but answer: one that takes longer is cut off, or its node is."""
_START_MARGIN_S = 60.0  # Ray has to start a Python process, and import torch there, before the server's own time begins


@dataclass(frozen=True, slots=True, kw_only=True)
class RayPlacement:
    """What Ray sets aside for each server, and where."""

    cpus_per_server: float = 1.0
    """CPU cores of a bundle; its GPUs are ``tp_size``."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy for the bundles: few nodes, or as many as there are servers."""
    hosts: tuple[str | None, ...] | None = None
    """Address each server listens on; ``None`` is its node's address in the cluster."""
    timeout_s: float = 300.0
    """Longest wait for room in the cluster: an autoscaler may have to start nodes."""

    def __post_init__(self) -> None:
        require_positive(self, "timeout_s")
        require_positive(self, "cpus_per_server", zero=True)
        strategies = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
        require(self.strategy in strategies, f"strategy must be one of {strategies}, got {self.strategy!r}")
        if self.hosts is not None:
            require(not isinstance(self.hosts, str), f"hosts must be a list of addresses, got {self.hosts!r}")
            object.__setattr__(self, "hosts", tuple(self.hosts))


def launch_on_ray(
    model: str,
    *,
    num_servers: int = 1,
    tp_size: int = 1,
    placement: RayPlacement | None = None,
    restart: Literal["on-update", "on-failure", "never"] = "on-update",
    progress: Callable[[str], None] | None = None,
    client: ClientConfig | None = None,
    **server: Any,
) -> AsyncSGLang:
    """Launch servers in Ray actors and wait until they are ready.

    They listen on addresses that other machines reach: give an ``api_key`` where these are not your own.

    Args:
        model: path or hub name of the checkpoint; a path must be readable on every node.
        num_servers: how many.
        tp_size: GPUs per server, all on one node.
        placement: what Ray sets aside, and where.
        restart: as for :meth:`AsyncSGLang.from_pretrained`; a server whose actor has died is started again in its
            bundle and at its address, which fails when the node is gone.
        progress: called with a line of text while the servers load.
        client: how to talk to the servers; their keys are filled in.
        **server: fields of :class:`~torchrl_sglang.ServerConfig`.

    Returns:
        An engine that owns the servers: :meth:`AsyncSGLang.shutdown` ends them and gives their bundles back.

    Raises:
        ConfigError: Ray is not installed or not up, or an argument can't be honoured.
        ServerStartError: the cluster has no room, or a server did not become ready; all are ended.
    """
    placement = placement or RayPlacement()
    require(num_servers >= 1, f"num_servers must be at least 1, got {num_servers}")
    hosts: Sequence[str | None] = placement.hosts or (None,) * num_servers
    require(len(hosts) == num_servers, f"hosts must be {num_servers}, one per server, got {placement.hosts}")
    for name in ("host", "gpus"):
        require(server.get(name) is None, f"{name} is Ray's to decide: leave it out, or see RayPlacement(hosts=...)")
    require(
        server.get("port") is None or num_servers == 1,
        f"{num_servers} servers may share a node, but not port {server.get('port')}: leave port=None",
    )
    (config,) = server_configs(model, tp_size=tp_size, dp_size=1, gpus=None, given=server)
    ray = import_ray()
    require(
        ray.is_initialized(),
        "Ray is not up in this process: ray.init(address='auto') joins a cluster, ray.init() starts one here",
    )
    if config.device == "auto":
        config = replace(config, device="cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu")
    bundles = _Bundles(config, placement, num_servers)
    servers = [RayServer(config, bundles, index, host) for index, host in enumerate(hosts)]
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(stop_fleet, cast("list[SGLangServer]", servers), kill=True)
        for one in servers:
            one.launch()
        for one in servers:
            one.wait_ready(progress=progress)
        pool = SGLangPool([SGLangClient(one.url, client_config(client, config)) for one in servers])
        pool.connect()
        on_failure.pop_all()
    return AsyncSGLang(pool, cast("list[SGLangServer]", servers), restart=restart)


class RayServer:
    """One server in a Ray actor, with the methods of :class:`~torchrl_sglang.SGLangServer`.

    Args:
        config: what to serve, and how.
        bundles: what Ray has set aside.
        index: which of the bundles is this server's.
        host: address to listen on; ``None`` is the node's.

    Attributes:
        actor: Ray's handle of the actor; ``None`` when there is none.
    """

    def __init__(self, config: ServerConfig, bundles: _Bundles, index: int, host: str | None) -> None:
        self.config = config
        self._bundles = bundles
        self._index = index
        self._host = host
        self._url: str | None = None
        self.actor: Any = None
        self._starting: Any = None

    @property
    def url(self) -> str:
        """Base URL, known once the server has started.

        Raises:
            ConfigError: it has not.
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
        """Have Ray start the actor, and the actor the server; returns at once."""
        if self.actor is not None:
            self._end_actor()
        self.actor = self._bundles.start_actor(self._index, self.config, self._host)
        self._starting = self.actor.start.remote(weight_version)

    def wait_ready(self, *, progress: Callable[[str], None] | None = None) -> None:
        """Wait until the launched server takes requests; when it can't, end it.

        Raises:
            ServerStartError: it did not come up.
        """
        limit_s = self.config.start_timeout_s + _START_MARGIN_S
        deadline = time.monotonic() + limit_s
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.stop, kill=True)
            while not _is_done(self._starting):
                if time.monotonic() > deadline:
                    raise ServerStartError(
                        f"server {self._index} and its Ray actor were not up after {limit_s:.0f} s and were ended: see "
                        "`ray status`"
                    )
                if progress is not None:
                    line = self.actor.last_line.remote()
                    progress(f"server {self._index}: {_answer(line) if _is_done(line) else 'Ray starts its actor'}")
            self._url = _answer(self._starting, ServerStartError)
            # A new actor must come up where clients look for the server.
            host, port = self._url.rsplit("://")[-1].rsplit(":", 1)
            self._host, self.config = self._host or host.strip("[]"), replace(self.config, port=int(port))
            on_failure.pop_all()

    def restart(self, *, progress: Callable[[str], None] | None = None) -> None:
        """End the server and start it again, with the checkpoint's weights."""
        self.kill()
        self.start(progress=progress)

    def kill(self) -> None:
        """End the server at once, for it to be started again: its bundle is kept for it."""
        self._ask("stop", None, kill=True)
        self._end_actor()

    @property
    def pid(self) -> int | None:
        """Process id of the server on its node; ``None`` when it is not running."""
        return cast("int | None", self._ask("pid", None))

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return bool(self._ask("is_running", False))

    @property
    def has_crashed(self) -> bool:
        """Whether it ended by itself, or its actor or node did."""
        return self.actor is not None and bool(self._ask("has_crashed", True))

    def reap(self) -> str | None:
        """Clear up after a crash; how it ended, ``None`` when it has not crashed."""
        if not self.has_crashed:
            return None
        crash_report = self._ask("reap", "ended with its Ray actor, or its node")
        self._end_actor()
        return str(crash_report)

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log, keys blacked out; empty when the actor is gone."""
        return str(self._ask("log_tail", "", lines))

    def stop(self, *, kill: bool = False) -> None:
        """End the server and its actor. After the last server of a launch the bundles are given back."""
        self._ask("stop", None, kill=kill)
        self._end_actor()
        if import_ray().is_initialized():
            self._bundles.release(self._index)

    def __repr__(self) -> str:
        return f"RayServer({self.config.model!r}, {self._url or 'not started'})"

    def _ask(self, name: str, if_gone: Any, *args: Any, **options: Any) -> Any:
        if self.actor is None or not import_ray().is_initialized():
            return if_gone
        with contextlib.suppress(ServerError):  # the actor is gone, or cut off: so is its server for us
            return _answer(self.actor.ask.remote(name, *args, **options))
        return if_gone

    def _end_actor(self) -> None:
        actor, self.actor, self._starting = self.actor, None, None
        if actor is not None and import_ray().is_initialized():
            import_ray().kill(actor)


class _Bundles:
    """A placement group that is there as long as one of its servers is."""

    def __init__(self, config: ServerConfig, placement: RayPlacement, num_servers: int) -> None:
        self._cpus = placement.cpus_per_server
        self._gpus = config.tp_size if config.device == "cuda" else 0
        self._bundle = {name: float(count) for name, count in (("CPU", self._cpus), ("GPU", self._gpus)) if count}
        require(bool(self._bundle), "a server needs a GPU or a part of a CPU: raise cpus_per_server")
        self._placement = placement
        self._num_servers = num_servers
        self._lock = threading.Lock()
        self._used: set[int] = set()
        self._group: Any = None

    def start_actor(self, index: int, config: ServerConfig, host: str | None) -> Any:
        """The actor of server ``index``. A crash is reported; whether it is started again is ours to decide.

        Raises:
            ServerStartError: the cluster has no room.
        """
        ray = import_ray()
        with self._lock:
            if self._group is None:
                self._group = self._set_aside()
            self._used.add(index)
            strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group, index)
        settings = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_concurrency": 4, "max_restarts": 0}
        return ray.remote(**settings, scheduling_strategy=strategy)(_Holder).remote(config, host)

    def release(self, index: int) -> None:
        """Server ``index`` has ended; after the last one the bundles are given back."""
        with self._lock:
            self._used.discard(index)
            if not self._used and self._group is not None:
                group, self._group = self._group, None
                import_ray().util.remove_placement_group(group)

    def _set_aside(self) -> Any:
        ray, placement = import_ray(), self._placement
        group = ray.util.placement_group([self._bundle] * self._num_servers, strategy=placement.strategy)
        with contextlib.ExitStack() as otherwise:  # also at Ctrl-C, which comes mostly here
            otherwise.callback(ray.util.remove_placement_group, group)
            if group.wait(placement.timeout_s):
                otherwise.pop_all()
                return group
            total, free = ray.cluster_resources(), ray.available_resources()
        raise ServerStartError(
            f"no room for {self._num_servers} x {self._bundle} ({placement.strategy}) after {placement.timeout_s:g} s. "
            f"The cluster has {total}, of which {free} is free. Ask for less, or end what holds the rest (`ray status`)"
        )


class _Holder:
    """Lives in the actor and holds a server; calls come in several threads."""

    def __init__(self, config: ServerConfig, host: str | None) -> None:
        self._server = SGLangServer(replace(config, host=host or import_ray().util.get_node_ip_address()))

    def start(self, weight_version: str | None) -> str:
        """Start and return the address."""
        self._server.start(weight_version=weight_version)
        return self._server.url

    def last_line(self) -> str:
        """What the server last said."""
        return last_meaningful_line(self._server.log_tail(15)) or "starting"

    def ask(self, name: str, *args: Any, **options: Any) -> Any:
        """An attribute of the server, or what its method returns."""
        found = getattr(self._server, name)
        return found(*args, **options) if callable(found) else found


def import_ray() -> Any:
    """The module, imported when it is first needed.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ConfigError("Ray is not installed: pip install 'torchrl-sglang[ray]'") from error
    return ray


def _is_done(future: Any, wait_s: float = 1.0) -> bool:
    return bool(import_ray().wait([future], timeout=wait_s)[0])


def _answer(future: Any, error_type: type[ServerError] = ServerError) -> Any:
    """What a call to an actor returned; its own errors as they were raised there."""
    ray = import_ray()
    try:
        return ray.get(future, timeout=_ANSWER_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SGLangError):
            raise error.cause from None
        raise
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        raise error_type(f"the Ray actor of a server has died, or its node is cut off: {error}") from error
