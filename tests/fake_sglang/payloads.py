"""Reads the pickles of ``/update_weights_from_tensor`` as SGLang does: with an allow-list and torch's own functions."""

from __future__ import annotations

import base64
import io
import pickle
from typing import Any

import torch

__all__ = ["read_payload"]

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("functools", "partial"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch", "UntypedStorage"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
    ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
    ("torch.storage", "TypedStorage"),
    ("torch.storage", "UntypedStorage"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if (module, name) not in _ALLOWED:
            raise RuntimeError(f"Blocked unsafe global ({module}.{name}) during pickle deserialization")
        return super().find_class(module, name)


def _load_storage(data: bytes) -> Any:
    storage = torch.load(io.BytesIO(data), weights_only=True)
    if not isinstance(storage, (torch.storage.TypedStorage, torch.UntypedStorage)):
        raise pickle.UnpicklingError(f"Expected a Torch storage, got {type(storage).__name__}")
    return storage


def read_payload(text: str | bytes) -> list[tuple[str, torch.Tensor]]:
    """The tensors of one rank's payload; those in shared memory are views of it.

    Raises:
        Exception: whatever goes wrong. SGLang's process ends with it.
    """
    named: list[tuple[str, torch.Tensor]] = _Unpickler(io.BytesIO(base64.b64decode(text, validate=True))).load()
    return named
