"""The trainer's weights on the servers before anything is generated with them."""

from __future__ import annotations

from typing import Any

from torchrl_sglang.recipes.checkpoints import Checkpoint
from torchrl_sglang.weights import SGLangWeightSyncScheme, SyncReport

__all__ = ["push_first_weights"]


def push_first_weights(
    scheme: SGLangWeightSyncScheme, model: Any, checkpoint: Checkpoint | None, *, launched: bool
) -> SyncReport | None:
    """Send a model's weights, if the servers may hold others.

    Servers just launched from the model's own checkpoint hold them already. Those that ran before may hold anything,
    and after a resume all hold the wrong ones.

    Args:
        scheme: leads to the servers.
        model: the trainer's, restored.
        checkpoint: what was resumed from. Its version number goes on, unless the servers have come further.
        launched: the servers were launched for this run.

    Returns:
        What was sent; ``None`` when there was no need to.
    """
    if launched and checkpoint is None:
        return None
    scheme.pool.connect()
    resumed = 0 if checkpoint is None else checkpoint.weight_version
    return scheme.sync.push(model, version=max(resumed, scheme.pool.weight_version + 1))
