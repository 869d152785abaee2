"""Servers in actors of a Ray cluster, as the configuration says, for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchrl_sglang.engine import AsyncSGLang
from torchrl_sglang.hydra_configs import make_policy, make_scheme
from torchrl_sglang.ray_servers import RayPlacement, import_ray, launch_on_ray
from torchrl_sglang.recipes.setup.serving import Serving

__all__ = ["RayServing", "end_ray_collector"]


class RayServing(Serving):
    """Like :class:`Serving`, but Ray decides where the servers run; ``engine.url`` attaches to running ones as ever.

    Args:
        config: has the nodes of :class:`Serving` and a node ``ray``: ``init`` holds arguments of ``ray.init()``, which
            is called unless Ray is up in this process, ``placement`` fields of :class:`RayPlacement`.
        progress: called with a line of text while servers load.

    Raises:
        ConfigError: Ray is not installed, or settings that can't be honoured.
        ServerError: servers that don't start or can't be reached.
    """

    def __init__(self, config: DictConfig, progress: Callable[[str], None] | None = None) -> None:
        self._ray = _up(_plain(config.ray.init))
        try:
            engine = {name: value for name, value in _plain(config.engine).items() if value is not None}
            settings = {name: value for name, value in engine.items() if not name.startswith("_")}
            if "url" in settings:
                self.servers = AsyncSGLang.connect(settings.pop("url"))
            else:
                self.servers = launch_on_ray(
                    settings.pop("model"),
                    num_servers=settings.pop("dp_size", 1),
                    placement=RayPlacement(**_plain(config.ray.placement)),
                    progress=progress,
                    **settings,
                )
            self.policy = make_policy(self.servers, **_settings(config.policy, but="engine"))
            self.scheme = make_scheme(self.servers, **_settings(config.weight_sync_schemes.policy, but="servers"))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process group, servers launched for this run, and Ray where it was started for this run."""
        if hasattr(self, "scheme"):
            self.scheme.shutdown()
        if hasattr(self, "servers"):
            self.servers.shutdown()
        if self._ray is not None:
            self._ray.shutdown()


def end_ray_collector(collector: Any) -> None:
    """End a ``RayLLMCollector``, once and for all; to be done before ``ray.shutdown()``.

    TorchRL ends a collector again when it is deleted. If Ray is down by then, the call starts a new one, and at the
    program's exit it never comes back. Source: torchrl 0.14.1, ``RayLLMCollector.shutdown`` and ``Collector.__del__``.

    Args:
        collector: the collector; its actor ends when nobody refers to it any more.
    """
    with suppress(import_ray().exceptions.RayError):  # the actor is gone already
        collector.shutdown()
    collector.shutdown = _nothing


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _up(arguments: Mapping[str, Any]) -> Any:
    """Start or join Ray; the module if that was our doing, to end it again, else ``None``."""
    ray = import_ray()
    if ray.is_initialized():
        return None
    ray.init(**arguments)
    return ray


def _settings(node: DictConfig, *, but: str) -> dict[str, Any]:
    """What a node says beside the servers, which are there already."""
    return {name: value for name, value in _plain(node).items() if name != but and not name.startswith("_")}


def _plain(node: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(node, resolve=True)
    return {str(name): value for name, value in values.items()}
