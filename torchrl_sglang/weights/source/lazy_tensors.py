"""The trainer's tensors, listed without reading a value.

Reading a tensor gathers its shards and merges its adapter. That happens only when the tensor is about to be sent, and
the result is dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.source.peft_merge import plan_merge
from torchrl_sglang.weights.source.readable import refuse_unreadable
from torchrl_sglang.weights.source.shards import full_tensor, local_tensor

__all__ = ["LazyTensor", "collection_tensors", "module_tensors"]

_PEFT_SEGMENTS = frozenset({"lora_A", "lora_B", "base_layer", "modules_to_save", "lora_embedding_A"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LazyTensor:
    """One of the trainer's tensors; :attr:`read` computes its values.

    Attributes:
        name: the trainer's name, including attributes of wrapper modules.
        shape: full shape, also of a sharded tensor.
        dtype: element type.
        trainable: whether an optimiser changes it.
        is_buffer: whether it is a buffer. A buffer may be absent from the checkpoint; a parameter may not.
        memory: equal for two names of the same memory (tied weights).
        read: gathers and merges if necessary; returns a detached tensor. Collective for a sharded tensor.
        parts: the tensors that :attr:`read` uses; sharded ones are DTensors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    is_buffer: bool
    memory: Hashable
    read: Callable[[], torch.Tensor]
    parts: tuple[torch.Tensor, ...]

    @property
    def local_parts(self) -> tuple[torch.Tensor, ...]:
        """This rank's shards of :attr:`parts`, for checking values without gathering or merging."""
        return tuple(local_tensor(part) for part in self.parts)

    def spec(self, checkpoint_name: str) -> TensorSpec:
        """Describe the tensor under a checkpoint name."""
        return TensorSpec(name=checkpoint_name, shape=self.shape, dtype=self.dtype, trainable=self.trainable)


def module_tensors(module: nn.Module) -> list[LazyTensor]:
    """All parameters and buffers in definition order; a tensor with two names is listed twice.

    A layer with PEFT adapters is listed as the one weight that its forward pass uses, under the name it would have
    without PEFT.

    Raises:
        ConfigError: the parameters' values are not available (FSDP1's flat shards, DeepSpeed ZeRO-3, meta device), or
            are not stored one after the other (sparse, nested, quantised).
    """
    return list(_walk(module, ""))


def collection_tensors(weights: Mapping[Any, Any] | TensorDictBase) -> list[LazyTensor]:
    """The tensors of a nested TensorDict or of a flat or nested dict, in its order.

    Raises:
        ConfigError: a value is not a tensor, or belongs to an adapter (merging it needs the scale, which only its
            module knows).
    """
    # TensorDict.from_module keeps Parameters, so any other tensor beside them is a buffer. A collection without any
    # Parameter (a state dict) does not tell them apart: every tensor counts as a parameter.
    leaves = list(_leaves(weights))
    has_parameters = any(isinstance(value, nn.Parameter) for _, value in leaves)
    for name, _ in leaves:
        if not _PEFT_SEGMENTS.isdisjoint(name.split(".")):
            raise ConfigError(
                f"{name!r} belongs to a PEFT adapter, which can't be merged without its module's scale: pass the PEFT "
                "model itself, or tensors that are already merged"
            )
    return [
        _unmerged_tensor(name, value, is_buffer=has_parameters and not isinstance(value, nn.Parameter))
        for name, value in leaves
    ]


def _walk(module: nn.Module, path: str) -> Iterator[LazyTensor]:
    plan = plan_merge(module)
    if plan is not None:
        for name, merged in plan.parameters.items():
            _refuse_flat_shards(path + name)
            for part in merged.parts:
                refuse_unreadable(path + name, part)
            yield LazyTensor(
                name=path + name,
                shape=tuple(merged.base.shape),
                dtype=merged.base.dtype,
                trainable=merged.trainable,
                is_buffer=False,
                memory=(id(module), name) if merged.is_adapted else _memory(merged.base),
                read=merged.read,
                parts=merged.parts,
            )
        if plan.replacement is not None:
            yield from _walk(plan.replacement, path)
        return
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        _refuse_flat_shards(path + name)
        yield _unmerged_tensor(path + name, parameter, is_buffer=False)
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        _refuse_flat_shards(path + name)
        yield _unmerged_tensor(path + name, buffer, is_buffer=True)
    for name, child in module._modules.items():  # named_children() omits a module's second name
        if child is not None:
            yield from _walk(child, f"{path}{name}.")


def _leaves(weights: Mapping[Any, Any] | TensorDictBase, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in weights.items():
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, str) for part in parts):
            raise ConfigError(f"weights must be named by strings, got the key {key!r}")
        name = path + ".".join(parts)
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (Mapping, TensorDictBase)):
            yield from _leaves(value, name + ".")
        else:
            raise ConfigError(f"weights must be tensors, but {name!r} is a {type(value).__name__}")


def _unmerged_tensor(name: str, tensor: torch.Tensor, *, is_buffer: bool) -> LazyTensor:
    refuse_unreadable(name, tensor)
    return LazyTensor(
        name=name,
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        trainable=tensor.requires_grad or not isinstance(tensor, nn.Parameter),
        is_buffer=is_buffer,
        memory=_memory(tensor),
        read=partial(full_tensor, tensor),
        parts=(tensor,),
    )


def _memory(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors with the same elements in memory; a tensor without elements equals only itself."""
    local = local_tensor(tensor)
    if local.numel() == 0:
        return id(tensor)
    return (local.device, local.data_ptr(), tuple(local.shape), local.stride(), local.dtype)


def _refuse_flat_shards(name: str) -> None:
    if "_fsdp_wrapped_module" in name.split("."):
        raise ConfigError(
            f"{name!r} belongs to FSDP1, whose flat shards can't be read tensor by tensor: use fully_shard (FSDP2), or "
            "pass a gathered state dict"
        )
