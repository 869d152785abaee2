"""Refuses to launch a server for a checkpoint that SGLang would compute in another way than transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import read_model_json
from torchrl_sglang.protocol.model_limits import find_unsupported

__all__ = ["refuse_unsupported_model"]


def refuse_unsupported_model(config: ServerConfig, *, cpu: bool) -> None:
    """Compare the checkpoint's ``config.json`` with what SGLang is known to leave out.

    Does nothing where the checkpoint is not on this machine.

    Args:
        config: the server.
        cpu: whether it runs on SGLang's CPU engine.

    Raises:
        ConfigError: SGLang would ignore a setting of the checkpoint, and so return wrong log-probs.
    """
    words = config.extra_args
    revision = _value_of(words, "--revision")
    checkpoint = {**read_model_json(config.model, "config.json", revision), **_overrides(words)}
    context_length = _value_of(words, "--context-length") or config.context_length
    backend = _value_of(words, "--attention-backend") or ("torch_native" if cpu else None)
    problems = find_unsupported(
        checkpoint,
        attention_backend=backend,
        context_length=None if context_length is None else int(context_length),
    )
    if problems:
        raise ConfigError(
            f"SGLang does not compute {config.model!r} as transformers does: {'; '.join(problems)}. Nothing was started"
        )


def _value_of(words: Sequence[str], flag: str) -> str | None:
    """The last value given for a flag, as ``--flag value`` or ``--flag=value``."""
    values = [following for word, following in pairwise(words) if word == flag]
    values += [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return values[-1] if values else None


def _overrides(words: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(_value_of(words, "--json-model-override-args") or "{}")
    except ValueError:  # SGLang refuses it, too, and says where the error is
        return {}
    return found if isinstance(found, dict) else {}
