"""Where the trainer computes."""

from __future__ import annotations

import torch

from torchrl_sglang.errors import ConfigError

__all__ = ["trainer_device"]


def trainer_device(name: str = "auto") -> torch.device:
    """The trainer's device.

    Args:
        name: ``auto`` is the last GPU where there are two or more, else the CPU: servers take the first ones, and NCCL
            does not join two processes on one. Anything else is torch's own name for a device.

    Raises:
        ConfigError: a name that torch doesn't know, or a GPU where there is none.
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
            raise ConfigError("train.device=cuda, but torch sees no GPU here")
        return device if device.index is not None else torch.device("cuda", last)
    return device
