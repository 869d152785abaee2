"""A PEFT model's adapter as a source of weights, for the transport that sends adapters alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.checkpoint.values import find_non_finite, raise_if_non_finite
from torchrl_sglang.weights.source.interface import WeightSource
from torchrl_sglang.weights.source.shards import is_sharded

__all__ = ["AdapterSource"]


class AdapterSource(WeightSource):
    """The tensors of a PEFT model's one active adapter, under the names of ``adapter_model.safetensors``.

    Args:
        weights: a module that holds a PEFT model.

    Raises:
        ConfigError: it holds none, the model is sharded, or several adapters are active.

    Attributes:
        peft_config: the adapter's configuration.
    """

    def __init__(self, weights: Any) -> None:
        from peft import get_peft_model_state_dict  # an extra

        model = _find_peft_model(weights)
        names = model.active_adapters
        active = list(names() if callable(names) else names)
        if len(active) != 1:
            raise ConfigError(f"one adapter can be sent, but {active} are active: model.set_adapter(name)")
        state = get_peft_model_state_dict(model, adapter_name=active[0])
        self.module = model
        self.peft_config = model.peft_config[active[0]]
        self._tensors: dict[str, torch.Tensor] = {name: tensor.detach() for name, tensor in state.items()}

    def specs(self) -> dict[str, TensorSpec]:
        """What would be sent."""
        return {name: TensorSpec.of(name, tensor) for name, tensor in self._tensors.items()}

    def tensors(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The adapter's live tensors."""
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
