"""Whether a server's process can open memory of this process's GPUs. Written from CUDA's rules, not run on a GPU.

A server that is told to open memory of a GPU that it does not see ends. So this errs on the side of main memory, which
every server on this host can read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["can_open_gpu_memory"]

_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def can_open_gpu_memory(pid: int, *, proc: Path = Path("/proc"), devices: Path = Path("/dev")) -> bool:
    """Whether a process sees every GPU that this one may use, and their memory can be opened by its handle.

    Args:
        pid: a process of a server, whose files and environment this process can read.
        proc: the folder of processes.
        devices: the folder of devices.
    """
    try:
        theirs = _parse((proc / str(pid) / "environ").read_bytes())
    except OSError:
        return False
    ours = os.environ
    if any("expandable_segments:true" in ours.get(name, "").lower() for name in _ALLOCATOR_SETTINGS):
        return False  # such memory has no handle of the kind that can be opened everywhere
    if ours.get("CUDA_DEVICE_ORDER") != theirs.get("CUDA_DEVICE_ORDER") or not _includes(theirs, ours):
        return False
    root = proc / str(pid) / "root"
    return all((root / path.relative_to("/")).exists() for path in devices.glob("nvidia[0-9]*"))


def _includes(theirs: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    """Whether their ``CUDA_VISIBLE_DEVICES`` names every GPU that ours does."""
    visible_to_them, visible_to_us = theirs.get("CUDA_VISIBLE_DEVICES"), ours.get("CUDA_VISIBLE_DEVICES")
    if visible_to_them is None:
        return True
    return visible_to_us is not None and set(visible_to_us.split(",")) <= set(visible_to_them.split(","))


def _parse(environ: bytes) -> dict[str, str]:
    pairs = (entry.decode(errors="replace").partition("=") for entry in environ.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}
