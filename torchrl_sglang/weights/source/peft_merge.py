"""Merge PEFT adapters into the weights they adapt, one layer at a time, without changing the live model.

PEFT's own ``merge`` does the arithmetic on a private copy of one layer; in the copy the adapted weight is a clone and
everything else shares memory with the live layer. So rank and alpha patterns, rsLoRA, DoRA and future kinds of adapters
are merged correctly, bit by bit as ``merge_and_unload`` merges them. This module never imports peft: a model with PEFT
layers exists only if peft is already imported.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.source.shards import full_tensor, local_tensor

__all__ = ["MergePlan", "MergedParameter", "plan_merge"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedParameter:
    """One parameter of an adapted layer.

    Attributes:
        base: the parameter below the adapter.
        is_adapted: whether an adapter changes it; otherwise its values are those of :attr:`base`.
        trainable: whether an optimiser changes it or an adapter that is merged into it.
        read: computes the merged values; collective if any of :attr:`parts` is sharded.
        parts: all tensors that :attr:`read` uses.
    """

    base: torch.Tensor
    is_adapted: bool
    trainable: bool
    read: Callable[[], torch.Tensor]
    parts: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergePlan:
    """The parameters that a PEFT module has after merging.

    Attributes:
        parameters: by the name they have in the layer that PEFT wrapped.
        replacement: the module whose parameters take the place of the PEFT module's (``modules_to_save``).
    """

    parameters: dict[str, MergedParameter]
    replacement: nn.Module | None = None


def plan_merge(module: nn.Module) -> MergePlan | None:
    """List the parameters that a PEFT module has after merging; ``None`` if ``module`` is not a PEFT module.

    Args:
        module: any module; its children are not visited.

    Raises:
        ConfigError: this kind of adapter can't be merged into one weight, or the weight is quantised.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    other = sys.modules.get("peft.utils.other")
    if tuners is None or other is None:
        return None
    if isinstance(module, tuners.BaseTunerLayer):
        return MergePlan(parameters=_merged_parameters(module))
    if isinstance(module, other.ModulesToSaveWrapper):
        names = [] if module.disable_adapters else [a for a in module.active_adapters if a in module.modules_to_save]
        active = module.modules_to_save[names[0]] if names else module.original_module
        return MergePlan(parameters={}, replacement=active)
    if isinstance(module, other.AuxiliaryTrainingWrapper):
        raise ConfigError(
            f"PEFT's {type(module).__name__} can't be merged name by name: merge it into the model before the sync"
        )
    return None


def _merged_parameters(layer: Any) -> dict[str, MergedParameter]:
    changes_bias = not hasattr(layer, "lora_bias") or any(layer.lora_bias.values())
    needs_merge = any(_unmerged_adapters(tuner) or _must_unmerge(tuner) for tuner in _tuner_layers(layer))
    parameters = {}
    for name, base in layer.get_base_layer().named_parameters():
        if not base.dtype.is_floating_point:
            raise ConfigError(
                f"the base weight of a {type(layer).__name__} is quantised ({base.dtype}), so an adapter merged into "
                "it would be rounded: load the base model unquantised, or send the adapter alone (transport='lora')"
            )
        is_adapted = needs_merge and (name != "bias" or changes_bias)
        adapter_parameters = _adapter_parameters(layer) if is_adapted else []
        parameters[name] = MergedParameter(
            base=base,
            is_adapted=is_adapted,
            trainable=base.requires_grad or any(parameter.requires_grad for parameter in adapter_parameters),
            read=partial(_merge, layer, name) if is_adapted else partial(full_tensor, base),
            parts=(base, *adapter_parameters),
        )
    return parameters


def _unmerged_adapters(tuner: Any) -> list[str]:
    """Adapters that the forward pass uses and that are not yet merged into the base weight."""
    if tuner.disable_adapters:
        return []
    return [name for name in tuner.active_adapters if name not in tuner.merged_adapters]


def _must_unmerge(tuner: Any) -> bool:
    """Whether the base weight contains adapters that the forward pass does not use."""
    return bool(tuner.disable_adapters and tuner.merged)


def _tuner_layers(layer: Any) -> list[Any]:
    """The layer and the tuner layers that it wraps (PEFT nests one for each targeted parameter), innermost first."""
    nested = [layer]
    while hasattr(nested[0], "base_layer") and hasattr(nested[0].base_layer, "merged_adapters"):
        nested.insert(0, nested[0].base_layer)
    return nested


def _adapter_parameters(layer: Any) -> list[torch.Tensor]:
    base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    return [parameter for parameter in layer.parameters() if id(parameter) not in base]


def _merge(layer: Any, name: str) -> torch.Tensor:
    private = _private_copy(layer)
    with torch.no_grad():
        for tuner in _tuner_layers(private):
            if _must_unmerge(tuner):
                tuner.unmerge()
            elif names := _unmerged_adapters(tuner):
                tuner.merge(adapter_names=names)
    merged: torch.Tensor = private.get_base_layer().get_parameter(name)
    return merged.detach()


def _private_copy(module: Any, *, below_adapter: bool = False) -> Any:
    """Copy a layer so that merging in the copy leaves the live layer unchanged.

    Merging writes to the base layer's parameters, to lists of merged adapters and to small caches. So the copy has its
    own containers and clones of the parameters below the adapter. Its other parameters share the live layer's memory
    unless they are sharded; those are gathered.
    """
    clone = copy.copy(module)
    for attribute, value in vars(clone).items():
        if isinstance(value, (dict, list, set)):
            vars(clone)[attribute] = copy.copy(value)
    for name, parameter in clone._parameters.items():
        if parameter is not None:
            whole = full_tensor(parameter)
            if below_adapter and _storage_address(whole) == _storage_address(parameter):
                whole = whole.clone()
            clone._parameters[name] = nn.Parameter(whole, requires_grad=False)
    for name, child in clone._modules.items():
        if child is not None:
            clone._modules[name] = _private_copy(child, below_adapter=below_adapter or name == "base_layer")
    return clone


def _storage_address(tensor: torch.Tensor) -> int:
    return local_tensor(tensor).untyped_storage().data_ptr()
