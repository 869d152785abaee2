"""What transformers knows about a trainer's model or a checkpoint's architecture."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from torchrl_sglang.weights.checkpoint.headers import Checkpoint

__all__ = ["find_omitted_names", "find_transformers_model", "model_from_config", "transformers_models"]


def transformers_models(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models in ``module``, by path (empty, or ending in a dot).

    Does not import transformers: if nobody has imported it, there are none.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return {}
    found: dict[str, nn.Module] = {}
    for path, part in module.named_modules():
        prefix = path + "." if path else ""
        if isinstance(part, modeling.PreTrainedModel) and not any(prefix.startswith(outer) for outer in found):
            found[prefix] = part
    return found


def find_transformers_model(module: nn.Module | None) -> nn.Module | None:
    """The transformers model inside ``module``, if there is exactly one."""
    models = transformers_models(module) if module is not None else {}
    return next(iter(models.values())) if len(models) == 1 else None


def model_from_config(config: Mapping[str, Any]) -> nn.Module | None:
    """The checkpoint's model on the meta device; ``None`` if transformers doesn't know its architecture.

    Args:
        config: the checkpoint's ``config.json``.
    """
    if not config.get("architectures") or "model_type" not in config:
        return None
    try:
        import transformers
    except ImportError:
        return None
    architecture = getattr(transformers, str(config["architectures"][0]), None)
    if architecture is None:
        return None
    model_config = architecture.config_class.from_dict(dict(config))
    with torch.device("meta"):
        model: nn.Module = architecture(model_config)
    return model


def find_omitted_names(model: nn.Module | None, checkpoint: Checkpoint, sent: Collection[str]) -> tuple[str, ...]:
    """Names of the checkpoint that are not sent because the model's class does not load them.

    Some classes omit layers for speculative decoding (``_keys_to_ignore_on_load_unexpected``).

    Args:
        model: the trainer's transformers model; ``None`` takes the class from the checkpoint's config.
        checkpoint: what the servers were started from.
        sent: checkpoint names of the trainer's tensors.
    """
    absent = [name for name in checkpoint.specs if name not in sent and not checkpoint.is_optional(name)]
    if not absent:
        return ()
    model = model if model is not None else model_from_config(checkpoint.config)
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return tuple(name for name in absent if any(pattern.search(name) for pattern in patterns))
