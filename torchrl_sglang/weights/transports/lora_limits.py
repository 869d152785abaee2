"""Which adapters a server takes, by the flags that it was started with.

A server accepts some adapters that end it at their first request, so the flags are compared before anything is sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.protocol.messages import ServerInfo

__all__ = ["require_fitting_servers", "require_lora"]

_STACKED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""Module to the server's own that holds it. Source: SGLang 0.5.23, ``get_normalized_target_modules``."""


def require_lora(info: ServerInfo, *, has_experts: bool = False) -> None:
    """Check that a server takes adapters.

    Args:
        info: the server.
        has_experts: whether its model is a mixture of experts.

    Raises:
        ConfigError: it was started without LoRA, has several replicas inside (SGLang loads adapters into one only), or
            would end at the first request that uses an adapter.
    """
    if not info.lora_enabled:
        raise ConfigError(
            f"{info.url} was started without LoRA: launch it with extra_args=('--enable-lora', "
            "'--max-lora-rank', '...', '--lora-target-modules', ...)"
        )
    if info.dp_size != 1:
        raise ConfigError(
            f"{info.url} has {info.dp_size} data-parallel replicas inside (--dp-size), and SGLang loads no adapter "
            "into such a server: start as many servers instead (AsyncSGLang.from_pretrained(dp_size=...))"
        )
    targets = set(info.raw.get("lora_target_modules") or ())
    if has_experts and info.device == "cpu" and targets & {"all", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}:
        raise ConfigError(
            f"{info.url} was started with --lora-target-modules {' '.join(sorted(targets))}, and SGLang's CPU engine "
            "can't run a model's experts with adapters (its process would end): start it with q_proj k_proj v_proj "
            "o_proj"
        )


def require_fitting_servers(config: Mapping[str, Any], infos: Sequence[ServerInfo]) -> None:
    """Check that every server has room for an adapter.

    Args:
        config: the adapter's configuration.
        infos: the servers.

    Raises:
        ConfigError: its rank is above a server's ``--max-lora-rank``, or it has modules that are not among the server's
            ``--lora-target-modules``.
    """
    needed = {_STACKED.get(name, name) for name in config["target_modules"]}
    for info in infos:
        max_rank, targets = _limits(info)
        if max_rank is not None and config["r"] > max_rank:
            raise ConfigError(
                f"the adapter has rank {config['r']} (several active adapters count together), and {info.url} was "
                f"started with --max-lora-rank {max_rank}: start it with a higher one"
            )
        if targets is None or "all" in targets:
            continue
        absent = sorted(needed - {_STACKED.get(name, name) for name in targets})
        if absent:
            modules = sorted(name for name in config["target_modules"] if _STACKED.get(name, name) in absent)
            raise ConfigError(
                f"the adapter is on {', '.join(modules)}, and {info.url} was started with --lora-target-modules "
                f"{' '.join(sorted(targets))}: start it with all of them, or 'all'"
            )


def _limits(info: ServerInfo) -> tuple[int | None, set[str] | None]:
    """Largest rank and names of modules. What no flag says, SGLang takes from the adapters it was started with."""
    max_rank, targets = info.raw.get("max_lora_rank"), info.raw.get("lora_target_modules")
    if max_rank and targets:
        return int(max_rank), set(targets)
    first = [_read_config(path) for path in _first_adapters(info.raw.get("lora_paths"))]
    if not first or any(config is None for config in first):
        return (int(max_rank) if max_rank else None), (set(targets) if targets else None)
    configs = [config for config in first if config is not None]
    names: set[str] = set()
    for config in configs:
        modules = config.get("target_modules") or ()
        names |= {"all"} if isinstance(modules, str) else {str(name).rpartition(".")[2] for name in modules}
    return (
        int(max_rank) if max_rank else max(int(config.get("r", 0)) for config in configs),
        set(targets) if targets else names,
    )


def _first_adapters(paths: Any) -> Iterable[str]:
    entries = paths.values() if isinstance(paths, Mapping) else paths or ()
    for entry in entries:
        if isinstance(entry, Mapping):
            yield str(entry.get("lora_path", ""))
        else:
            yield str(entry).rpartition("=")[2]


def _read_config(folder: str) -> dict[str, Any] | None:
    """``adapter_config.json`` of a folder on this machine; ``None`` if it can't be read here."""
    try:
        content = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
