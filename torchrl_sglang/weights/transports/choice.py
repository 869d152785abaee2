"""Chooses the transport for a pool's servers."""

from __future__ import annotations

from typing import Any

from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.transports.auto import AutoTransport, TransportChoice
from torchrl_sglang.weights.transports.base import WeightTransport
from torchrl_sglang.weights.transports.broadcast import BroadcastTransport
from torchrl_sglang.weights.transports.disk import DiskTransport
from torchrl_sglang.weights.transports.http import HttpTransport
from torchrl_sglang.weights.transports.ipc import IpcTransport
from torchrl_sglang.weights.transports.lora import LoraTransport

__all__ = ["choices_of", "make_transport", "num_copies"]


def choices_of(transport: WeightTransport[Any], pool: SGLangPool) -> dict[str, TransportChoice]:
    """The transport of each server that it was last connected to, and why, by URL."""
    if isinstance(transport, AutoTransport):
        return dict(transport.choices)
    return {client.url: TransportChoice(transport.name, "SyncConfig.transport says so") for client in pool.clients}


def make_transport(pool: SGLangPool, config: SyncConfig, owner: str, checkpoint: Checkpoint) -> WeightTransport[Any]:
    """Make the transport that ``config`` names; ``auto`` chooses between ``ipc`` and ``broadcast`` for each server.

    Args:
        pool: the servers, connected.
        config: names the transport.
        owner: id of this trainer.
        checkpoint: what the servers were started from.

    Raises:
        ConfigError: a server quantises its weights while it loads them.
    """
    for client in pool.clients:
        if client.info.quantization is not None and checkpoint.quantization is None:
            raise ConfigError(
                f"{client.url} quantises its weights while loading (--quantization {client.info.quantization}): what "
                "it would make of new ones can't be checked. Serve a checkpoint that is quantised already, or none"
            )
    if config.transport == "lora":
        return LoraTransport(pool, owner, checkpoint)
    has_replicas_inside = any(client.info.dp_size * client.info.pp_size > 1 for client in pool.clients)
    auto_disk = config.transport == "auto" and has_replicas_inside and config.disk_dir is not None
    if config.transport == "disk" or auto_disk:
        return DiskTransport(pool, config, owner, checkpoint.path)
    if config.transport == "ipc":
        return IpcTransport(pool, config)
    if config.transport == "http":
        return HttpTransport(pool, config)
    if config.transport == "auto":
        return AutoTransport(pool, config, owner, checkpoint)
    return BroadcastTransport(pool, config, owner, checkpoint)


def num_copies(transport: WeightTransport[Any], num_servers: int) -> int:
    """How often every byte crosses the slowest part of this transport, once it is connected.

    That is the trainer's network or memory; with the disk transport, the disk from which every server reads.
    """
    if isinstance(transport, (AutoTransport, BroadcastTransport)):
        return transport.num_copies
    return num_servers
