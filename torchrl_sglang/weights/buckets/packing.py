"""A bucket's bytes, written into one of two reused buffers while the other one is on the wire."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Iterable, Sequence

import torch

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.buckets.layout import Bucket, unit_key
from torchrl_sglang.weights.checkpoint.headers import TensorSpec

__all__ = ["BucketPacker", "settled_device"]

_NUM_BUFFERS = 2


class BucketPacker:
    """Copies tensors into buckets, casting on the way; no other memory is taken than the buffers.

    A buffer is as large as the largest bucket it has held and is kept for the next sync: fresh memory costs more in
    page faults than the copy itself. A bucket of one tensor (one that is larger than a bucket, mostly) that needs no
    cast is not copied at all: its own bytes are handed out, which may be the live weight's. The copies release
    Python's lock, so packing in one thread runs beside a broadcast in another.

    Args:
        device: where the buffers live; ``None`` is each bucket's first tensor's. A kind of device without a number
            (``"cuda"``) becomes the one that the first tensor is on, for good: see :func:`settled_device`.

    Examples:
        >>> specs = [TensorSpec(name="w", shape=(2,), dtype=torch.bfloat16)]
        >>> packer = BucketPacker()
        >>> flat = packer.pack(Bucket.of(specs), [("w", torch.tensor([1.0, 2.0]))])
        >>> flat.dtype, flat.shape, flat.view(torch.bfloat16).tolist()
        (torch.uint8, torch.Size([4]), [1.0, 2.0])
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._device = torch.device(device) if device is not None else None
        self._buffers: list[torch.Tensor | None] = [None] * _NUM_BUFFERS
        self._turn = 0

    @property
    def nbytes(self) -> int:
        """Bytes held in buffers."""
        return sum(buffer.nbytes for buffer in self._buffers if buffer is not None)

    def release(self) -> None:
        """Give the buffers back; the next bucket makes new ones."""
        self._buffers = [None] * _NUM_BUFFERS

    def pack(self, bucket: Bucket, tensors: Iterable[tuple[str, torch.Tensor]]) -> torch.Tensor:
        """Fill the buffer whose turn it is.

        Args:
            bucket: the layout.
            tensors: exactly the bucket's tensors in any order, or a longer iterator that gives them first: no more
                than they are taken from it.

        Returns:
            The bucket's bytes: uint8, ``(bucket.nbytes,)``, contiguous. Overwritten by the call after the next, so
            hold no more than two.

        Raises:
            ConfigError: a tensor is not the bucket's, has another shape, or is missing.
        """
        expected = {slot.name: slot for slot in bucket.slots}
        flat: torch.Tensor | None = None
        pairs = iter(tensors)
        while expected:
            name, tensor = next(pairs, ("", None))
            if tensor is None:
                raise ConfigError(f"the tensors ended before {next(iter(expected))!r}, which is in this bucket")
            slot = expected.pop(name, None)
            if slot is None or tuple(tensor.shape) != slot.shape:
                wanted = f"shape {slot.shape}" if slot else f"one of {', '.join(list(expected)[:3])}"
                raise ConfigError(f"got {name!r} with shape {tuple(tensor.shape)} for a bucket that wants {wanted}")
            if flat is None:
                if self._device is not None:
                    self._device = settled_device(self._device, tensor.device)
                flat = self._as_it_is(bucket, tensor)
                if flat is not None:
                    return _finished(flat)
                flat = self._buffer(bucket.nbytes, tensor.device)
                self._turn += 1
            _copy(tensor.detach(), slot.view(flat))
            del tensor  # before the next one is gathered
        return _finished(flat) if flat is not None else torch.empty(0, dtype=torch.uint8)

    def packed(
        self, plan: Sequence[Bucket], tensors: Callable[[Sequence[str]], Iterable[tuple[str, torch.Tensor]]]
    ) -> Generator[tuple[Bucket, torch.Tensor], None, None]:
        """Pack bucket after bucket, each when it is asked for.

        Args:
            plan: from :func:`~torchrl_sglang.weights.buckets.layout.plan_buckets`.
            tensors: gives tensors by name in the order asked for (:meth:`WeightSource.tensors`).

        Yields:
            A bucket with its bytes (uint8, ``(bucket.nbytes,)``), which stay as they are until the bucket after the
            next is asked for.
        """
        pairs = iter(tensors([name for bucket in plan for name in bucket.names]))
        try:
            for bucket in plan:
                yield bucket, self.pack(bucket, pairs)
            for name, _ in pairs:
                raise ConfigError(f"got {name!r}, which is in no bucket")
        finally:
            close = getattr(pairs, "close", None)
            if close is not None:
                close()  # a sharded source lets its other ranks go

    def packed_stream(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        bucket_bytes: int,
        dtype_of: Callable[[TensorSpec], torch.dtype],
        expected: Iterable[str] = (),
    ) -> Generator[tuple[Bucket, torch.Tensor], None, None]:
        """Pack tensors in the order they come, for sources whose tensors aren't known before.

        Holds up to a bucket of tensors until it is full.

        Args:
            tensors: ``(name, tensor)`` pairs.
            bucket_bytes: most bytes per bucket; a larger unit gets a bucket of its own.
            dtype_of: the dtype a tensor travels in.
            expected: names that will come: what must travel together is known from them.
        """
        partners: dict[str, int] = {}
        for name in expected:
            partners[unit_key(name)] = partners.get(unit_key(name), 0) + 1
        waiting: dict[str, list[tuple[TensorSpec, torch.Tensor]]] = {}
        ready: list[tuple[TensorSpec, torch.Tensor]] = []
        for name, tensor in tensors:
            spec = TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
            spec = TensorSpec(name=name, shape=spec.shape, dtype=dtype_of(spec))
            unit = waiting.setdefault(unit_key(name), [])
            unit.append((spec, tensor))
            del tensor
            if len(unit) < partners.get(unit_key(name), 1):
                continue
            waiting.pop(unit_key(name))
            if ready and _nbytes(ready) + _nbytes(unit) > bucket_bytes:
                yield self._pack_all(ready)
                ready = []
            ready += unit
            del unit
        for unit in waiting.values():
            ready += unit
        if ready:
            yield self._pack_all(ready)

    def _pack_all(self, held: list[tuple[TensorSpec, torch.Tensor]]) -> tuple[Bucket, torch.Tensor]:
        bucket = Bucket.of(spec for spec, _ in held)
        flat = self.pack(bucket, [(spec.name, tensor) for spec, tensor in held])
        held.clear()
        return bucket, flat

    def _as_it_is(self, bucket: Bucket, tensor: torch.Tensor) -> torch.Tensor | None:
        here = self._device is None or tensor.device == self._device
        if len(bucket.slots) == 1 and tensor.dtype == bucket.dtypes[0] and tensor.is_contiguous() and here:
            return tensor.detach().view(-1).view(torch.uint8)
        return None

    def _buffer(self, nbytes: int, device: torch.device) -> torch.Tensor:
        device = self._device or device
        index = self._turn % _NUM_BUFFERS
        buffer = self._buffers[index]
        if buffer is None or buffer.nbytes < nbytes or buffer.device != device:
            self._buffers[index] = buffer = None  # before the larger one is made
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self._buffers[index] = buffer
        return buffer[:nbytes]


def settled_device(wanted: torch.device, first: torch.device) -> torch.device:
    """The device that buffers get, once and for all.

    Weights are broadcast from the GPU they are on: it is the trainer's own, while torch's current one is GPU 0 in every
    new thread, where a server may run.

    Args:
        wanted: a device, or a kind of device.
        first: where the first tensor is.

    Examples:
        >>> settled_device(torch.device("cuda"), torch.device("cuda", 3))
        device(type='cuda', index=3)
        >>> settled_device(torch.device("cpu"), torch.device("cuda", 3))
        device(type='cpu')
    """
    number: int | None = wanted.index  # typed as if it were always there
    if wanted.type == "cpu" or number is not None:
        return wanted
    return first if first.type == wanted.type else torch.device(wanted.type, torch.cuda.current_device())


def _finished(flat: torch.Tensor) -> torch.Tensor:
    """Copies on a GPU only stand in a queue, which the thread that broadcasts would not wait for."""
    if flat.is_cuda:
        torch.cuda.current_stream(flat.device).synchronize()
    return flat


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Plain copies in main memory go past torch: its OpenMP threads would spin on cores that the broadcast needs.

    With SmolLM2-135M on 2 cores a whole sync took 0.50 s with ``copy_`` and 0.41 s with one thread.
    """
    plain = source.dtype == target.dtype and source.is_contiguous() and source.device == target.device
    if plain and source.device.type == "cpu" and source.numel() > 0:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source)


def _nbytes(held: Sequence[tuple[TensorSpec, torch.Tensor]]) -> int:
    return sum(spec.nbytes for spec, _ in held)
