"""The trainer's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.recipes.setup.devices import trainer_device

__all__ = ["load_model", "save_model"]


def load_model(path: str, device: str = "auto") -> Any:
    """A causal language model to train: float32, on the trainer's device, without dropout.

    The weights are float32 whatever is computed in, since steps of 1e-6 vanish in bfloat16. Dropout stays off in
    training, since a model with it is not the one that the servers sample from.

    Args:
        path: path or hub name of the checkpoint.
        device: see :func:`trainer_device`.

    Raises:
        ConfigError: no such model or device.
    """
    where = trainer_device(device)
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(where).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={path} can't be loaded: {error}") from error


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a checkpoint that :func:`load_model`, transformers and a server can read."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
