"""Servers in actors of a Ray cluster, built from the configuration; a ``with`` block."""

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
    """Like :class:`Serving`, with servers in Ray actors; ``engine.url`` attaches to running servers as there.

    Args:
        config: has the nodes of :class:`Serving` and a node ``ray``: ``init`` holds arguments of ``ray.init()``, which
            is called unless this process has initialized Ray; ``placement`` holds fields of :class:`RayPlacement`.
        progress: called with a line of text while servers load.

    Raises:
        ConfigError: Ray is not installed, or settings can't be honoured.
        ServerError: servers don't start or can't be reached.
    """

    def __init__(self, config: DictConfig, progress: Callable[[str], None] | None = None) -> None:
        self._ray = _init_ray(_plain(config.ray.init))
        try:
            engine = {name: value for name, value in _plain(config.engine).items() if value is not None}
            settings = {name: value for name, value in engine.items() if not name.startswith("_")}
            if "url" in settings:
                keys = {name: settings[name] for name in ("api_key_file", "admin_api_key_file") if name in settings}
                self.servers = AsyncSGLang.connect(settings["url"], **keys)
            else:
                self.servers = launch_on_ray(
                    settings.pop("model"),
                    num_servers=settings.pop("dp_size", 1),
                    placement=RayPlacement(**_plain(config.ray.placement)),
                    progress=progress,
                    **settings,
                )
            self.policy = make_policy(self.servers, **_settings(config.policy, without="engine"))
            self.scheme = make_scheme(self.servers, **_settings(config.weight_sync_schemes.policy, without="servers"))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the process group, stop servers launched for this run, and shut Ray down if this run started it."""
        if hasattr(self, "scheme"):
            self.scheme.shutdown()
        if hasattr(self, "servers"):
            self.servers.shutdown()
        if self._ray is not None:
            self._ray.shutdown()


def end_ray_collector(collector: Any) -> None:
    """Shut a ``RayLLMCollector`` down so that it can't be shut down again; call this before ``ray.shutdown()``.

    TorchRL shuts a collector down once more when it is deleted. If Ray is down by then, that call starts a new Ray; at
    the program's exit it never returns. Source: torchrl 0.14.1, ``RayLLMCollector.shutdown`` and ``Collector.__del__``.

    Args:
        collector: the collector; its actor ends when no reference to it is left.
    """
    with suppress(import_ray().exceptions.RayError):  # the actor has ended already
        collector.shutdown()
    collector.shutdown = _do_nothing


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


def _init_ray(arguments: Mapping[str, Any]) -> Any:
    """Start or join Ray. Returns the module, to shut it down later, or ``None`` if Ray was initialized before."""
    ray = import_ray()
    if ray.is_initialized():
        return None
    ray.init(**arguments)
    return ray


def _settings(node: DictConfig, *, without: str) -> dict[str, Any]:
    """The node's settings without the key that names the servers, which exist already."""
    return {name: value for name, value in _plain(node).items() if name != without and not name.startswith("_")}


def _plain(node: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(node, resolve=True)
    return {str(name): value for name, value in values.items()}
