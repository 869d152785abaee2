"""The device on which the trainer computes."""

from __future__ import annotations

import torch

from torchrl_sglang.errors import ConfigError

__all__ = ["trainer_device"]


def trainer_device(name: str = "auto") -> torch.device:
    """Resolve ``train.device`` to a device.

    Args:
        name: ``auto`` is the last GPU if there are two or more, else the CPU: servers use the first GPUs, and NCCL
            cannot connect two processes on one GPU. Any other value is a torch device name; ``cuda`` is the last GPU.

    Raises:
        ConfigError: torch does not know the name, or the machine has no GPU.
    """
    last = torch.cuda.device_count() - 1
    if name == "auto":
        return torch.device("cuda", last) if last >= 1 else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device: {error}") from error
    if device.type == "cuda":
        if last < 0:
            raise ConfigError("train.device=cuda, but torch finds no GPU on this machine")
        return device if device.index is not None else torch.device("cuda", last)
    return device
