"""Turns launch arguments, vLLM's names among them, into one configuration per server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torchrl_sglang.config import ClientConfig, SamplingParams, ServerConfig, SyncConfig
from torchrl_sglang.config.api_keys import new_key
from torchrl_sglang.config.checking import require, require_number
from torchrl_sglang.config.foreign_names import (
    CONNECT_ARGUMENTS,
    ENGINE_ARGUMENTS,
    GENERATION_ARGUMENTS,
    unknown_argument,
)
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server import SGLangServer, needs_cpu_engine, replicate, start_fleet
from torchrl_sglang.server.gpus import assign_gpus, free_gpus

__all__ = ["LocalLauncher", "client_config", "refuse_unknown", "server_configs"]

# vLLM's name for an argument -> ours.
_ALIASES = {
    "max_model_len": "context_length",
    "tensor_parallel_size": "tp_size",
    "num_devices": "tp_size",
    "num_gpus": "tp_size",
    "gpu_memory_utilization": "mem_fraction_static",
    "num_replicas": "dp_size",
    "data_parallel_size": "dp_size",
}
# Arguments of `from_pretrained` itself: offered for a misspelt name.
_ELSEWHERE = {
    "SamplingParams or generate_kwargs={{{name!r}: ...}}": [
        *(field.name for field in fields(SamplingParams)),
        *("max_tokens", "min_tokens", "do_sample", *GENERATION_ARGUMENTS),
    ],
    "client=ClientConfig({name}=...)": [field.name for field in fields(ClientConfig)],
    "SGLangWeightSyncScheme(servers, config=SyncConfig({name}=...))": [field.name for field in fields(SyncConfig)],
}
_LAUNCHED_ONLY = {
    **{place: names for place, names in _ELSEWHERE.items() if not place.startswith("client=")},
    "AsyncSGLang.from_pretrained(...), which launches servers": [
        *(field.name for field in fields(ServerConfig)),
        *("dp_size", "restart", "progress", *_ALIASES, *ENGINE_ARGUMENTS),
    ],
}
_OWN_ARGUMENTS = ("tp_size", "dp_size", "gpus", "router", "restart", "progress", "client")


def server_configs(
    model: str, *, tp_size: int, dp_size: int, gpus: Sequence[Sequence[int]] | None, given: Mapping[str, Any]
) -> tuple[ServerConfig, ...]:
    """Settings of every server.

    Args:
        model: path or hub name of the checkpoint.
        tp_size: tensor-parallel ranks per server.
        dp_size: number of servers.
        gpus: GPUs of each server.
        given: further arguments: fields of :class:`ServerConfig`, or vLLM's names for them.

    Raises:
        ConfigError: an unknown or impossible argument, or one thing given under two names.

    Examples:
        >>> server_configs("m", tp_size=1, dp_size=1, gpus=None, given={"max_model_len": 512})[0].context_length
        512
    """
    settings: dict[str, Any] = {"tp_size": tp_size, "dp_size": dp_size}
    defaults = {"tp_size": 1, "dp_size": 1}
    known = [field.name for field in fields(ServerConfig) if field.name not in ("model", "tp_size", "gpus")]
    refuse_unknown(given, [*known, *_ALIASES, *_OWN_ARGUMENTS])
    for name, value in given.items():
        ours = _ALIASES.get(name, name)
        if settings.get(ours, value) not in (value, defaults.get(ours, value)):
            raise ConfigError(f"{name}={value!r} means {ours}, which is also given as {settings[ours]!r}: give one")
        settings[ours] = value
    if settings.get("api_key") is None and settings.get("api_key_file") is None:
        settings["api_key"] = new_key()
    num_servers = settings.pop("dp_size")
    require_number("dp_size, the number of servers,", num_servers, whole=True, at_least=1)
    return replicate(ServerConfig(model=model, **settings), num_servers, gpus)


class LocalLauncher:
    """Starts more servers like one that this machine runs.

    Args:
        config: the settings of that server.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = replace(config, port=None, gpus=None)

    def start(
        self,
        num_servers: int,
        running: Sequence[SGLangServer],
        *,
        gpus: Sequence[Sequence[int]] | None,
        progress: Callable[[str], None],
    ) -> tuple[SGLangServer, ...]:
        """See :meth:`Launcher.start`. The threads of servers on the CPU are those of the first ones."""
        config = self._config
        if needs_cpu_engine(config):
            require(gpus is None, f"gpus={gpus} was given, but these servers run on the CPU")
            return start_fleet((config,) * num_servers, progress=progress)
        taken = {gpu for each in running for gpu in each.config.gpus or range(config.tp_size)}
        chosen = free_gpus(num_servers, config.tp_size, taken) if gpus is None else gpus
        twice = sorted(taken.intersection(gpu for one in chosen for gpu in one))
        require(not twice, f"GPU {', '.join(map(str, twice))} is used by a server that runs: each needs its own")
        assigned = assign_gpus(num_servers, config.tp_size, chosen)
        return start_fleet([replace(config, gpus=one) for one in assigned], progress=progress)


def client_config(given: ClientConfig | None, server: ServerConfig) -> ClientConfig:
    """How to talk to launched servers: as ``given``, with the servers' own keys.

    Raises:
        ConfigError: ``given`` has keys that the servers don't have.
    """
    base = given or ClientConfig()
    for name in ("api_key", "admin_api_key"):
        own = getattr(base, name)
        if own is not None and own != getattr(server, name):
            raise ConfigError(f"client has an {name}, which launched servers don't have: give {name}= to the launch")
    return replace(base, api_key=server.api_key or None, admin_api_key=server.admin_api_key)


def refuse_unknown(given: Iterable[str], known: Sequence[str], *, attaching: bool = False) -> None:
    """Name the nearest known argument beside an unknown one, or the counterpart of another library's.

    Args:
        given: the names.
        known: the valid ones.
        attaching: the call attaches to running servers, and launches none.

    Raises:
        ConfigError: ``given`` has a name that is not among ``known``.

    Examples:
        >>> refuse_unknown(["contxt_length"], ["context_length", "port"])
        Traceback (most recent call last):
            ...
        torchrl_sglang.errors.ConfigError: unknown argument 'contxt_length'. Did you mean 'context_length'?
    """
    for name in given:
        if name not in known:
            foreign, elsewhere = (CONNECT_ARGUMENTS, _LAUNCHED_ONLY) if attaching else (ENGINE_ARGUMENTS, _ELSEWHERE)
            hint = unknown_argument(name, known, foreign=foreign, elsewhere=elsewhere)
            raise ConfigError(f"unknown argument {name!r}.{hint}")
