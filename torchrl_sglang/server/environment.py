"""The environment of a server process: a copy of the trainer's, without what concerns the trainer alone."""

from __future__ import annotations

from collections.abc import Mapping

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.server.cpu import cpu_environment
from torchrl_sglang.server.gpus import visible_devices

__all__ = ["child_environment", "inherited_environment"]

# What torchrun (torch.distributed.elastic) and Ray tell their workers. A server that inherited it would act as a rank
# of the trainer's process group and join the trainer's rendezvous.
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
# Module paths belong to one Python: passing them to another one mixes two installations.
_PYTHON_NAMES = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}

# When one of its processes crashes, SGLang (0.5.23) waits 65 s for debuggers and core dumps before it ends. Meanwhile
# it looks alive but answers nothing, and a trainer waits. To get the dumps, set these to 1.
_CRASH_DUMP_NAMES = ("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH")


def inherited_environment(parent: Mapping[str, str]) -> dict[str, str]:
    """What a child process inherits: all but the variables that give a trainer its rank among its peers.

    Examples:
        >>> inherited_environment({"RANK": "3", "TORCHELASTIC_RUN_ID": "x", "NCCL_CUMEM_ENABLE": "1", "HOME": "/h"})
        {'NCCL_CUMEM_ENABLE': '1', 'HOME': '/h'}
    """
    return {
        name: value
        for name, value in parent.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }


def child_environment(
    config: ServerConfig, parent: Mapping[str, str], *, cpu: bool, same_python: bool
) -> dict[str, str]:
    """The whole environment of a server process. ``parent`` is only read.

    ``NCCL_*`` variables are inherited: trainer and server must agree on them to form one process group.

    Args:
        config: the server; its ``env`` wins.
        parent: environment of the launching process.
        cpu: the server runs on SGLang's CPU engine.
        same_python: the server runs under the launching process's own Python.

    Raises:
        ConfigError: fewer GPUs or CPU cores are visible than the server needs.
    """
    variables = inherited_environment(parent)
    if not same_python:
        for name in _PYTHON_NAMES:
            variables.pop(name, None)
    variables["PYTHONUNBUFFERED"] = "1"  # the last lines before a crash must reach the log
    for name in _CRASH_DUMP_NAMES:
        variables.setdefault(name, "0")
    if cpu:
        cpu_variables = cpu_environment(config)
        inherited_path = variables.get("PYTHONPATH")
        if inherited_path:
            cpu_variables["PYTHONPATH"] += f":{inherited_path}"
        variables.update(cpu_variables)
    variables.update(config.env)
    if not cpu:
        devices = visible_devices({**parent, **config.env}, config.gpus, config.tp_size)
        if devices is not None:
            variables["CUDA_VISIBLE_DEVICES"] = devices
    return variables
