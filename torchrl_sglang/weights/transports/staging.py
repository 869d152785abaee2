"""Decides whether all weights are packed and checked before generation is paused."""

from __future__ import annotations

from typing import Any

from torchrl_sglang.config import SyncConfig
from torchrl_sglang.weights.shared_memory.keeper import SHARED_MEMORY
from torchrl_sglang.weights.shared_memory.room import available_bytes
from torchrl_sglang.weights.transports.base import WeightTransport

__all__ = ["is_staged"]

_STAGING = ("broadcast", "ipc", "http", "ipc+broadcast")


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
