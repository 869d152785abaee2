"""Adapters in folders that a server is started with (``--lora-paths``): what SGLang would get wrong is refused.

SGLang (0.5.23) computes ``lora_alpha / r * B A`` for all modules, ignores other features, and ends at the first request
with an adapter that has k, v or up projections alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import read_safetensors_header

__all__ = ["check_saved_adapters"]

_IGNORED = (
    *("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "use_qalora"),
    *("trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens", "use_bdlora"),
    *("arrow_config", "kasa_config"),
)
_INSTEAD = "load it into the model with PEFT and send it with SyncConfig(transport='lora'), or serve the merged model"
_MAX_HEADER_BYTES = 64 * 2**20


def check_saved_adapters(words: Sequence[str]) -> None:
    """Check the folders on this machine that ``--lora-paths`` names. Others, and adapters on the hub, are not read.

    Args:
        words: ``ServerConfig.extra_args``.

    Raises:
        ConfigError: naming the adapter and what SGLang can't serve of it.
    """
    for folder in _folders(words):
        file = folder / "adapter_config.json"
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is not valid JSON: {error}") from None
        problem = _config_problem(config) or _names_problem(_tensor_names(folder))
        if problem:
            raise ConfigError(f"the adapter in {folder} (--lora-paths) {problem}: {_INSTEAD}")


def _folders(words: Sequence[str]) -> Iterator[Path]:
    inside = False
    for word in words:
        flag, has_value, value = word.partition("=")
        if word.startswith("--"):
            inside = flag == "--lora-paths"
            entry = value if inside and has_value else ""
        else:
            entry = word if inside else ""
        if entry.startswith("{"):
            try:
                entry = str(json.loads(entry).get("lora_path", ""))
            except ValueError:
                continue  # SGLang refuses it
        if entry:
            path = entry if Path(entry).is_dir() else entry.partition("=")[2]
            if path:
                yield Path(path)


def _config_problem(config: Mapping[str, Any]) -> str:
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        return f"is of PEFT's type {config['peft_type']}"
    for name in _IGNORED:
        if config.get(name):
            return f"has {name}={config[name]!r}, which SGLang does not compute"
    if config.get("bias", "none") != "none":
        return f"has bias={config['bias']!r}, which SGLang does not compute"
    return ""


def _names_problem(names: Collection[str]) -> str:
    """What is wrong with the tensors; an adapter that lacks members of a stack ends the server."""
    other = next((name for name in names if not re.search(r"\.lora_(embedding_)?[AB](\.weight)?$", name)), None)
    if other is not None:
        return f"holds {other!r}, which SGLang does not use"
    members: dict[str, set[str]] = {}
    for name in names:
        match = re.search(r"(.*\.(?:self_attn|mlp))\.(\w+)\.lora_A", name)
        if match:
            members.setdefault(match[1], set()).add(match[2])
    for parent, found in members.items():
        if found & {"q_proj", "k_proj", "v_proj"} and not {"q_proj", "v_proj"} <= found:
            return f"has {', '.join(sorted(found))} of {parent}, and SGLang needs q_proj and v_proj together"
        if "up_proj" in found and "gate_proj" not in found:
            return f"has up_proj of {parent} without gate_proj, which SGLang can't use"
    return ""


def _tensor_names(folder: Path) -> list[str]:
    """Names in ``adapter_model.safetensors``; none if the file is of another kind or can't be read."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return []
    return [name for name in read_safetensors_header(file, _MAX_HEADER_BYTES) if name != "__metadata__"]
