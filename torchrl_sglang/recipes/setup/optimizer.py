"""Build AdamW and the learning rate schedule from the settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from torchrl_sglang.recipes.setup.settings import TrainSettings

__all__ = ["learning_rate_factor", "make_optimizer"]


def make_optimizer(
    modules: Mapping[str, nn.Module], settings: TrainSettings, learning_rates: Mapping[str, float] | None = None
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Make an optimizer for all parameters that require a gradient, and its schedule; step both together.

    Args:
        modules: the trained modules, by name.
        settings: learning rate, betas, weight decay and schedule.
        learning_rates: module name to learning rate, for modules that do not use ``settings.lr``.
    """
    groups = [
        {
            "params": [parameter for parameter in module.parameters() if parameter.requires_grad],
            "lr": (learning_rates or {}).get(name, settings.lr),
        }
        for name, module in modules.items()
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    factor = learning_rate_factor(
        settings.schedule, warmup_steps=settings.warmup_steps, total_steps=settings.steps * settings.epochs
    )
    return optimizer, LambdaLR(optimizer, factor)


def learning_rate_factor(schedule: str, *, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate, as a function of the number of optimizer steps already taken.

    Args:
        schedule: ``constant``, ``linear`` or ``cosine``.
        warmup_steps: number of steps over which the factor rises to 1; it is above 0 in the first.
        total_steps: the step at which ``linear`` and ``cosine`` reach 0.

    Examples:
        >>> [round(learning_rate_factor("linear", warmup_steps=2, total_steps=6)(n), 2) for n in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def factor(done: int) -> float:
        if done < warmup_steps:
            return (done + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        progress = min((done - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
