"""The environment of a server process: a copy of the trainer's, without what concerns the trainer alone."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.server.command import WILDCARD_HOSTS, outward_address, probe_host
from torchrl_sglang.server.cpu import cpu_environment
from torchrl_sglang.server.gpus import visible_devices

__all__ = ["PLUGIN_PATH", "child_environment", "inherited_environment", "reach_directly", "router_environment"]

PLUGIN_PATH = Path(__file__).with_name("sglang_plugin")
"""Folder with plugins for SGLang, only for the server's ``PYTHONPATH``. It holds an installed distribution's metadata,
by which SGLang finds the plugins, and imports nothing of this package."""
_PLUGIN_NAMES = ("torchrl_sglang_group_timeout", "torchrl_sglang_tensor_errors")

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


# uvicorn closes a connection that was idle for 5 s: under load it may do so while a request is on its way. This
# package's client reuses no connection that was idle for 3 s, so with this time nothing is on its way by then.
_KEEP_ALIVE_S = "75"

_HTTP_PROXIES = ("HTTP_PROXY", "http_proxy")
_HTTPS_PROXIES = ("HTTPS_PROXY", "https_proxy")
_ALL_PROXIES = ("ALL_PROXY", "all_proxy")
_NO_PROXY = ("no_proxy", "NO_PROXY")  # where a program knows both, it prefers the first
_LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1", "0.0.0.0")


def inherited_environment(parent: Mapping[str, str]) -> dict[str, str]:
    """What a child process inherits: all but the variables that give a trainer its rank among its peers.

    The child's Python doesn't import from the working directory, which may hold the user's ``queue.py``: Python 3.11
    and newer leave it out under ``PYTHONSAFEPATH``, and empty entries of ``PYTHONPATH``, which name it, are removed.

    Examples:
        >>> inherited_environment({"RANK": "3", "TORCHELASTIC_RUN_ID": "x", "NCCL_CUMEM_ENABLE": "1", "HOME": "/h"})
        {'NCCL_CUMEM_ENABLE': '1', 'HOME': '/h', 'PYTHONSAFEPATH': '1'}
    """
    variables = {
        name: value
        for name, value in parent.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    if variables.get("PYTHONPATH"):
        variables["PYTHONPATH"] = ":".join(filter(None, variables["PYTHONPATH"].split(":")))
    variables["PYTHONSAFEPATH"] = "1"
    return variables


def router_environment(parent: Mapping[str, str], host: str) -> dict[str, str]:
    """The whole environment of a router process.

    A router calls its servers over plain HTTP, wherever they are, and a proxy between them answers in their place. So
    it has no proxy for plain HTTP; that for HTTPS stays, for downloads.

    Args:
        parent: environment of the launching process.
        host: address on which the router listens.

    Examples:
        >>> variables = router_environment({"ALL_PROXY": "http://proxy:3128"}, "127.0.0.1")
        >>> variables["HTTPS_PROXY"], "ALL_PROXY" in variables
        ('http://proxy:3128', False)
    """
    variables = inherited_environment(parent)
    for name in _HTTP_PROXIES:
        variables.pop(name, None)
    every = [variables.pop(name) for name in _ALL_PROXIES if name in variables]
    if any(every) and not any(variables.get(name) for name in _HTTPS_PROXIES):
        variables["HTTPS_PROXY"] = next(filter(None, every))
    return reach_directly(variables, [host])


def reach_directly(variables: dict[str, str], hosts: Iterable[str]) -> dict[str, str]:
    """The variables, with loopback and ``hosts`` added to the addresses that no proxy serves, if there is a proxy."""
    if not any(variables.get(name) for name in (*_HTTP_PROXIES, *_HTTPS_PROXIES, *_ALL_PROXIES)):
        return variables
    listed = [entry.strip() for name in _NO_PROXY for entry in variables.get(name, "").split(",")]
    if "*" in listed:
        return variables
    direct = ",".join(dict.fromkeys(filter(None, (*listed, *_LOOPBACK, *map(probe_host, hosts)))))
    return {**variables, **dict.fromkeys(_NO_PROXY, direct)}


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
    variables.setdefault("SGLANG_TIMEOUT_KEEP_ALIVE", _KEEP_ALIVE_S)
    if cpu:
        cpu_variables = cpu_environment(config)
        inherited_path = variables.get("PYTHONPATH")
        if inherited_path:
            cpu_variables["PYTHONPATH"] += f":{inherited_path}"
        variables.update(cpu_variables)
    _add_plugins(variables)
    variables.update(config.env)
    variables = reach_directly(variables, [config.host, *_own_addresses(config.host)])
    if not cpu:
        devices = visible_devices({**parent, **config.env}, config.gpus, config.tp_size)
        if devices is not None:
            variables["CUDA_VISIBLE_DEVICES"] = devices
    return variables


def _add_plugins(variables: dict[str, str]) -> None:
    """Let SGLang find the plugins: one bounds the waits of its ranks in a weight group, one answers bad tensors."""
    variables["PYTHONPATH"] = ":".join(filter(None, (variables.get("PYTHONPATH"), str(PLUGIN_PATH))))
    if variables.get("SGLANG_PLUGINS"):  # the names of the plugins that are loaded; if it is empty, all are
        variables["SGLANG_PLUGINS"] = ",".join([variables["SGLANG_PLUGINS"], *_PLUGIN_NAMES])


def _own_addresses(host: str) -> list[str]:
    """This machine's name and address for others, if a server listens on them."""
    if host not in WILDCARD_HOSTS:
        return []
    return [socket.gethostname(), outward_address(host)]
