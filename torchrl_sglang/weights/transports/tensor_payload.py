"""Buckets as ``/update_weights_from_tensor`` takes them: one pickle of ``(name, tensor)`` pairs as base64 text.

SGLang's unpickler accepts only names on a list. A pickle that it does not accept, or a file or GPU that it can't open,
ends the server, so nothing here is tried out on one. On the list are torch's functions that open named shared memory
and GPU memory of another process. What ``pickle`` writes for a tensor by value is not on it; bytes travel as a uint8
storage in torch's own file format, which SGLang reads with ``torch.load(..., weights_only=True)``, and of which tensors
of any dtype are views. Source: SGLang 0.5.20 and 0.5.23, ``SafeUnpickler``.
"""

from __future__ import annotations

import base64
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3
from torch.multiprocessing.reductions import rebuild_cuda_tensor, rebuild_storage_filename, rebuild_typed_storage
from torch.storage import _load_from_bytes

from torchrl_sglang.weights.buckets.layout import Bucket, Slot
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.shared_memory.segments import Segment

__all__ = ["by_cuda_handle", "by_shared_memory", "by_value", "encode_tensors", "share_cuda_buffer"]


def by_shared_memory(bucket: Bucket, segment: Segment) -> bytes:
    """A bucket whose bytes lie at the beginning of a segment. Every rank that reads it opens the segment once."""
    storage = _Rebuilt(
        rebuild_storage_filename,
        (torch.UntypedStorage, segment.manager.encode(), f"/{segment.name}".encode(), segment.nbytes),
    )
    return _encode(_pairs(bucket, storage))


def by_value(bucket: Bucket, flat: torch.Tensor) -> bytes:
    """A bucket with its bytes (uint8, ``(bucket.nbytes,)``, in main memory)."""
    return _encode(list(_views_of_bytes(bucket, flat)))


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors by name, with their bytes, as the LoRA endpoint takes them: a pickle of a dict.

    Examples:
        >>> text = encode_tensors({"a": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)})
        >>> pickle.loads(base64.b64decode(text))
        {'a': tensor([1., 2.], dtype=torch.bfloat16)}
    """
    bucket = Bucket.of(TensorSpec.of(name, tensor) for name, tensor in tensors.items())
    flat = BucketPacker("cpu").pack(bucket, [(name, tensors[name]) for name in bucket.names])
    return _encode(dict(_views_of_bytes(bucket, flat)))


def share_cuda_buffer(buffer: torch.Tensor) -> tuple[Any, ...]:
    """What other processes need to open a buffer on a GPU; called once for a buffer, and valid as long as it lives.

    torch adds to the buffer's own bookkeeping with each call. Written from its source, not run on a GPU.

    Returns:
        The arguments of torch's ``rebuild_cuda_tensor`` from the GPU on: the GPU by its UUID, because a server may
        count GPUs from another one.
    """
    storage: Any = buffer.untyped_storage()
    _, handle, size, offset, counter, counter_offset, event, event_needed = storage._share_cuda_()
    uuid = str(torch.cuda.get_device_properties(buffer.device).uuid)
    return uuid, handle, size, offset, False, counter, counter_offset, event, event_needed


def by_cuda_handle(bucket: Bucket, shared: Sequence[Any]) -> bytes:
    """A bucket whose bytes lie at the beginning of a buffer on a GPU (from :func:`share_cuda_buffer`).

    The first tensor that a server reads opens the buffer; for the others torch takes the same mapping, and counts it.
    """
    pairs = []
    for slot in bucket.slots:
        size, stride, offset = torch.Size(slot.shape), _stride(slot.shape), slot.offset // slot.dtype.itemsize
        arguments = (torch.Tensor, size, stride, offset, torch.storage.TypedStorage, slot.dtype, *shared)
        pairs.append((slot.name, _Rebuilt(rebuild_cuda_tensor, arguments)))
    return _encode(pairs)


class _Rebuilt:
    """Stands for what a function returns on the reader's side. The same object is written, and called, once."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        return (obj.function, obj.arguments) if isinstance(obj, _Rebuilt) else NotImplemented


def _encode(content: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump(content)
    return base64.b64encode(buffer.getbuffer())


def _pairs(bucket: Bucket, storage: _Rebuilt) -> list[tuple[str, _Rebuilt]]:
    typed = {dtype: _Rebuilt(rebuild_typed_storage, (storage, dtype)) for dtype in dict.fromkeys(bucket.dtypes)}
    return [(slot.name, _view(slot, typed[slot.dtype])) for slot in bucket.slots]


def _view(slot: Slot, storage: _Rebuilt) -> _Rebuilt:
    offset = slot.offset // slot.dtype.itemsize
    arguments: tuple[Any, ...] = (storage, offset, tuple(slot.shape), _stride(slot.shape), False, OrderedDict())
    return _Rebuilt(_rebuild_tensor_v2, arguments)


def _stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements.

    Examples:
        >>> _stride((4, 3, 2)), _stride((0, 3)), _stride(())
        ((6, 2, 1), (3, 1), ())
    """
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, size))
    return tuple(reversed(strides)) if shape else ()


def _views_of_bytes(bucket: Bucket, flat: torch.Tensor) -> Iterator[tuple[str, _Rebuilt]]:
    """The tensors of a bucket as views of one storage with its bytes, which is written, and read, once."""
    file = io.BytesIO()
    start = flat.storage_offset()
    own = flat.untyped_storage()[start : start + flat.nbytes]  # shares the memory of a buffer that may be longer
    # A storage of a wider dtype can't be viewed as another one, and not every dtype has a storage class.
    storage: Any = torch.storage.TypedStorage(wrap_storage=own, dtype=torch.uint8, _internal=True)  # type: ignore[no-untyped-call]
    torch.save(storage, file, _use_new_zipfile_serialization=False)  # in half the time of the newer format
    read = _Rebuilt(_load_from_bytes, (file.getvalue(),))
    for slot in bucket.slots:
        offset = slot.offset // slot.dtype.itemsize
        shape = tuple(slot.shape)
        arguments: tuple[Any, ...] = (read, offset, shape, _stride(shape), False, OrderedDict(), slot.dtype)
        yield slot.name, _Rebuilt(_rebuild_tensor_v3, arguments)
