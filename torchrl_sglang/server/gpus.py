"""Which GPUs a server gets, decided from the environment and the driver, without initialising CUDA here.

If a trainer initialises CUDA and forks workers later, CUDA fails in the workers. And a torch without CUDA does not see
the GPUs that the server's torch can use. Therefore this module uses NVIDIA's management library (NVML).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torchrl_sglang.errors import ConfigError

__all__ = ["assign_gpus", "count_machine_gpus", "free_gpus", "has_visible_gpu", "in_ray_worker", "visible_devices"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def count_machine_gpus() -> int:
    """Number of NVIDIA GPUs of this machine or container, also hidden ones; with ROCm 1, whatever the number."""
    for library in ("libnvidia-ml.so.1", "libnvidia-ml.so"):
        try:
            nvml = ctypes.CDLL(library)
        except OSError:
            continue
        if nvml.nvmlInit_v2() == 0:
            count = ctypes.c_uint(0)
            found = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
            nvml.nvmlShutdown()
            return count.value if found else 0
    return 1 if Path("/dev/kfd").exists() else 0


def has_visible_gpu(environ: Mapping[str, str], num_machine_gpus: int) -> bool:
    """Whether a process with this environment sees a GPU.

    Examples:
        >>> has_visible_gpu({}, 2), has_visible_gpu({"CUDA_VISIBLE_DEVICES": ""}, 2), has_visible_gpu({}, 0)
        (True, False, False)
    """
    listed = environ.get(_VISIBLE)
    hidden = listed is not None and listed.strip() in ("", "-1", "NoDevFiles")
    return num_machine_gpus > 0 and not hidden


def in_ray_worker(environ: Mapping[str, str]) -> bool:
    """Whether Ray started this process: Ray sets ``CUDA_VISIBLE_DEVICES`` of its workers."""
    return any(name in environ for name in ("RAY_RAYLET_PID", "RAY_JOB_ID"))


def visible_devices(environ: Mapping[str, str], gpus: Sequence[int] | None, tp_size: int) -> str | None:
    """``CUDA_VISIBLE_DEVICES`` for a server; ``None`` leaves the variable unset.

    ``gpus`` are positions in this process's ``CUDA_VISIBLE_DEVICES`` when that is set, else the machine's numbers. In a
    Ray worker the variable lists the worker's GPUs, not the server's: there ``gpus`` are always the machine's numbers.

    Raises:
        ConfigError: fewer GPUs are visible than ``gpus`` or ``tp_size`` need.

    Examples:
        >>> visible_devices({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, (2, 3), tp_size=2)
        '6,7'
        >>> visible_devices({"CUDA_VISIBLE_DEVICES": "0", "RAY_JOB_ID": "1"}, (2, 3), tp_size=2)
        '2,3'
    """
    listed = environ.get(_VISIBLE)
    ray = in_ray_worker(environ)
    if listed is None or (ray and gpus is not None):
        return None if gpus is None else ",".join(str(gpu) for gpu in gpus)
    names = [name.strip() for name in listed.split(",") if name.strip()]
    wanted = range(tp_size) if gpus is None else gpus
    if max(wanted) >= len(names):
        advice = (
            "This process is a Ray worker: ask Ray for GPUs (num_gpus=...), or name the machine's own with gpus=(...)"
            if ray
            else "Name other gpus, lower tp_size, or set env={'CUDA_VISIBLE_DEVICES': ...} in the ServerConfig"
        )
        raise ConfigError(
            f"the server needs GPU {max(wanted)} (counting from 0), but CUDA_VISIBLE_DEVICES={listed!r} shows only "
            f"{len(names)}. {advice}."
        )
    return listed if gpus is None else ",".join(names[gpu] for gpu in gpus)


def assign_gpus(
    num_servers: int, tp_size: int, gpus: Sequence[Sequence[int]] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Disjoint GPUs for ``num_servers`` servers of ``tp_size`` GPUs each.

    Args:
        num_servers: how many servers.
        tp_size: GPUs per server.
        gpus: one list per server; ``None`` counts up from 0.

    Returns:
        One tuple of ``tp_size`` GPU numbers per server.

    Raises:
        ConfigError: too many or too few lists, a list of the wrong length, or a GPU that is listed twice.

    Examples:
        >>> assign_gpus(2, 2)
        ((0, 1), (2, 3))
        >>> assign_gpus(2, 1, [[0], [0]])
        Traceback (most recent call last):
        ...
        torchrl_sglang.errors.ConfigError: GPU 0 is given to more than one server: each server needs its own
    """
    if gpus is None:
        return tuple(tuple(range(i * tp_size, (i + 1) * tp_size)) for i in range(num_servers))
    if len(gpus) != num_servers:
        raise ConfigError(f"gpus must hold one list per server, {num_servers}, got {len(gpus)}")
    taken: set[int] = set()
    for one_server in gpus:
        if len(one_server) != tp_size:
            raise ConfigError(f"each server needs tp_size={tp_size} GPUs, got {list(one_server)}")
        for gpu in one_server:
            if gpu in taken:
                raise ConfigError(f"GPU {gpu} is given to more than one server: each server needs its own")
            taken.add(gpu)
    return tuple(tuple(one_server) for one_server in gpus)


def free_gpus(
    num_servers: int,
    tp_size: int,
    taken: Collection[int],
    *,
    environ: Mapping[str, str] | None = None,
    num_machine_gpus: int | None = None,
) -> tuple[tuple[int, ...], ...]:
    """GPUs for further servers: the lowest blocks of ``tp_size`` of which none is taken.

    Args:
        num_servers: how many servers.
        tp_size: GPUs per server.
        taken: those of running servers. The GPU that this process computes on counts as taken too.
        environ: this process's environment; ``None`` is ``os.environ``.
        num_machine_gpus: GPUs of the machine; ``None`` counts them.

    Returns:
        One tuple of ``tp_size`` GPU numbers per server.

    Raises:
        ConfigError: there are not enough.

    Examples:
        >>> free_gpus(2, 2, {0, 1, 4}, environ={}, num_machine_gpus=8)
        ((2, 3), (6, 7))
    """
    environ = os.environ if environ is None else environ
    listed = environ.get(_VISIBLE)
    if listed is not None and not in_ray_worker(environ):
        total = len([name for name in listed.split(",") if name.strip()])
    else:
        total = count_machine_gpus() if num_machine_gpus is None else num_machine_gpus
    blocks = [tuple(range(start, start + tp_size)) for start in range(0, total - tp_size + 1, tp_size)]
    free = [block for block in blocks if not set(block) & {*taken, *_computed_on()}]
    if len(free) < num_servers:
        raise ConfigError(
            f"{num_servers} more servers need {num_servers * tp_size} free GPUs in blocks of {tp_size}, and of {total} "
            f"GPUs {len(free) * tp_size} are free for them (in use: {sorted(taken)}). Name them with gpus=[[...], ...]"
        )
    return tuple(free[:num_servers])


def _computed_on() -> set[int]:
    """The GPU that torch uses in this process, if it uses one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return set()
    return {int(torch.cuda.current_device())}
