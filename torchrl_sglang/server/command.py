"""Builds the command line of a server and its URL, and checks settings before anything is started."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import find_local_path
from torchrl_sglang.server.cpu import cpu_command_args
from torchrl_sglang.server.locate import find_python

__all__ = [
    "WILDCARD_HOSTS",
    "build_command",
    "build_url",
    "check_config",
    "key_spellings",
    "keys_as_yaml",
    "local_model_path",
    "outward_address",
    "probe_host",
    "uses_tls",
]

# Flags whose value this package must know to reach the server; each has a field of its own.
_OWN_FLAGS = {
    "--model-path": "model",
    "--model": "model",
    "--host": "host",
    "--port": "port",
    "--tp-size": "tp_size",
    "--tensor-parallel-size": "tp_size",
    "--tp": "tp_size",
    "--device": "device",
}
WILDCARD_HOSTS = ("0.0.0.0", "::", "")


def local_model_path(model: str) -> Path | None:
    """The checkpoint's path on this machine; ``None`` for the name of a model on the hub.

    Raises:
        ConfigError: ``model`` can only be a path, and no checkpoint is there.

    Examples:
        >>> local_model_path("Qwen/Qwen3-0.6B") is None
        True
    """
    # Not `require_model_folder`: a server may download a hub model that is not in this machine's cache yet, and may
    # serve a single file (GGUF). `find_local_path` has the shared part; the checks are for a launch only.
    path = find_local_path(model)
    if path is not None:
        if path.is_dir() and not any((path / name).exists() for name in ("config.json", "params.json")):
            held = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
            raise ConfigError(f"model={model!r} is a folder without config.json (it holds {held}), so not a checkpoint")
        return path
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise ConfigError(f"model={model!r}: there is no such file or folder (the name of a hub model has one slash)")
    return None


def check_config(config: ServerConfig) -> None:
    """Raise now for what would otherwise fail after a minute of loading.

    Raises:
        ConfigError: no Python with SGLang, no such checkpoint, or ``extra_args`` has a flag that a field sets.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError("servers are launched on Linux only; start SGLang elsewhere and connect to its address")
    find_python(config)
    local_model_path(config.model)
    for word in config.extra_args:
        flag = word.partition("=")[0]
        if flag in _OWN_FLAGS:
            raise ConfigError(f"{flag} in extra_args: set ServerConfig.{_OWN_FLAGS[flag]} instead")
        if flag == "--config" and (config.api_key or config.admin_api_key):
            raise ConfigError("SGLang reads one --config file, and the keys take it: give the other settings as flags")
    for name in ("api_key", "admin_api_key"):
        key = getattr(config, name)
        if key is not None and (not key or key.startswith("-") or any(character.isspace() for character in key)):
            raise ConfigError(f"{name} must not be empty, start with '-' or hold white space")


def build_command(
    config: ServerConfig,
    *,
    port: int,
    rendezvous_port: int,
    cpu: bool,
    key_file: Path | None = None,
    weight_version: str | None = None,
) -> list[str]:
    """The server's command line. It holds no key: every user of the machine can read command lines.

    Args:
        config: the server.
        port: HTTP port.
        rendezvous_port: port of the rendezvous of the server's own ranks (SGLang's ``--nccl-port``).
        cpu: use the CPU engine.
        key_file: YAML file with the keys, if there are any.
        weight_version: what the server calls the checkpoint's weights.
    """
    command = [
        *(find_python(config), "-m", "sglang.launch_server"),
        *("--model-path", str(local_model_path(config.model) or config.model)),
        *("--host", config.host, "--port", str(port)),
        # Without this flag SGLang picks a free port and binds it later: two servers that start together pick the same.
        *("--nccl-port", str(rendezvous_port)),
        *("--tp-size", str(config.tp_size)),
    ]
    if config.context_length is not None:
        command += ["--context-length", str(config.context_length)]
    if cpu:
        command += cpu_command_args(config)
    else:
        for flag, value in (
            ("--dtype", config.dtype),
            ("--mem-fraction-static", config.mem_fraction_static),
            ("--max-total-tokens", config.max_total_tokens),
        ):
            if value is not None:
                command += [flag, str(value)]
    if key_file is not None:
        command += ["--config", str(key_file)]
    command += config.extra_args
    return [*command, "--weight-version", weight_version] if weight_version is not None else command


def keys_as_yaml(config: ServerConfig) -> str | None:
    r"""The keys as the contents of SGLang's ``--config`` file; ``None`` when there are none.

    Examples:
        >>> keys_as_yaml(ServerConfig(model="m", api_key="a: b"))
        '"api-key": "a: b"\n'
    """
    keys = {"api-key": config.api_key, "admin-api-key": config.admin_api_key}
    lines = [f"{json.dumps(name)}: {json.dumps(key)}\n" for name, key in keys.items() if key is not None]
    return "".join(lines) or None


def key_spellings(config: ServerConfig) -> list[str]:
    r"""Every spelling of the keys that a log may hold, longest first: plain, and as Python and JSON quote them.

    Examples:
        >>> key_spellings(ServerConfig(model="m", api_key='a"b'))
        ['a\\"b', 'a"b']
    """
    keys = [key for key in (config.api_key, config.admin_api_key) if key]
    spellings = {spelling for key in keys for spelling in (key, repr(key)[1:-1], json.dumps(key)[1:-1])}
    return sorted(spellings, key=len, reverse=True)


def probe_host(host: str) -> str:
    """The address by which this machine reaches a server that listens on ``host``.

    Examples:
        >>> probe_host("0.0.0.0"), probe_host("::"), probe_host("10.0.0.7")
        ('127.0.0.1', '::1', '10.0.0.7')
    """
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


def build_url(config: ServerConfig, port: int) -> str:
    """The URL for clients; if the server listens on all interfaces, other machines can use it too.

    Examples:
        >>> build_url(ServerConfig(model="m"), 30000), build_url(ServerConfig(model="m", host="::1"), 30000)
        ('http://127.0.0.1:30000', 'http://[::1]:30000')
    """
    scheme = "https" if uses_tls(config) else "http"
    host = outward_address(config.host) if config.host in WILDCARD_HOSTS else config.host
    return join_url(scheme, host, port)


def join_url(scheme: str, host: str, port: int | None) -> str:
    """A base URL, with brackets around an IPv6 address.

    Examples:
        >>> join_url("https", "::1", 443)
        'https://[::1]:443'
    """
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def uses_tls(config: ServerConfig) -> bool:
    """Whether ``extra_args`` gives the server a certificate."""
    return any(word.partition("=")[0] == "--ssl-certfile" for word in config.extra_args)


def outward_address(wildcard: str) -> str:
    """This machine's address on the interface of its default route; loopback when it has none."""
    family, anywhere = (socket.AF_INET6, "2001:db8::1") if wildcard == "::" else (socket.AF_INET, "192.0.2.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        try:
            probe.connect((anywhere, 9))
        except OSError:
            return probe_host(wildcard)
        return str(probe.getsockname()[0])
