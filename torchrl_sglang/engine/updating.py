"""Weights through the engine itself, under the names that TorchRL's own service has for them: without a collector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.group.process_group import reachable_address
from torchrl_sglang.weights.sync import WeightSync
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["WeightMethods"]


class WeightMethods:
    """The part of :class:`AsyncSGLang` that sends weights; one :class:`WeightSync`, made when it is first needed."""

    pool: SGLangPool

    def __init__(self) -> None:
        self._sync_config = SyncConfig()
        self._sync: WeightSync | None = None

    def restart(self, url: str) -> bool:
        """Start the server at ``url`` again, if it is ours to start."""
        raise NotImplementedError

    def get_model_metadata(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Names, dtypes and shapes of the tensors that :meth:`update_weights` expects: the served checkpoint's.

        Raises:
            ConfigError: the checkpoint can't be read from this machine.
        """
        specs = Checkpoint.read(self.pool.info.model_path).specs
        return {name: (spec.dtype, torch.Size(spec.shape)) for name, spec in specs.items()}

    def get_master_address(self) -> str:
        """The trainer's address that the servers will be told to meet at."""
        return self._sync_config.master_address or reachable_address([client.url for client in self.pool.clients])

    def get_master_port(self) -> int | None:
        """The port they will be told; ``None`` until it is chosen, when the weight group is made."""
        return self._sync_config.master_port

    def init_weight_update_group(self, master_address: str | None = None, master_port: int | None = None) -> None:
        """Make the process group that weights travel over. Done by the first update when it isn't done before.

        Args:
            master_address: address of this process as the servers reach it; by default that of the interface that
                leads to them.
            master_port: port to listen on; by default a free one.

        Raises:
            ConfigError: the address can't be listened on, or the servers can't take weights.
            WeightUpdateError: a server did not join.
        """
        self._close_sync()
        self._sync_config = replace(self._sync_config, master_address=master_address, master_port=master_port)
        self._weight_sync.connect()

    def update_weights(self, weights: Any) -> SyncReport | None:
        """Send weights to all servers; the same machinery as :class:`~torchrl_sglang.SGLangWeightSyncScheme`.

        Args:
            weights: a module, TensorDict, dict, or an iterator of ``(name, tensor)``.

        Returns:
            What was done.

        Raises:
            WeightSyncError: see :meth:`WeightSync.push`.
        """
        return self._weight_sync.push(weights)

    def update_weights_from_distributed(
        self, name: str, dtype: torch.dtype, shape: Sequence[int], tensor: torch.Tensor
    ) -> SyncReport | None:
        """Send one tensor; the others stay as they are.

        TorchRL's in-tree method of this name only announces the tensor and leaves the broadcast to its caller, who
        can't make it while the announcement waits for it. So the tensor is taken here.

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
        return self._weight_sync.push({name: tensor}, partial=True)

    @property
    def _weight_sync(self) -> WeightSync:
        if self._sync is None:
            self._sync = WeightSync(self.pool, self._sync_config, restart=self.restart)
        return self._sync

    def _close_sync(self) -> None:
        if self._sync is not None:
            self._sync.close()
            self._sync = None
