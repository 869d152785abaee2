"""What a process and its descendants hold: memory, descriptors, threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import psutil

__all__ = ["folder_bytes", "usage"]


def usage(processes: Iterable[psutil.Process]) -> dict[str, float]:
    """Sums over processes that still run: memory of their own in MB (USS), descriptors, threads."""
    total = {"memory_mb": 0.0, "descriptors": 0.0, "threads": 0.0}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            memory, descriptors, threads = (
                process.memory_full_info().uss,
                process.num_fds(),
                process.num_threads(),
            )
            total["memory_mb"] += memory / 1e6
            total["descriptors"] += descriptors
            total["threads"] += threads
    return total


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
