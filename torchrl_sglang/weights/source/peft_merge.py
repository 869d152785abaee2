"""PEFT adapters folded into the weights they adapt, one layer at a time, the live model untouched.

PEFT itself does the arithmetic: its own ``merge`` runs on a private copy of one layer, in which the adapted weight is
a clone and everything else an alias. So rank and alpha patterns, rsLoRA, DoRA and whatever comes next are right by
construction, and equal to ``merge_and_unload`` to the last bit. peft is never imported: a model can hold its layers
only if somebody else has.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchrl_sglang.errors import ConfigError

__all__ = ["Adapted", "Merged", "adapted"]

Gather = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    """One parameter of an adapted layer.

    Attributes:
        base: the parameter below the adapter.
        is_base: no adapter changes it, so it is :attr:`base` itself.
        trainable: an optimiser changes it, or an adapter that goes into it.
        read: computes the merged values; collective if any of :attr:`parts` is sharded.
        parts: all tensors that go into it.
    """

    base: torch.Tensor
    is_base: bool
    trainable: bool
    read: Callable[[], torch.Tensor]
    parts: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapted:
    """What a PEFT module amounts to without PEFT.

    Attributes:
        merged: parameters by the name they'd have in the layer that PEFT wrapped.
        plain: modules to be taken in its place as they are (``modules_to_save``).
    """

    merged: dict[str, Merged]
    plain: tuple[nn.Module, ...] = ()


def adapted(module: nn.Module, gather: Gather) -> Adapted | None:
    """See through a PEFT module; ``None`` for any other module.

    Args:
        module: any module.
        gather: makes a whole tensor of a sharded one.

    Raises:
        ConfigError: a kind of adapter that can't be merged into one weight, named.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    other = sys.modules.get("peft.utils.other")
    if tuners is None or other is None:
        return None
    if isinstance(module, tuners.BaseTunerLayer):
        return _adapted_layer(module, gather)
    if isinstance(module, other.ModulesToSaveWrapper):
        names = [] if module.disable_adapters else [a for a in module.active_adapters if a in module.modules_to_save]
        chosen = module.modules_to_save[names[0]] if names else module.original_module
        return Adapted(merged={}, plain=(chosen,))
    if isinstance(module, other.AuxiliaryTrainingWrapper):
        raise ConfigError(
            f"PEFT's {type(module).__name__} can't be merged name by name: merge it into the model before the sync"
        )
    return None


def _adapted_layer(layer: Any, gather: Gather) -> Adapted:
    base = layer.get_base_layer()
    changes_bias = not hasattr(layer, "lora_bias") or any(layer.lora_bias.values())
    to_merge = _adapters_to_merge(layer)
    merged = {}
    for name, parameter in base.named_parameters():
        if not parameter.dtype.is_floating_point:
            raise ConfigError(
                f"the base weight of a {type(layer).__name__} is quantised ({parameter.dtype}), so an adapter merged "
                "into it would be rounded: load the base model unquantised, or send the adapter alone "
                "(transport='lora')"
            )
        is_base = not to_merge or (name == "bias" and not changes_bias)
        adapter_parts = [] if is_base else _adapter_parameters(layer)
        merged[name] = Merged(
            base=parameter,
            is_base=is_base,
            trainable=parameter.requires_grad or any(part.requires_grad for part in adapter_parts),
            read=_reader(layer, parameter, name, gather, is_base),
            parts=(parameter, *adapter_parts),
        )
    return Adapted(merged=merged)


def _adapters_to_merge(layer: Any) -> list[str]:
    """What separates the base weight from what forward computes; ``["-"]`` when merged adapters must come out again."""
    names: list[str] = []
    for module in _tuner_layers(layer):
        if module.disable_adapters:
            names += ["-"] if module.merged else []
        else:
            names += [name for name in module.active_adapters if name not in module.merged_adapters]
    return names


def _tuner_layers(layer: Any) -> list[Any]:
    """The layer, and those it wraps in turn (PEFT nests one per targeted parameter), innermost first."""
    nested = [layer]
    while hasattr(nested[0], "base_layer") and hasattr(nested[0].base_layer, "merged_adapters"):
        nested.insert(0, nested[0].base_layer)
    return nested


def _adapter_parameters(layer: Any) -> list[torch.Tensor]:
    base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    return [parameter for parameter in layer.parameters() if id(parameter) not in base]


def _reader(
    layer: Any, parameter: torch.Tensor, name: str, gather: Gather, is_base: bool
) -> Callable[[], torch.Tensor]:
    if is_base:
        return lambda: gather(parameter)

    def merge() -> torch.Tensor:
        private = _private_copy(layer, gather)
        with torch.no_grad():
            for module in _tuner_layers(private):
                if module.disable_adapters:
                    if module.merged:
                        module.unmerge()
                else:
                    names = [a for a in module.active_adapters if a not in module.merged_adapters]
                    if names:
                        module.merge(adapter_names=names)
        result: torch.Tensor = private.get_base_layer().get_parameter(name)
        return result.detach()

    return merge


def _private_copy(module: Any, gather: Gather, *, below_adapter: bool = False) -> Any:
    """A copy whose containers are its own and whose parameters are whole; those below the adapter are clones.

    Merging writes to the base layer's parameters, to lists of merged adapters and to small caches; a copy of all of
    these and of nothing else is what keeps the live layer as it is.
    """
    clone = copy.copy(module)
    for attribute, value in vars(clone).items():
        if isinstance(value, (dict, list, set)):
            vars(clone)[attribute] = copy.copy(value)
    for name, parameter in clone._parameters.items():
        if parameter is not None:
            whole = gather(parameter)
            if below_adapter and whole.untyped_storage().data_ptr() == _storage(parameter):
                whole = whole.clone()
            clone._parameters[name] = nn.Parameter(whole, requires_grad=False)
    for name, child in clone._modules.items():
        if child is not None:
            clone._modules[name] = _private_copy(child, gather, below_adapter=below_adapter or name == "base_layer")
    return clone


def _storage(tensor: torch.Tensor) -> int:
    local = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage().data_ptr()
