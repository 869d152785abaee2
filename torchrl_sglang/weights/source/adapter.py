"""A PEFT model's adapter as a source of weights, for the transport that sends adapters alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.checkpoint.values import find_non_finite, raise_if_non_finite
from torchrl_sglang.weights.source.adapter_base import check_base_model, check_layer_sizes
from torchrl_sglang.weights.source.adapter_features import refuse_other_features
from torchrl_sglang.weights.source.adapter_layers import read_adapter
from torchrl_sglang.weights.source.interface import WeightSource
from torchrl_sglang.weights.source.shards import is_sharded

__all__ = ["AdapterSource"]


class AdapterSource(WeightSource):
    """What the LoRA layers of a PEFT model add to its weights, in the form that SGLang serves.

    The layers are read as they are, not the configuration: scales, patterns, target expressions, several active
    adapters and merged ones are what the forward pass uses. The adapter sent has one rank and one scale for all
    modules, and all members of a group that SGLang stacks (see :func:`read_adapter`). Nothing is read from a hub, and
    of the checkpoint one row of each tensor.

    Args:
        weights: a module that holds a PEFT model.
        checkpoint: what the servers were started from.
        served_dtype: what the servers compute in; ``None`` if unknown.

    Raises:
        ConfigError: it holds no PEFT model, the model is sharded, its base is not the servers' checkpoint, or it uses a
            feature that SGLang can't serve; the message names it.

    Attributes:
        peft_config: the adapter's configuration for SGLang, as ``adapter_config.json`` would hold it.
    """

    def __init__(self, weights: Any, checkpoint: Checkpoint, served_dtype: torch.dtype | None = None) -> None:
        model = _find_peft_model(weights)
        refuse_other_features(model)
        adapter = read_adapter(model)
        check_layer_sizes(adapter.tensors, checkpoint)
        check_base_model(model, checkpoint, served_dtype)
        self.module = model
        self.peft_config = adapter.config
        self._tensors = adapter.tensors

    def specs(self) -> dict[str, TensorSpec]:
        """What would be sent."""
        return {name: TensorSpec.of(name, tensor) for name, tensor in self._tensors.items()}

    def tensors(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The adapter's tensors, as they were when this object was made."""
        for name in self._tensors if names is None else names:
            yield name, self._tensors[name]

    def check_values(self, names: Sequence[str] | None = None, target: torch.dtype | None = None) -> None:
        """Read every tensor once."""
        raise_if_non_finite(find_non_finite(self.tensors(names), target))


def _find_peft_model(weights: Any) -> Any:
    modules = weights.modules() if isinstance(weights, nn.Module) else ()
    model = next((each for each in modules if hasattr(each, "peft_config") and hasattr(each, "active_adapters")), None)
    if model is None:
        raise ConfigError(
            f"transport='lora' sends the adapter of a PEFT model, and there is none in this {type(weights).__name__}; "
            "transport='broadcast' sends whole models"
        )
    if is_sharded(model):
        raise ConfigError(
            "transport='lora' can't send the adapter of a sharded model (FSDP2): transport='broadcast' gathers it and "
            "merges it into what is sent"
        )
    return model
