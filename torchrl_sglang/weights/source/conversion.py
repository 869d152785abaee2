"""transformers' save-time conversion: from the tensors a module holds to those its checkpoint holds.

transformers 5 packs a layer's experts into two parameters and renames parts of some models; ``save_pretrained`` undoes
that through ``revert_weight_conversion``. This module is the one place that calls it, and the only thing it relies on
is that function's signature, ``(model, state_dict) -> state_dict``. Source: transformers 5.19,
``transformers.core_model_loading``.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torchrl_sglang.errors import ConfigError

__all__ = ["ConversionGroup", "convert", "model_from_config", "names_left_out", "plan_conversion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionGroup:
    """Tensors of a module that become tensors of a checkpoint together.

    Attributes:
        sources: names in the module.
        outputs: name in the checkpoint to ``(shape, dtype)``.
        renames: the one source is the one output, only called differently.
    """

    sources: tuple[str, ...]
    outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    renames: bool


class _Traced(torch.Tensor):
    """A meta tensor that remembers which module tensors it was computed from, through any operation."""

    origin: frozenset[str]

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: torch.dtype, origin: frozenset[str]) -> _Traced:
        traced = torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)
        traced.origin = origin
        return traced

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        origin = frozenset().union(*(getattr(leaf, "origin", frozenset()) for leaf in inputs))

        def mark(tensor: _Traced) -> _Traced:
            tensor.origin = getattr(tensor, "origin", frozenset()) | origin
            return tensor

        return tree_map_only(cls, mark, result)


def plan_conversion(
    model: nn.Module, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> list[ConversionGroup] | None:
    """Find out what becomes of a module's tensors, on shapes alone.

    Args:
        model: a transformers model (may be on the meta device); it says which conversion applies.
        tensors: name in the module to ``(shape, dtype)``; all of them.

    Returns:
        Groups in the order of ``tensors``, or ``None`` if this transformers or this model has no conversion.
    """
    revert = _revert_function()
    if revert is None:
        return None
    traced = {name: _Traced.make(shape, dtype, frozenset({name})) for name, (shape, dtype) in tensors.items()}
    try:
        converted = revert(model, dict(traced))
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None  # tensors that don't fit the model's conversion: the coverage check will say which
    position = {name: index for index, name in enumerate(tensors)}
    return sorted(_grouped(traced, converted), key=lambda group: min(map(position.__getitem__, group.sources)))


def _grouped(traced: Mapping[str, _Traced], converted: Mapping[str, _Traced]) -> list[ConversionGroup]:
    """Outputs with a source in common, directly or through others, belong to one group."""
    parent = {name: name for name in traced}

    def leader(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    for tensor in converted.values():
        first, *others = tensor.origin or ("",)
        for other in others:
            parent[leader(other)] = leader(first)
    outputs: dict[str, dict[str, _Traced]] = {}
    for name, tensor in converted.items():
        for source in itertools.islice(tensor.origin, 1):
            outputs.setdefault(leader(source), {})[name] = tensor
    sources: dict[str, list[str]] = {}
    for name in traced:
        sources.setdefault(leader(name), []).append(name)
    with torch._C.DisableTorchFunctionSubclass():  # or every look at a shape would be traced, too
        return [
            ConversionGroup(
                sources=tuple(sources[key]),
                outputs={name: (tuple(tensor.shape), tensor.dtype) for name, tensor in group.items()},
                renames=[id(tensor) for tensor in group.values()] == [id(traced[name]) for name in sources[key]],
            )
            for key, group in outputs.items()
        ]


def convert(model: nn.Module, group: ConversionGroup, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn the tensors of one group into the checkpoint's.

    Args:
        model: the model the group was planned with.
        group: from :func:`plan_conversion`.
        tensors: the group's sources, whole and detached.

    Raises:
        ConfigError: the result is not what was planned.
    """
    if group.renames:
        return dict.fromkeys(group.outputs, tensors[group.sources[0]])
    revert = _revert_function()
    assert revert is not None
    with torch.no_grad():
        converted: dict[str, torch.Tensor] = revert(model, dict(tensors))
    got = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in converted.items()}
    if got != dict(group.outputs):
        raise ConfigError(
            f"transformers turned {', '.join(group.sources)} into {sorted(got)}, not into {sorted(group.outputs)} as "
            "it did for the whole model: pass tensors under checkpoint names instead"
        )
    return converted


def model_from_config(config: Mapping[str, Any]) -> nn.Module | None:
    """The checkpoint's model without values (meta device), or ``None`` if transformers doesn't know it."""
    if not config.get("architectures") or "model_type" not in config:
        return None
    try:
        import transformers
    except ImportError:
        return None
    architecture = getattr(transformers, str(config["architectures"][0]), None)
    if architecture is None:
        return None
    model_config = architecture.config_class.from_dict(dict(config))
    with torch.device("meta"):
        model: nn.Module = architecture(model_config)
    return model


def names_left_out(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's ``names`` that the model's class declares it doesn't load (layers for speculation)."""
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return [name for name in names if any(pattern.search(name) for pattern in patterns)]


def is_transformers_model(module: nn.Module) -> bool:
    """Whether ``module`` is a transformers model; transformers isn't imported to find out."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def _revert_function() -> Callable[[nn.Module, dict[str, Any]], dict[str, Any]] | None:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4: modules and checkpoints have the same names
        return None
    return revert_weight_conversion  # type: ignore[no-any-return]
