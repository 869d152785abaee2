"""What Ray reserves for servers, and where: the setting, and the placement group made from it."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Any, Literal

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.config.checking import require, require_numbers
from torchrl_sglang.errors import ServerStartError
from torchrl_sglang.ray_servers.ray_calls import import_ray

__all__ = ["PlacementGroup", "RayPlacement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RayPlacement:
    """What Ray reserves for each server, and where."""

    cpus_per_server: float = 1.0
    """CPU cores of a bundle; its GPUs are ``tp_size``."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy for the bundles: few nodes, or as many as there are servers."""
    hosts: tuple[str | None, ...] | None = None
    """Address each server listens on; ``None`` is its node's address in the cluster."""
    timeout_s: float = 300.0
    """Longest wait for room in the cluster: an autoscaler may have to start nodes."""

    def __post_init__(self) -> None:
        require_numbers(self, "timeout_s", above=0)
        require_numbers(self, "cpus_per_server", at_least=0)
        strategies = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
        require(self.strategy in strategies, f"strategy must be one of {strategies}, got {self.strategy!r}")
        if self.hosts is not None:
            require(not isinstance(self.hosts, str), f"hosts must be a list of addresses, got {self.hosts!r}")
            object.__setattr__(self, "hosts", tuple(self.hosts))


class PlacementGroup:
    """A Ray placement group, one bundle per server; made with the first actor, removed with the last server.

    Args:
        config: the settings of all servers; tells how many GPUs a bundle has.
        placement: what Ray reserves, and where.
        num_servers: number of bundles.
    """

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

    @property
    def is_reserved(self) -> bool:
        """Whether Ray holds the bundles for this group."""
        with self._lock:
            return self._group is not None

    @property
    def free_bundles(self) -> list[int]:
        """Bundles that Ray holds for this group, and in which no server runs: theirs have left."""
        with self._lock:
            if self._group is None:
                return []
            return [index for index in range(self._num_servers) if index not in self._used]

    def start_actor(self, index: int, actor_class: type, *args: Any) -> Any:
        """Start an actor in bundle ``index``. Ray does not restart it after a crash: that is the engine's decision.

        Args:
            index: the bundle.
            actor_class: class of the actor.
            *args: arguments of the class.

        Returns:
            Ray's handle of the actor.

        Raises:
            ServerStartError: the cluster has no room.
        """
        ray = import_ray()
        with self._lock:
            if self._group is None:
                self._group = self._reserve()
            self._used.add(index)
            strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group, index)
        settings = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_concurrency": 4, "max_restarts": 0}
        return ray.remote(**settings, scheduling_strategy=strategy)(actor_class).remote(*args)

    def release(self, index: int) -> None:
        """Server ``index`` has ended; after the last one Ray gets the bundles back."""
        with self._lock:
            self._used.discard(index)
            if not self._used and self._group is not None:
                group, self._group = self._group, None
                import_ray().util.remove_placement_group(group)

    def _reserve(self) -> Any:
        ray, placement = import_ray(), self._placement
        group = ray.util.placement_group([self._bundle] * self._num_servers, strategy=placement.strategy)
        with contextlib.ExitStack() as otherwise:  # also on Ctrl-C, which mostly arrives during this wait
            otherwise.callback(ray.util.remove_placement_group, group)
            if group.wait(placement.timeout_s):
                otherwise.pop_all()
                return group
            total, free = ray.cluster_resources(), ray.available_resources()
        raise ServerStartError(
            f"no room for {self._num_servers} x {self._bundle} ({placement.strategy}) after {placement.timeout_s:g} s. "
            f"The cluster has {total}, of which {free} is free. Request less, or end what holds the rest (`ray status`)"
        )
