"""Decides how large buckets are, and whether all weights are packed and checked before generation is paused."""

from __future__ import annotations

from typing import Any

from torchrl_sglang.config import SyncConfig
from torchrl_sglang.weights.shared_memory.keeper import SHARED_MEMORY
from torchrl_sglang.weights.shared_memory.room import available_bytes
from torchrl_sglang.weights.transports.base import WeightTransport

__all__ = ["bucket_bytes", "is_staged"]

_STAGING = ("broadcast", "ipc", "http", "ipc+broadcast")
_IN_MEMORY = ("broadcast", "ipc", "ipc+broadcast")
"""Servers read main memory or by gloo; a request of ``http`` holds its bucket, several times on its way."""


def bucket_bytes(config: SyncConfig, transport: WeightTransport[Any], num_bytes: int) -> int:
    """Most bytes per bucket, where this process alone decides it: ranks of a sharded source need the same everywhere.

    Args:
        config: ``bucket_bytes``.
        transport: connected.
        num_bytes: of the whole model.
    """
    small = config.bucket_size(num_bytes)
    if config.bucket_bytes is not None or transport.name not in _IN_MEMORY or not transport.packer.is_in_main_memory:
        return small
    shared = [SHARED_MEMORY] if transport.name.startswith("ipc") else []
    room = available_bytes(shared) + transport.packer.nbytes
    return max(small, min(config.bucket_size(num_bytes, in_main_memory=True), room // 4))


def is_staged(config: SyncConfig, transport: WeightTransport[Any], num_bytes: int) -> bool:
    """Whether a sync packs everything in advance.

    Args:
        config: ``stage``.
        transport: connected; ``disk`` writes everything before the pause anyway, and ``lora`` pauses nothing.
        num_bytes: what is sent.
    """
    if transport.name not in _STAGING or config.stage == "off":
        return False
    if config.stage == "always":
        return True
    if not transport.packer.is_in_main_memory:
        return False
    needed = max(0, num_bytes - transport.packer.nbytes)  # what earlier syncs have packed is there already
    is_shared = transport.name.startswith("ipc")
    return needed == 0 or needed + num_bytes <= available_bytes([SHARED_MEMORY] if is_shared else [])
