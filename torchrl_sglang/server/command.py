"""Builds the command line of a server and its URL, and checks settings before anything is started."""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
from pathlib import Path
from typing import Any

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
    "is_loopback",
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
    _settings_file(config)
    if config.api_key is None and not is_loopback(config.host):
        raise ConfigError(
            f"host={config.host!r} is reached from other machines, and whoever reaches a server without a key can load "
            "weights into it from any path. Give api_key or api_key_file; api_key=False launches it without a key"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on ``host``.

    Examples:
        >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", "node-7")]
        [True, True, True, False, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _settings_file(config: ServerConfig) -> dict[str, Any]:
    """The contents of the ``--config`` file in ``extra_args``; empty if there is none.

    Raises:
        ConfigError: it can't be read, or it holds a key, which clients would not know.
    """
    path = _settings_path(config)
    if path is None:
        return {}
    import yaml  # type: ignore[import-untyped]  # transformers requires it

    try:
        settings = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        # The parser's error shows a piece of the file, which may hold a key.
        raise ConfigError(f"--config {path} in extra_args can't be read ({type(error).__name__})") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path} in extra_args holds no settings: SGLang reads YAML, name: value")
    for name in ("api_key", "admin_api_key"):
        if name in {str(given).replace("-", "_") for given in settings}:
            raise ConfigError(f"--config {path} in extra_args holds {name}, which clients need too: use {name}_file=")
    return settings


def _settings_path(config: ServerConfig) -> str | None:
    words = config.extra_args
    if "--config" not in words:
        return None
    if words.count("--config") > 1 or words[-1] == "--config":
        raise ConfigError("--config in extra_args: SGLang takes one, followed by the path of a YAML file")
    return words[words.index("--config") + 1]


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
        key_file: YAML file with the keys, if there are any (:func:`keys_as_yaml`).
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
    words = list(config.extra_args)
    if key_file is not None:  # it holds what the file in extra_args holds: SGLang reads one
        if "--config" in words:
            at = words.index("--config")
            del words[at : at + 2]
        command += ["--config", str(key_file)]
    command += words
    return [*command, "--weight-version", weight_version] if weight_version is not None else command


def keys_as_yaml(config: ServerConfig) -> str | None:
    r"""The keys, and what the ``--config`` file in ``extra_args`` holds, as one such file; ``None`` without keys.

    Examples:
        >>> keys_as_yaml(ServerConfig(model="m", api_key="a:b"))
        '{"api-key": "a:b"}\n'
    """
    named = {"api-key": config.api_key, "admin-api-key": config.admin_api_key}
    keys = {name: key for name, key in named.items() if key}
    # JSON is YAML too, and quotes every text.
    return json.dumps({**_settings_file(config), **keys}, default=str) + "\n" if keys else None


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
