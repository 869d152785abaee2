"""Names the two architectures when a trainer's weights don't fit the servers because they are of another model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from torchrl_sglang.errors import ConfigError, WeightCoverageError
from torchrl_sglang.model_files import read_model_json
from torchrl_sglang.weights.source.transformers_models import find_transformers_model

__all__ = ["architecture_of", "naming_architectures"]


def architecture_of(weights: Any) -> str | None:
    """The transformers class of a module or checkpoint folder; ``None`` for tensors without a model.

    Examples:
        >>> architecture_of({"w": 1}) is None
        True
    """
    if isinstance(weights, (str, Path)):
        names = read_model_json(weights, "config.json").get("architectures")
        return str(names[0]) if names else None
    model = find_transformers_model(weights) if isinstance(weights, nn.Module) else None
    if model is None:
        return None
    name = type(model).__name__
    return name.removeprefix("FSDP") if isinstance(model, FSDPModule) else name  # fully_shard() makes a class FSDP...


@contextmanager
def naming_architectures(own: str | None, served: Sequence[str]) -> Iterator[None]:
    """Put the two architectures before the message of an error about names, shapes or ties, if they differ.

    Equal architectures are not required: weights whose names and shapes fit are sent, and verification decides.

    Args:
        own: architecture of the trainer's weights, if known.
        served: architectures of the served checkpoint.
    """
    try:
        yield
    except (WeightCoverageError, ConfigError) as error:
        if own is not None and served and own not in served:
            error.args = (
                f"the trainer's model is a {own}; the servers hold {' or '.join(served)}, whose weights are others. "
                f"Send a model of that class, or serve the trainer's checkpoint. In detail: {error.args[0]}",
                *error.args[1:],
            )
        raise
