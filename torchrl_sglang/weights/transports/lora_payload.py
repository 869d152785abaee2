"""A LoRA adapter's tensors as SGLang takes them over HTTP: one pickle as base64 text.

SGLang's unpickler accepts only names on a list. What ``pickle`` writes for a tensor by value is not on it, and tensors
in shared memory, which are, can't leave the machine. So a storage is written as a call of a class that is on the list,
with the storage's bytes as argument. Source: SGLang 0.5.23, ``SafeUnpickler``.
"""

from __future__ import annotations

import base64
import functools
import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

__all__ = ["encode_tensors"]


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Tensors by name as base64 text of a pickle.

    Examples:
        >>> text = encode_tensors({"a": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)})
        >>> pickle.loads(base64.b64decode(text))
        {'a': tensor([1., 2.], dtype=torch.bfloat16)}
    """
    buffer = io.BytesIO()
    _ByValue(buffer, protocol=4).dump({name: _Plain(tensor) for name, tensor in tensors.items()})
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class _Plain:
    """Marks a tensor to be written by value."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach().cpu().contiguous()


class _ByValue(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _Plain):
            tensor = obj.tensor
            storage = _Storage(tensor)
            return _rebuild_tensor_v2, (storage, 0, tuple(tensor.shape), tensor.stride(), False, OrderedDict())
        if isinstance(obj, _Storage):
            typed = functools.partial(
                torch.storage.TypedStorage, wrap_storage=_Bytes(obj.tensor), dtype=obj.tensor.dtype, _internal=True
            )
            return typed, ()
        if isinstance(obj, _Bytes):
            return torch.UntypedStorage, (obj.content,)
        return NotImplemented


class _Storage:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Bytes:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.content = tensor.view(-1).view(torch.uint8).numpy().tobytes()
