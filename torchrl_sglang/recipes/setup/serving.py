"""Servers, policy and weight sync as the configuration says, for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from torchrl_sglang.engine import AsyncSGLang
from torchrl_sglang.hydra_configs import close_engines
from torchrl_sglang.recipes.run.checkpoints import Checkpoint
from torchrl_sglang.rollout import SGLangWrapper
from torchrl_sglang.weights import SGLangWeightSyncScheme, SyncReport

__all__ = ["Serving"]


class Serving:
    """Launches or attaches to the servers of ``config.engine``, with what stands on them; a ``with`` block.

    Args:
        config: has the nodes ``engine``, ``policy`` and ``weight_sync_schemes.policy``.
        progress: called with a line of text while servers load.

    Raises:
        ConfigError: settings that can't be honoured.
        ServerError: servers that don't start or can't be reached.

    Attributes:
        servers: the engine.
        policy: generates on it.
        scheme: replaces its weights; for ``Collector(weight_sync_schemes={"policy": serving.scheme})``.
    """

    def __init__(self, config: DictConfig, progress: Callable[[str], None] | None = None) -> None:
        try:
            self.servers: AsyncSGLang = instantiate(config.engine, progress=progress)
            self.policy: SGLangWrapper = instantiate(config.policy)
            self.scheme: SGLangWeightSyncScheme = instantiate(config.weight_sync_schemes.policy)
        except BaseException:
            close_engines()
            raise

    @property
    def weight_version(self) -> int:
        """Version of the weights on the servers."""
        return self.servers.weight_version

    @property
    def sync_mb(self) -> float:
        """Size of the last weight sync, in units of 10^6 bytes."""
        report = self.scheme.last_report
        return 0.0 if report is None else report.num_bytes / 1e6

    def push_first_weights(self, model: Any, checkpoint: Checkpoint | None) -> SyncReport | None:
        """Send a model's weights before anything is generated, if the servers may hold others.

        Servers just launched from the model's own checkpoint hold them already. Those that ran before may hold
        anything, and after a resume all hold the wrong ones.

        Args:
            model: the trainer's, restored.
            checkpoint: what was resumed from. Its version number goes on, unless the servers have come further.

        Returns:
            What was sent; ``None`` when there was no need to.

        Raises:
            WeightSyncError: see :meth:`WeightSync.push`.
        """
        launched = bool(self.servers.servers)
        if launched and checkpoint is None:
            return None
        resumed = 0 if checkpoint is None else checkpoint.weight_version
        return self.scheme.sync.push(model, version=max(resumed, self.weight_version + 1))

    def close(self) -> None:
        """End the process group, then servers launched for this run."""
        self.scheme.shutdown()
        close_engines()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
