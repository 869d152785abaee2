"""Launches servers in Ray actors and returns an engine that owns them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig, ServerConfig
from torchrl_sglang.config.checking import require, require_number
from torchrl_sglang.engine import AsyncSGLang
from torchrl_sglang.engine.launching import client_config, server_configs
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.ray_servers.placement import PlacementGroup, RayPlacement
from torchrl_sglang.ray_servers.ray_calls import import_ray
from torchrl_sglang.ray_servers.server import RayServer
from torchrl_sglang.server import SGLangServer, stop_fleet

__all__ = ["launch_on_ray"]


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

    The servers listen on addresses that other machines reach, and so have a random key (:attr:`AsyncSGLang.api_key`)
    unless ``api_key``, ``api_key_file`` or ``api_key=False`` is given.

    Args:
        model: path or hub name of the checkpoint; a path must be readable on every node.
        num_servers: number of servers.
        tp_size: GPUs per server, all on one node.
        placement: what Ray reserves for each server, and where.
        restart: as for :meth:`AsyncSGLang.from_pretrained`. A server whose actor has died is started again in its
            bundle and at its address, which fails when the node is gone.
        progress: called with a line of text while the servers load.
        client: settings of the clients; the servers' keys are filled in.
        **server: fields of :class:`~torchrl_sglang.ServerConfig`.

    Returns:
        An engine that owns the servers: :meth:`AsyncSGLang.shutdown` stops them and returns their bundles to Ray.

    Raises:
        ConfigError: Ray is not installed or not initialised, or an argument can't be honoured.
        ServerStartError: the cluster has no room, or a server did not become ready; all servers are stopped.
    """
    placement = placement or RayPlacement()
    hosts = _hosts(placement, num_servers, server)
    config = _server_config(model, tp_size, server)
    group = PlacementGroup(config, placement, num_servers)
    with contextlib.ExitStack() as on_failure:
        servers = _start([RayServer(config, group, index, host) for index, host in enumerate(hosts)], progress)
        on_failure.callback(stop_fleet, servers, kill=True)
        pool = SGLangPool([SGLangClient(one.url, client_config(client, config)) for one in servers])
        pool.connect()
        on_failure.pop_all()
    return AsyncSGLang(pool, servers, restart=restart, launcher=RayLauncher(config, placement, group))


class RayLauncher:
    """Starts more servers in actors of their own: where servers have left, or wherever Ray has room.

    Args:
        config: the settings of all servers.
        placement: what Ray reserves for each. Its ``hosts`` are those of the first servers; further ones listen on
            their node's address.
        group: the bundles of the first servers.
    """

    def __init__(self, config: ServerConfig, placement: RayPlacement, group: PlacementGroup) -> None:
        self._config = replace(config, port=None)
        self._placement = replace(placement, hosts=None)
        self._groups = [group]

    def start(
        self,
        num_servers: int,
        running: Sequence[SGLangServer],
        *,
        gpus: Sequence[Sequence[int]] | None,
        progress: Callable[[str], None],
    ) -> list[SGLangServer]:
        """See :class:`~torchrl_sglang.engine.fleet.Launcher`."""
        require(gpus is None, "gpus are Ray's to decide: leave them out")
        free = [(group, index) for group in self._groups for index in group.free_bundles]
        new = [PlacementGroup(self._config, self._placement, 1) for _ in range(num_servers - len(free))]
        self._groups = [group for group in self._groups if group.is_reserved] + new
        places = [*free, *((group, 0) for group in new)][:num_servers]
        return _start([RayServer(self._config, group, index, None) for group, index in places], progress)


def _start(servers: Sequence[RayServer], progress: Callable[[str], None] | None) -> list[SGLangServer]:
    """Launch all, then wait for all; after a failure none is left."""
    # A RayServer has the methods of an SGLangServer that the engine uses, but is not one.
    as_servers = cast("list[SGLangServer]", list(servers))
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(stop_fleet, as_servers, kill=True)
        for one in servers:
            one.launch()
        for one in servers:
            one.wait_ready(progress=progress)
        on_failure.pop_all()
    return as_servers


def _hosts(placement: RayPlacement, num_servers: int, server: Mapping[str, Any]) -> Sequence[str | None]:
    """The address each server listens on, once the settings that Ray decides have been refused."""
    require_number("num_servers", num_servers, whole=True, at_least=1)
    hosts: Sequence[str | None] = placement.hosts or (None,) * num_servers
    require(len(hosts) == num_servers, f"hosts must be {num_servers}, one per server, got {placement.hosts}")
    for name in ("host", "gpus"):
        require(server.get(name) is None, f"{name} is Ray's to decide: leave it out, or see RayPlacement(hosts=...)")
    require(
        server.get("port") is None or num_servers == 1,
        f"{num_servers} servers may share a node, but not port {server.get('port')}: leave port=None",
    )
    return hosts


def _server_config(model: str, tp_size: int, server: Mapping[str, Any]) -> ServerConfig:
    (config,) = server_configs(model, tp_size=tp_size, dp_size=1, gpus=None, given=server)
    ray = import_ray()
    require(
        ray.is_initialized(),
        "Ray is not initialised in this process: ray.init(address='auto') joins a cluster, ray.init() starts one here",
    )
    if config.device == "auto":
        return replace(config, device="cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu")
    return config
