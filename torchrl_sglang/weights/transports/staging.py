"""Decides whether all weights are packed and checked before generation is paused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrl_sglang.config import SyncConfig
from torchrl_sglang.weights.shared_memory.keeper import SHARED_MEMORY
from torchrl_sglang.weights.transports.base import WeightTransport

__all__ = ["available_bytes", "is_staged"]

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


def available_bytes(shared: Sequence[Path] = ()) -> int:
    """Main memory that can still be used by this process, in bytes.

    Args:
        shared: folders of memory, each of which has a limit of its own.
    """
    limits = [_available_on_machine(), *(_left_in_control_group())]
    for folder in shared:
        room = os.statvfs(folder)
        limits.append(room.f_bavail * room.f_frsize)
    return min(limits)


def _available_on_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _left_in_control_group() -> list[int]:
    """What a container may still use; empty without a limit."""
    root = Path("/sys/fs/cgroup")
    version_1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")
    for limit, used, statistics in (("memory.max", "memory.current", "memory.stat"), version_1):
        try:
            text = (root / limit).read_text().strip()
            if text != "max":
                words = (root / statistics).read_text().split()
                cached = int(words[words.index("inactive_file") + 1])  # the kernel frees it when memory is needed
                return [max(0, int(text) - int((root / used).read_text()) + cached)]
        except (OSError, ValueError):
            continue
    return []
