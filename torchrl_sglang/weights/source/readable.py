"""Which tensors have values in memory that can be copied, and what to do about the others.

Buckets are filled by copying a tensor's bytes. A tensor without memory of its own would end the process there.
"""

from __future__ import annotations

import torch
from torch.nn.parameter import is_lazy

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.source.shards import local_tensor

__all__ = ["refuse_unreadable"]


def refuse_unreadable(name: str, tensor: torch.Tensor) -> None:
    """Require that this rank can read its part of a tensor.

    Raises:
        ConfigError: it can't; says why.

    Examples:
        >>> refuse_unreadable("w", torch.zeros(2))
        >>> refuse_unreadable("w", torch.zeros(2, 2).to_sparse())
        Traceback (most recent call last):
            ...
        torchrl_sglang.errors.ConfigError: 'w' can't be sent: it is a sparse_coo tensor. Pass it as a dense one
        (tensor.to_dense())
    """
    if is_lazy(tensor):
        problem = "has no shape and no values yet: call the model once, which makes its lazy parameters"
    elif hasattr(tensor, "ds_shape"):
        problem = (
            "is partitioned by DeepSpeed ZeRO-3, so this rank does not hold all of it: gather it "
            "(deepspeed.zero.GatheredParameters) inside an iterator of (name, tensor) pairs and pass that"
        )
    else:
        problem = _find_unreadable(local_tensor(tensor))
    if problem:
        raise ConfigError(f"{name!r} {problem}")


def _find_unreadable(tensor: torch.Tensor) -> str:
    """Why the values of a tensor can't be read; empty if they can."""
    if tensor.is_meta:
        return "is on the meta device and has no values: load the model without offloading it"
    if tensor.is_nested:
        return "can't be sent: it is a nested tensor. Pass it as a dense one (torch.nested.to_padded_tensor)"
    if tensor.is_quantized:
        return "can't be sent: it is a quantised tensor of torch. Pass its values (tensor.dequantize())"
    if tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.").removeprefix("_")
        return f"can't be sent: it is a {kind} tensor. Pass it as a dense one (tensor.to_dense())"
    return "" if tensor.numel() == 0 or _has_memory(tensor) else _no_memory(tensor)


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        storage = tensor.untyped_storage()
        return storage.nbytes() > 0 and storage.data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # a subclass that only stands for other tensors
        return False


def _no_memory(tensor: torch.Tensor) -> str:
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return "has no memory: its storage was freed, as FSDP1 and offloading do. Load or gather it first"
    return (
        f"is a {type(tensor).__name__}, which has no memory of its own, as torchao's quantised tensors: pass the plain "
        "tensor that it stands for, inside an iterator of (name, tensor) pairs"
    )
