"""Memory: how much is used, and how a CPU trainer keeps what it has freed."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

__all__ = ["keep_freed_memory", "peak_memory_gb"]


def peak_memory_gb(device: torch.device) -> dict[str, float]:
    """The most memory this process has had, in units of 10^9 bytes.

    Args:
        device: the trainer's; its memory is reported when it is a GPU.

    Returns:
        ``peak_cpu_gb``, and ``peak_gpu_gb`` on a GPU.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes on Linux
    found = {"peak_cpu_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if device.type == "cuda":
        found["peak_gpu_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def keep_freed_memory() -> None:
    """Tell glibc not to hand memory back between micro-batches: page faults are nearly half of training on a CPU.

    Without glibc nothing is done. It holds for the rest of the process.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-2, 2**28)  # M_TOP_PAD: grow in steps of 256 MB
