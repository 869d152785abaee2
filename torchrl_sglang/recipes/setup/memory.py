"""Memory of the trainer's process: peak usage, and an allocator setting that speeds up CPU training."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

__all__ = ["keep_freed_memory", "peak_memory_gb"]


def peak_memory_gb(device: torch.device) -> dict[str, float]:
    """Peak memory of this process, in units of 10^9 bytes.

    Args:
        device: the trainer's device; GPU memory is reported only for a GPU.

    Returns:
        ``peak_cpu_gb``, and ``peak_gpu_gb`` on a GPU.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes on Linux
    found = {"peak_cpu_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if device.type == "cuda":
        found["peak_gpu_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the rest of the process.

    Otherwise it returns memory between micro-batches, and page faults take nearly half of a training step on a CPU.
    Does nothing on systems without glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a large tensor
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return memory
        libc.mallopt(-2, 2**28)  # M_TOP_PAD: grow in steps of 256 MB
