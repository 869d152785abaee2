"""Sends weights through the engine, without a collector, under the method names of TorchRL's own service."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.group.process_group import reachable_address
from torchrl_sglang.weights.sync import WeightSync
from torchrl_sglang.weights.transports.auto import TransportChoice
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["EngineWeights"]

_log = logging.getLogger(__name__)


class EngineWeights:
    """Sends weights to an engine's servers with the pool's one :class:`WeightSync`, made when it is first needed.

    Args:
        pool: the servers.
        restart: restarts the server at a URL and returns whether the engine launched it.
    """

    def __init__(self, pool: SGLangPool, restart: Callable[[str], bool]) -> None:
        self._pool = pool
        self._restart = weakref.WeakMethod(restart)  # an engine that nobody uses any more must end
        self._config: SyncConfig | None = None
        self._sync: WeightSync | None = None

    @property
    def sync(self) -> WeightSync:
        """The pool's weight sync, shared with schemes."""
        return self._use(self._config)

    def close(self) -> None:
        """Destroy the process group and free shared memory, also for schemes: the engine closes the pool next."""
        sync: WeightSync | None = self._pool.weight_sync
        self._sync = None
        if sync is not None:
            sync.close()

    def get_model_metadata(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Names, dtypes and shapes of the tensors that :meth:`update_weights` expects: the served checkpoint's.

        Raises:
            ConfigError: the checkpoint can't be read from this machine.
        """
        info = self._pool.info
        specs = Checkpoint.read(info.model_path, revision=info.revision).specs
        return {name: (spec.dtype, torch.Size(spec.shape)) for name, spec in specs.items()}

    def get_master_address(self) -> str:
        """The trainer's address that the servers are told to join at."""
        return self._settings.master_address or reachable_address([client.url for client in self._pool.clients])

    def get_master_port(self) -> int | None:
        """The port that they are told; ``None`` when a free one is chosen with each group."""
        return self._settings.master_port

    def init_weight_update_group(
        self, master_address: str | None = None, master_port: int | None = None
    ) -> dict[str, TransportChoice]:
        """Make the process group that weights travel over, where one is needed; otherwise the first update makes it.

        Servers that share this host's memory need none with ``transport="auto"``.
        ``SyncConfig(transport="broadcast")`` makes a group with every server.

        Args:
            master_address: address of this process as the servers reach it; by default that of the interface that
                leads to them. It is kept for servers that need a group later.
            master_port: port to listen on; by default a free one.

        Returns:
            Per server URL the transport of its weights, and why: ``"broadcast"`` where there is a group now.

        Raises:
            ConfigError: the address can't be listened on, the servers can't take weights, or an address is given for a
                transport without a group.
            WeightUpdateError: a server did not join.
        """
        given: dict[str, Any] = {"master_address": master_address, "master_port": master_port}
        given = {name: value for name, value in given.items() if value is not None}
        if given and self._settings.transport not in ("auto", "broadcast"):
            raise ConfigError(
                f"SyncConfig(transport={self._settings.transport!r}) makes no process group: leave out "
                f"{', '.join(given)}, or use transport='broadcast'"
            )
        config = replace(self._settings, **given)
        if config != self._settings:
            if self._sync is not None:
                self._sync.release(self)
            self._use(config)
            self._config = config
        self.sync.connect()
        choices = self.sync.transport_choices
        without = [url for url, choice in choices.items() if choice.transport != "broadcast"]
        if without:
            _log.info("no process group is needed for %s: %s", ", ".join(without), choices[without[0]].reason)
        return choices

    def update_weights(self, weights: Any) -> SyncReport | None:
        """Send weights to all servers, as :class:`~torchrl_sglang.SGLangWeightSyncScheme` does.

        Args:
            weights: a module, TensorDict, dict, or an iterator of ``(name, tensor)``.

        Returns:
            What was done.

        Raises:
            WeightSyncError: see :meth:`WeightSync.push`.
        """
        return self.sync.push(weights)

    def update_weights_from_distributed(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], tensor: torch.Tensor
    ) -> SyncReport | None:
        """Send one tensor; the others stay as they are.

        TorchRL's in-tree method of this name only announces the tensor and leaves the broadcast to its caller, which is
        blocked because the announcement waits for the broadcast. So this method takes the tensor itself.

        Args:
            name: name in the checkpoint.
            dtype: dtype of ``tensor``.
            shape: shape of ``tensor``.
            tensor: the values.

        Raises:
            ConfigError: ``tensor`` is not what ``dtype`` and ``shape`` say.
            WeightSyncError: see :meth:`WeightSync.push`.
        """
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise ConfigError(
                f"{name} was announced as {dtype} {tuple(shape)}, but is {tensor.dtype} {tuple(tensor.shape)}"
            )
        return self.sync.push({name: tensor}, partial=True)

    @property
    def _settings(self) -> SyncConfig:
        sync: WeightSync | None = self._pool.weight_sync
        return self._config or (sync.config if sync is not None else SyncConfig())

    def _use(self, config: SyncConfig | None) -> WeightSync:
        self._sync = WeightSync.of(self._pool, config, user=self, restart=self._restart())
        return self._sync
