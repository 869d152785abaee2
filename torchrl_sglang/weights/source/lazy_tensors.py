"""A trainer's tensors as they are now: listed without touching a value, read one at a time.

Reading is where a sharded tensor is gathered and an adapter is merged, so nothing of that happens until a tensor is
about to be sent, and what was made for it is dropped with it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torch.distributed.tensor import DTensor

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.source import peft_merge

__all__ = ["LazyTensor", "full_tensor", "list_mapping", "list_module", "local_tensor"]

_PEFT_SEGMENTS = frozenset({"lora_A", "lora_B", "base_layer", "modules_to_save", "lora_embedding_A"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LazyTensor:
    """One of the trainer's tensors, not yet read.

    Attributes:
        name: as the trainer calls it, wrapper attributes included.
        shape: full shape, also of a sharded tensor.
        dtype: element type.
        trainable: whether an optimiser changes it.
        is_buffer: a buffer may be absent from the checkpoint; a parameter may not.
        memory: equal for two names of the same memory (tied weights).
        read: gathers or merges if need be; the result is detached. Collective for a sharded tensor.
        tensors: what :attr:`read` is made from, sharded ones as they are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    is_buffer: bool
    memory: Hashable
    read: Callable[[], torch.Tensor]
    tensors: tuple[torch.Tensor, ...]

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """What this rank holds of :attr:`tensors`: for looking at values without gathering or merging."""
        return tuple(local_tensor(tensor) for tensor in self.tensors)


def list_module(module: nn.Module) -> list[LazyTensor]:
    """All parameters and buffers in definition order; a tensor with two names is listed twice.

    A PEFT layer is listed as the one weight that its forward pass amounts to, under the name it would have without
    PEFT.

    Raises:
        ConfigError: the parameters aren't there to be read (FSDP1's flat shards, DeepSpeed's ZeRO-3).
    """
    listed = list(_walk(module, ""))
    for live in listed:
        _refuse_flat_shards(live.name)
        for tensor in live.tensors:
            _refuse_absent(live.name, tensor)
    return listed


def list_mapping(weights: Mapping[Any, Any] | TensorDictBase) -> list[LazyTensor]:
    """The tensors of a nested TensorDict or of a flat or nested dict, in its own order.

    Raises:
        ConfigError: a value is not a tensor, or adapter tensors are among them (they can't be merged without the
            module that knows their scale).
    """
    # TensorDict.from_module keeps Parameters; what isn't one beside them was a buffer. A collection without any
    # Parameter (a state dict) doesn't tell, so there everything may be one.
    leaves = list(_leaves(weights))
    has_parameters = any(isinstance(value, nn.Parameter) for _, value in leaves)
    for name, tensor in leaves:
        _refuse_absent(name, tensor)
        adapter = _PEFT_SEGMENTS.intersection(name.split("."))
        if adapter:
            raise ConfigError(
                f"{name!r} belongs to a PEFT adapter, which can't be merged without its module's scale: pass the PEFT "
                "model itself, or tensors that are already merged"
            )
    return [
        _plain(name, value, is_buffer=has_parameters and not isinstance(value, nn.Parameter)) for name, value in leaves
    ]


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, detached: gathered from all ranks if it is a DTensor (a collective), itself otherwise."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    sharded: Any = tensor.detach()
    mesh_device = sharded.device_mesh.device_type
    if sharded.device.type != mesh_device:
        sharded = sharded.to(mesh_device)  # FSDP2 with CPU offload: the collective runs where the mesh inputs
    whole: torch.Tensor = sharded.full_tensor()
    return whole


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it, detached."""
    held: Any = tensor.detach()
    local: torch.Tensor = held.to_local() if isinstance(held, DTensor) else held
    return local


def _walk(module: nn.Module, path: str) -> Iterator[LazyTensor]:
    adapted = peft_merge.adapted(module, full_tensor)
    if adapted is not None:
        for name, merged in adapted.merged.items():
            yield LazyTensor(
                name=path + name,
                shape=tuple(merged.base.shape),
                dtype=merged.base.dtype,
                trainable=merged.trainable,
                is_buffer=False,
                memory=_memory(merged.base) if merged.is_base else (id(module), name),
                read=merged.read,
                tensors=merged.parts,
            )
        for child in adapted.plain:
            yield from _walk(child, path)
        return
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield _plain(path + name, parameter, is_buffer=False)
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        yield _plain(path + name, buffer, is_buffer=True)
    for name, part in module._modules.items():  # named_children() leaves out a module's second name
        if part is not None:
            yield from _walk(part, f"{path}{name}.")


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


def _plain(name: str, tensor: torch.Tensor, *, is_buffer: bool) -> LazyTensor:
    return LazyTensor(
        name=name,
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        trainable=tensor.requires_grad or not isinstance(tensor, nn.Parameter),
        is_buffer=is_buffer,
        memory=_memory(tensor),
        read=lambda: full_tensor(tensor),
        tensors=(tensor,),
    )


def _memory(tensor: torch.Tensor) -> Hashable:
    local = local_tensor(tensor)
    if local.numel() == 0 or local.is_meta:
        return id(tensor)
    return (local.device, local.data_ptr(), tuple(local.shape), local.stride(), local.dtype)


def _refuse_absent(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise ConfigError(f"{name!r} is on the meta device and has no values: load the model without offloading it")
    if hasattr(tensor, "ds_shape"):
        raise ConfigError(
            f"{name!r} is partitioned by DeepSpeed ZeRO-3 and not here as a whole: gather it "
            "(deepspeed.zero.GatheredParameters) inside an iterator of (name, tensor) pairs and pass that"
        )


def _refuse_flat_shards(name: str) -> None:
    if "_fsdp_wrapped_module" in name.split("."):
        raise ConfigError(
            f"{name!r} belongs to FSDP1, whose flat shards have no tensors of their own: use fully_shard (FSDP2), or "
            "pass a gathered state dict"
        )
