"""Load and save the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from torchrl_sglang.disk_space import writing
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import find_local_path
from torchrl_sglang.recipes.setup.devices import trainer_device

__all__ = ["load_model", "save_model"]


def load_model(path: str, device: str = "auto") -> Any:
    """Load a causal language model for training: float32, on the trainer's device, in eval mode.

    The weights are float32 whatever dtype is used for computing, because optimizer steps of 1e-6 vanish in bfloat16.
    Dropout stays off during training: with dropout, the trained model would differ from the one that the servers
    sample from.

    Args:
        path: path or hub name of the checkpoint, or ``SmolLM2``.
        device: see :func:`trainer_device`.

    Raises:
        ConfigError: the model or the device does not exist.
    """
    target = trainer_device(device)
    found = find_local_path(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path if found is None else found, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={path} can't be loaded: {error}") from error
    return model.to(target).eval()


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a checkpoint that :func:`load_model`, transformers and SGLang servers can load.

    Raises:
        StorageError: the disk is full, or can't be written to; a folder that was new is removed.
    """
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    new = None if folder.exists() else folder
    with writing(folder, "the model", needed_bytes=num_bytes, incomplete=new):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
