"""How much memory is left, on the machine, in this container and in ``/dev/shm``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["available_bytes"]


def available_bytes(shared: Sequence[Path] = ()) -> int:
    """Main memory that can still be used by this process, in bytes.

    Args:
        shared: folders of memory, each of which has a limit of its own; there is none in one that can't be looked at.
    """
    limits = [_available_on_machine(), *(_left_in_control_group())]
    for folder in shared:
        try:
            room = os.statvfs(folder)
        except OSError:
            return 0
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
