"""Several servers on one machine, started side by side: all become ready, or all are stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server.cpu import needs_cpu_engine
from torchrl_sglang.server.gpus import assign_gpus
from torchrl_sglang.server.server import SGLangServer

__all__ = ["replicate", "start_fleet", "stop_fleet"]


def replicate(
    config: ServerConfig, num_servers: int, gpus: Sequence[Sequence[int]] | None = None
) -> tuple[ServerConfig, ...]:
    """Settings of ``num_servers`` equal servers, each with its own GPUs or its share of the CPU cores.

    Args:
        config: the settings they share; with more than one server its ``port`` and ``gpus`` must be ``None``.
        num_servers: number of servers.
        gpus: one list of ``tp_size`` GPU numbers per server; ``None`` counts up from 0.

    Raises:
        ConfigError: all servers would share a port or GPUs, or the GPU lists don't fit.

    Examples:
        >>> config = ServerConfig(model="Qwen/Qwen3-0.6B", device="cuda", tp_size=2)
        >>> [one.gpus for one in replicate(config, 2)]
        [(0, 1), (2, 3)]
    """
    if num_servers < 1:
        raise ConfigError(f"num_servers must be at least 1, got {num_servers}")
    if num_servers == 1 and gpus is None:
        return (config,)
    if num_servers > 1 and config.port is not None:
        raise ConfigError(f"{num_servers} servers can't share port {config.port}: leave port=None, each picks its own")
    if config.gpus is not None:
        raise ConfigError("give one list of GPUs per server (gpus=[[...], [...]]), not the same GPUs to all of them")
    if needs_cpu_engine(config):
        if gpus is not None:
            raise ConfigError(f"gpus={gpus} was given, but these servers run on the CPU")
        threads = max(1, len(os.sched_getaffinity(0)) // (2 * num_servers * config.tp_size))  # the trainer gets half
        shared = dataclasses.replace(config, env={"OMP_NUM_THREADS": str(threads), **config.env})
        return (shared,) * num_servers
    return tuple(dataclasses.replace(config, gpus=one) for one in assign_gpus(num_servers, config.tp_size, gpus))


def start_fleet(
    configs: Sequence[ServerConfig], *, progress: Callable[[str], None] | None = None
) -> tuple[SGLangServer, ...]:
    """Launch all servers, then wait for all of them.

    Args:
        configs: one per server, in the order of the result.
        progress: called for each server about once a second with one line, from several threads.

    Returns:
        The servers, all ready.

    Raises:
        ConfigError: something that can be checked beforehand is wrong; nothing is left running.
        ServerStartError: one did not become ready; the others were killed too.
    """
    servers = tuple(SGLangServer(config) for config in configs)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(stop_fleet, servers, kill=True)
        for server in servers:
            server.launch()
        with ThreadPoolExecutor(max(1, len(servers)), thread_name_prefix="sglang-start") as threads:
            waits = [
                threads.submit(server.wait_ready, progress=_labelled(progress, server, alone=len(servers) == 1))
                for server in servers
            ]
            try:
                wait(waits, return_when=FIRST_EXCEPTION)
            finally:
                failed = next((one for one in waits if one.done() and one.exception() is not None), None)
                if failed is not None or not all(one.done() for one in waits):
                    stop_fleet(servers, kill=True)  # the other threads see that their servers have ended
        if failed is not None:
            failed.result()
        on_failure.pop_all()
    return servers


def stop_fleet(servers: Sequence[SGLangServer], *, kill: bool = False) -> None:
    """Stop all servers at the same time: each may take seconds to finish its requests.

    Args:
        servers: from :func:`start_fleet`, or any others.
        kill: kill them at once, see :meth:`SGLangServer.stop`.
    """
    with ThreadPoolExecutor(max(1, len(servers)), thread_name_prefix="sglang-stop") as threads:
        for done in [threads.submit(server.stop, kill=kill) for server in servers]:
            done.result()


def _labelled(
    progress: Callable[[str], None] | None, server: SGLangServer, *, alone: bool
) -> Callable[[str], None] | None:
    if progress is None or alone:
        return progress
    return lambda line: progress(f"{server.url}: {line}")
