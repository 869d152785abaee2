"""The environment of a server process: a copy of ours, cleaned of what concerns the trainer alone."""

from __future__ import annotations

from collections.abc import Mapping

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.server.cpu import cpu_environment
from torchrl_sglang.server.gpus import visible_devices

__all__ = ["child_environment", "is_trainers_own"]

# What torchrun (torch.distributed.elastic) and Ray tell their workers. A server that inherited it would take itself for
# a rank of the trainer's world and meet it at the trainer's rendezvous.
_LAUNCHER_NAMES = {
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
}
_LAUNCHER_PREFIXES = ("ROLE_", "TORCHELASTIC_", "RAY_")
# Where modules come from is a matter of each Python: ours, handed to another one, mixes two installations.
_PYTHON_NAMES = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}

# When one of its processes crashes, SGLang (0.5.23) waits 65 s for debuggers and core dumps before it ends. All that
# time it looks alive and answers nothing, and a trainer waits. Who wants the dumps sets these to 1.
_CRASH_DUMP_NAMES = ("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH")


def is_trainers_own(name: str) -> bool:
    """Whether a variable tells the trainer its place among its peers, and so is not for a server.

    Examples:
        >>> [name for name in ("RANK", "TORCHELASTIC_RUN_ID", "NCCL_CUMEM_ENABLE", "HOME") if is_trainers_own(name)]
        ['RANK', 'TORCHELASTIC_RUN_ID']
    """
    return name in _LAUNCHER_NAMES or name.startswith(_LAUNCHER_PREFIXES)


def child_environment(
    config: ServerConfig, parent: Mapping[str, str], *, cpu: bool, same_python: bool
) -> dict[str, str]:
    """Everything the server process finds in its environment. ``parent`` is only read.

    ``NCCL_*`` variables pass as they are: trainer and server must agree on them to form one group.

    Args:
        config: the server; its ``env`` goes on top.
        parent: environment of the launching process.
        cpu: the server runs on SGLang's CPU engine.
        same_python: the server runs under the launching process's own Python.

    Raises:
        ConfigError: fewer GPUs or CPU cores are visible than the server needs.
    """
    variables = {name: value for name, value in parent.items() if not is_trainers_own(name)}
    if not same_python:
        for name in _PYTHON_NAMES:
            variables.pop(name, None)
    variables["PYTHONUNBUFFERED"] = "1"  # the last words of a crash are the ones that matter
    for name in _CRASH_DUMP_NAMES:
        variables.setdefault(name, "0")
    if cpu:
        ours = cpu_environment(config)
        inherited_path = variables.get("PYTHONPATH")
        if inherited_path:
            ours["PYTHONPATH"] += f":{inherited_path}"
        variables.update(ours)
    variables.update(config.env)
    if not cpu:
        devices = visible_devices({**parent, **config.env}, config.gpus, config.tp_size)
        if devices is not None:
            variables["CUDA_VISIBLE_DEVICES"] = devices
    return variables
