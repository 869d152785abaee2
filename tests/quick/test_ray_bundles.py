"""Which bundles Ray holds for servers that fail to start, are restarted, and leave; with a stand-in for Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from torchrl_sglang import ServerStartError
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.engine import monitor
from torchrl_sglang.ray_servers.placement import PlacementGroup, RayPlacement
from torchrl_sglang.ray_servers.server import RayServer


@dataclass
class Cluster:
    """Reserves bundles, and starts actors that answer at once; the next ones fail while ``failing`` is set."""

    groups: list[Any] = field(default_factory=list)
    actors: list[Any] = field(default_factory=list)
    failing: bool = False
    on_start: Callable[[], None] = lambda: None

    def start_actor(self, bundle: int) -> Any:
        actor = SimpleNamespace(bundle=bundle)

        def start(weight_version: str | None) -> Callable[[], str]:
            self.on_start()
            failing = self.failing

            def result() -> str:
                if failing:
                    raise ServerStartError("the model can't be loaded")
                return f"http://127.0.0.1:{30000 + bundle}"

            return result

        actor.start = SimpleNamespace(remote=start)
        actor.call = SimpleNamespace(remote=lambda name, *_, **__: lambda: None)
        actor.phase = SimpleNamespace(remote=lambda: lambda: "loading")
        self.actors.append(actor)
        return actor


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    ray: Any = ModuleType("ray")
    ray.is_initialized = lambda: True
    ray.kill = made.actors.remove
    ray.wait = lambda futures, timeout: (futures, [])
    ray.get = lambda future, timeout: future()
    names = ("RayTaskError", "RayActorError", "GetTimeoutError")
    ray.exceptions = SimpleNamespace(**{name: type(name, (Exception,), {}) for name in names})
    ray.remote = lambda scheduling_strategy, **_: (
        lambda _: SimpleNamespace(remote=lambda *_: made.start_actor(scheduling_strategy[1]))
    )

    def reserve(bundles: Any, strategy: str) -> Any:
        made.groups.append(SimpleNamespace(wait=lambda timeout_s: True))
        return made.groups[-1]

    ray.util = ModuleType("ray.util")
    ray.util.placement_group, ray.util.remove_placement_group = reserve, made.groups.remove
    ray.util.scheduling_strategies = ModuleType("ray.util.scheduling_strategies")
    ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy = lambda group, index: (group, index)
    for module in (ray, ray.util, ray.util.scheduling_strategies):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


@pytest.fixture
def group() -> PlacementGroup:
    return PlacementGroup(ServerConfig(model="m", device="cpu"), RayPlacement(), 2)


def server_in(group: PlacementGroup, index: int) -> RayServer:
    return RayServer(ServerConfig(model="m", device="cpu"), group, index, None)


def test_a_restart_that_fails_keeps_the_bundle_for_the_next_one(cluster: Cluster, group: PlacementGroup) -> None:
    server = server_in(group, 0).start()
    (reserved,) = cluster.groups
    cluster.failing = True
    with pytest.raises(ServerStartError):
        server.restart()
    assert cluster.actors == []
    assert cluster.groups == [reserved], "Ray has given its place to somebody else"
    assert group.free_bundles == [1], "another server would start there"
    cluster.failing = False
    server.restart()
    assert [actor.bundle for actor in cluster.actors] == [0]
    server.stop(kill=True)
    assert cluster.groups == []


def test_a_first_start_that_fails_returns_the_bundle(cluster: Cluster, group: PlacementGroup) -> None:
    cluster.failing = True
    with pytest.raises(ServerStartError):
        server_in(group, 0).start()
    assert (cluster.groups, cluster.actors) == ([], [])


@pytest.mark.parametrize("fails", [False, True])
def test_a_server_that_is_removed_while_it_is_being_restarted_returns_its_bundle(
    cluster: Cluster, group: PlacementGroup, fails: bool
) -> None:
    server: Any = server_in(group, 0).start()
    left: set[str] = set()

    def remove() -> None:  # as the engine does, between the restart's steps
        left.add(server.url)
        server.stop(kill=True)
        cluster.failing = fails

    cluster.on_start = remove
    weights = SimpleNamespace(adapter=None)
    state = SimpleNamespace(
        weights=weights, has_left=left.__contains__, restart_ended=lambda url: None, restarted=lambda url, version: None
    )
    pool: Any = SimpleNamespace(state=state, weight_version=0, healthy=())
    client: Any = SimpleNamespace(url=server.url)
    with pytest.raises(ServerStartError):
        monitor.restart_server(pool, client, server)
    assert (cluster.groups, cluster.actors) == ([], [])
