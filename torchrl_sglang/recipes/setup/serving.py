"""Servers, policy and weight sync scheme of a run, built from the configuration; a ``with`` block."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from omegaconf import DictConfig

from torchrl_sglang.config.checking import require
from torchrl_sglang.engine import AsyncSGLang
from torchrl_sglang.hydra_configs import build, close_engines
from torchrl_sglang.rollout import SGLangWrapper
from torchrl_sglang.weights import SGLangWeightSyncScheme, SyncReport

__all__ = ["Serving"]


class Serving:
    """Launches the servers of ``config.engine`` or attaches to them, and builds policy and scheme; a ``with`` block.

    Args:
        config: has the nodes ``engine``, ``policy`` and ``weight_sync_schemes.policy``.
        progress: called with a line of text while servers load.

    Raises:
        ConfigError: settings that can't be honoured.
        ServerError: servers that don't start or can't be reached.

    Attributes:
        servers: the engine.
        policy: generates on the servers.
        scheme: replaces the servers' weights; pass it to ``Collector(weight_sync_schemes={"policy": serving.scheme})``.
    """

    def __init__(self, config: DictConfig, progress: Callable[[str], None] | None = None) -> None:
        self._has_said_why = False
        try:
            with warnings.catch_warnings():  # push_first_weights() replaces the weights that running servers hold
                warnings.filterwarnings("ignore", ".* holds weights of an earlier run")
                self.servers: AsyncSGLang = build(config.engine, progress=progress)
            self.policy: SGLangWrapper = build(config.policy)
            self.scheme: SGLangWeightSyncScheme = build(config.weight_sync_schemes.policy)
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

    def push_first_weights(self, model: Any, *, resumed_version: int | None) -> SyncReport | None:
        """Send the trainer's weights before the first generation, unless the servers certainly hold them.

        Servers that were just launched from the model's own checkpoint hold them. Servers that ran before may hold any
        weights, and after a resume no server holds the right ones.

        Args:
            model: the trainer's model, already restored.
            resumed_version: weight version in the checkpoint that the run resumes from; ``None`` for a new run. The
                next version is this one, or the servers' own plus one if that is higher.

        Returns:
            The report of the sync; ``None`` if nothing was sent.

        Raises:
            WeightSyncError: see :meth:`WeightSync.push`.
        """
        was_launched = bool(self.servers.servers)
        if was_launched and resumed_version is None:
            return None
        return self.scheme.sync.push(model, version=max(resumed_version or 0, self.weight_version + 1))

    def offloaded(self, is_wanted: bool) -> AbstractContextManager[None]:
        """The servers hold no GPU memory during this block, if they run on GPUs: for a trainer on the same GPU.

        Args:
            is_wanted: the setting ``offload_servers``. For servers on the CPU it releases nothing, which is said once.

        Raises:
            ConfigError: it is no boolean, or the servers can't release memory (:meth:`AsyncSGLang.offloaded`).
        """
        require(isinstance(is_wanted, bool), f"offload_servers must be true or false, got {is_wanted!r}")
        if not is_wanted:
            return nullcontext()
        if any(client.info.device != "cpu" for client in self.servers.pool.clients):
            return self.servers.offloaded()
        if not self._has_said_why:
            sys.stderr.write("offload_servers: skipped, since the servers run on the CPU and hold no GPU memory\n")
            self._has_said_why = True
        return nullcontext()

    def close(self) -> None:
        """Close the process group, then stop the servers that this run launched."""
        self.scheme.shutdown()
        close_engines()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
