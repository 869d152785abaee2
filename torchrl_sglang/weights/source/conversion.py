"""Convert a module's tensors into its checkpoint's, as transformers does when it saves a model.

transformers 5 packs a layer's experts into two parameters and renames parts of some models; ``save_pretrained`` undoes
both through ``revert_weight_conversion``. Only this module calls that function, and it relies on nothing but the
signature ``(model, state_dict) -> state_dict``. Source: transformers 5.19, ``transformers.core_model_loading``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torchrl_sglang.errors import ConfigError

__all__ = ["ConversionGroup", "convert", "plan_conversion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionGroup:
    """Tensors of a module that are converted together into tensors of a checkpoint.

    Attributes:
        sources: names in the module.
        outputs: name in the checkpoint to ``(shape, dtype)``.
        renames: whether there is one source and one output, and only the name differs.
    """

    sources: tuple[str, ...]
    outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    renames: bool


class _Traced(torch.Tensor):
    """A meta tensor that records which module tensors it was computed from, through any operation."""

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
    """Find which checkpoint tensors are made from which of a module's tensors, from their shapes and dtypes.

    Args:
        model: a transformers model (may be on the meta device); its class determines the conversion.
        tensors: name in the module to ``(shape, dtype)``; all tensors of the module.

    Returns:
        Groups in the order of ``tensors``. ``None`` if the installed transformers has no conversion, or if the tensors
        don't fit the model's.
    """
    revert = _revert_function()
    if revert is None:
        return None
    traced = {name: _Traced.make(shape, dtype, frozenset({name})) for name, (shape, dtype) in tensors.items()}
    try:
        converted = revert(model, dict(traced))
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None  # the tensors don't fit the conversion: the coverage check names them
    position = {name: index for index, name in enumerate(tensors)}
    return sorted(_grouped(traced, converted), key=lambda group: min(map(position.__getitem__, group.sources)))


def _grouped(traced: Mapping[str, _Traced], converted: Mapping[str, _Traced]) -> list[ConversionGroup]:
    """Group outputs that share a source, directly or through other outputs."""
    parent = {name: name for name in traced}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    for tensor in converted.values():
        first, *others = tensor.origin or ("",)
        for other in others:
            parent[root(other)] = root(first)
    outputs: dict[str, dict[str, _Traced]] = {}
    for name, tensor in converted.items():
        for source in itertools.islice(tensor.origin, 1):
            outputs.setdefault(root(source), {})[name] = tensor
    sources: dict[str, list[str]] = {}
    for name in traced:
        sources.setdefault(root(name), []).append(name)
    with torch._C.DisableTorchFunctionSubclass():  # otherwise every access to a shape is traced, too
        return [
            ConversionGroup(
                sources=tuple(sources[key]),
                outputs={name: (tuple(tensor.shape), tensor.dtype) for name, tensor in group.items()},
                renames=[id(tensor) for tensor in group.values()] == [id(traced[name]) for name in sources[key]],
            )
            for key, group in outputs.items()
        ]


def convert(model: nn.Module, group: ConversionGroup, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert the tensors of one group.

    Args:
        model: the model that the group was planned with.
        group: from :func:`plan_conversion`.
        tensors: the group's sources, whole and detached.

    Returns:
        The checkpoint's tensors, by name.

    Raises:
        ConfigError: the result has other names, shapes or dtypes than planned.
    """
    if group.renames:
        return dict.fromkeys(group.outputs, tensors[group.sources[0]])
    revert = _revert_function()
    assert revert is not None
    with torch.no_grad():
        converted: dict[str, torch.Tensor] = revert(model, dict(tensors))
    actual = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in converted.items()}
    if actual != dict(group.outputs):
        raise ConfigError(
            f"transformers converted {', '.join(group.sources)} to {sorted(actual)}, but within the whole model to "
            f"{sorted(group.outputs)}: pass tensors under checkpoint names instead"
        )
    return converted


def _revert_function() -> Callable[[nn.Module, dict[str, Any]], dict[str, Any]] | None:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # in transformers 4 modules and checkpoints have the same names
        return None
    return revert_weight_conversion  # type: ignore[no-any-return]
