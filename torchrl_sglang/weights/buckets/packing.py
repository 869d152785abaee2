"""Copy the tensors of a bucket into a reused buffer: one of two, while the other is sent, or one for each bucket."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.buckets.layout import Bucket, unit_key
from torchrl_sglang.weights.buckets.value_check import ValueCheck, copy_tensor
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec

__all__ = ["BucketPacker", "PackedBuckets"]

_NUM_BUFFERS = 2

Pair = tuple[str, torch.Tensor]
PackedBuckets = Generator[tuple[Bucket, torch.Tensor], None, None]
"""Buckets and their bytes (uint8, ``(bucket.nbytes,)``), each packed when the caller takes it."""


class BucketPacker:
    """Copies tensors into buckets and casts them; allocates nothing but two buffers.

    A buffer grows to the largest bucket and is kept for the next sync: fresh memory costs more in page faults than the
    copy itself. A bucket of one tensor that needs no cast (usually a tensor larger than a bucket) is not copied: its
    own bytes are returned, which may be the live weight's. The copies release Python's global lock, so that one thread
    packs while another broadcasts.

    Args:
        device: the buffers' device. ``None`` takes the device of each bucket's first tensor. A device type without an
            index (``"cuda"``) gets the first tensor's index, once: see :func:`resolve_device`.
        allocate: makes a buffer (uint8) of a number of bytes in main memory; ``None`` takes torch's memory. With it,
            everything is copied into a buffer, on a GPU too.
        discard: told of each buffer that is given up.

    Attributes:
        is_staged: whether each bucket of a plan gets a buffer of its own, so that all can be packed in advance.

    Examples:
        >>> specs = [TensorSpec(name="w", shape=(2,), dtype=torch.bfloat16)]
        >>> packer = BucketPacker()
        >>> flat = packer.pack(Bucket.of(specs), [("w", torch.tensor([1.0, 2.0]))])
        >>> flat.dtype, flat.shape, flat.view(torch.bfloat16).tolist()
        (torch.uint8, torch.Size([4]), [1.0, 2.0])
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        allocate: Callable[[int], torch.Tensor] | None = None,
        discard: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.is_staged = False
        self._device = torch.device(device) if device is not None else None
        self._allocate = allocate
        self._discard = discard
        self._buffers: list[torch.Tensor | None] = [None] * _NUM_BUFFERS
        self._next_buffer = 0

    @property
    def is_in_main_memory(self) -> bool:
        """Whether the buffers are known to be in main memory."""
        return self._device is not None and self._device.type == "cpu"

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The buffers: uint8."""
        return [buffer for buffer in self._buffers if buffer is not None]

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def release(self) -> None:
        """Free the buffers; the next bucket allocates new ones."""
        self._shrink(0)
        self._buffers = [None] * _NUM_BUFFERS

    def pack(self, bucket: Bucket, tensors: Iterable[Pair], values: ValueCheck | None = None) -> torch.Tensor:
        """Copy the tensors of one bucket into the next buffer.

        Args:
            bucket: the layout.
            tensors: the bucket's tensors in any order. A longer iterator must give them first; no further tensor is
                taken from it.
            values: checks the values of each tensor while it is copied.

        Returns:
            The bucket's bytes: uint8, ``(bucket.nbytes,)``, contiguous. The second call from now overwrites them.

        Raises:
            ConfigError: a tensor doesn't belong to the bucket, has another shape, or is missing.
        """
        remaining = {slot.name: slot for slot in bucket.slots}
        flat: torch.Tensor | None = None
        pairs = iter(tensors)
        while remaining:
            name, tensor = next(pairs, ("", None))
            if tensor is None:
                raise ConfigError(f"the tensors ended before {next(iter(remaining))!r}, which is in this bucket")
            slot = remaining.pop(name, None)
            if slot is None or tuple(tensor.shape) != slot.shape:
                expected = f"shape {slot.shape}" if slot else f"one of {', '.join(list(remaining)[:3])}"
                raise ConfigError(f"got {name!r} with shape {tuple(tensor.shape)} for a bucket that wants {expected}")
            if flat is None:
                if self._device is not None:
                    self._device = resolve_device(self._device, tensor.device)
                if self._needs_no_copy(bucket, tensor):
                    if values is not None:
                        values.check(name, tensor.detach())
                    return _synchronised(tensor.detach().view(-1).view(torch.uint8))
                flat = self._take_buffer(bucket.nbytes, tensor.device)
            if values is not None:
                values.copy(name, tensor.detach(), slot.view(flat))
            else:
                copy_tensor(tensor.detach(), slot.view(flat))
            del tensor  # before the next one is gathered
        return _synchronised(flat) if flat is not None else torch.empty(0, dtype=torch.uint8)

    def packed(
        self,
        plan: Sequence[Bucket],
        tensors: Callable[[Sequence[str]], Iterable[Pair]],
        values: ValueCheck | None = None,
    ) -> PackedBuckets:
        """Pack the buckets of a plan, each when the caller takes it.

        Args:
            plan: from :func:`~torchrl_sglang.weights.buckets.layout.plan_buckets`.
            tensors: reads tensors by name in the given order (:meth:`WeightSource.tensors`).
            values: checks the values of each tensor while it is copied.

        Yields:
            A bucket and its bytes (uint8, ``(bucket.nbytes,)``), valid until the second bucket after it is taken, or,
            if :attr:`is_staged`, until the next plan is packed.
        """
        pairs = iter(tensors([name for bucket in plan for name in bucket.names]))
        try:
            self._make_room(plan, pairs)
            for bucket in plan:
                yield bucket, self.pack(bucket, pairs, values)
            for name, _ in pairs:
                raise ConfigError(f"got {name!r}, which is in no bucket")
        finally:
            close = getattr(pairs, "close", None)
            if close is not None:
                close()  # a sharded source completes the gathers that its other ranks wait in

    def packed_stream(
        self,
        tensors: Iterable[Pair],
        *,
        bucket_bytes: int,
        dtype_of: Callable[[TensorSpec], torch.dtype],
        expected: Mapping[str, TensorSpec] | None = None,
    ) -> PackedBuckets:
        """Pack tensors in the order in which they come, for a source whose tensors are not known in advance.

        Holds the tensors of one bucket until the bucket is full. Memory that may be lacking is allocated before the
        first bucket is given away, for as much as the expected tensors need.

        Args:
            tensors: ``(name, tensor)`` pairs.
            bucket_bytes: maximum size of a bucket; a larger unit gets a bucket of its own.
            dtype_of: the dtype in which a tensor is sent.
            expected: the tensors that will come, by name; the names tell which must be in one request.
        """
        self._begin(None)
        expected = expected or {}
        unit_sizes = Counter(unit_key(name) for name in expected)
        is_first = True
        incomplete: dict[str, list[tuple[TensorSpec, torch.Tensor]]] = {}
        ready: list[tuple[TensorSpec, torch.Tensor]] = []
        for name, tensor in tensors:
            spec = TensorSpec.of(name, tensor)
            key = unit_key(name)
            unit = incomplete.setdefault(key, [])
            unit.append((replace(spec, dtype=dtype_of(spec)), tensor))
            del tensor
            if len(unit) < unit_sizes[key]:
                continue
            del incomplete[key]
            if ready and _nbytes(ready) + _nbytes(unit) > bucket_bytes:
                if is_first:
                    self._reserve_for_stream([spec for spec, _ in ready], bucket_bytes, expected, dtype_of)
                is_first = False
                yield self._pack_all(ready)
            ready += unit
            del unit
        for unit in incomplete.values():
            ready += unit
        if ready:
            yield self._pack_all(ready)

    def _pack_all(self, ready: list[tuple[TensorSpec, torch.Tensor]]) -> tuple[Bucket, torch.Tensor]:
        """Pack the tensors into one bucket and empty the list, so that they are freed before the next ones come."""
        bucket = Bucket.of(spec for spec, _ in ready)
        flat = self.pack(bucket, [(spec.name, tensor) for spec, tensor in ready])
        ready.clear()
        return bucket, flat

    def _make_room(self, plan: Sequence[Bucket], pairs: Iterator[Pair]) -> None:
        """Free what the plan does not need, and allocate what it may not get later."""
        try:
            self._begin(len(plan))
            self._reserve(plan)
        except BaseException:
            next(pairs, None)  # closed before it has begun, a sharded source would not complete its gathers
            raise

    def _begin(self, num_buckets: int | None) -> None:
        """Free the buffers that the next plan does not need: all beyond two, if it is not staged."""
        self._next_buffer = 0 if self.is_staged else self._next_buffer % _NUM_BUFFERS
        if not self.is_staged or num_buckets is not None:
            self._shrink(max(_NUM_BUFFERS, num_buckets or 0) if self.is_staged else _NUM_BUFFERS)

    def _reserve(self, plan: Sequence[Bucket]) -> None:
        """Allocate both buffers where that may fail: before the first bucket is sent, which then was in vain."""
        buckets = [plan[position::_NUM_BUFFERS] for position in range(min(_NUM_BUFFERS, len(plan)))]
        self._reserve_bytes([max(bucket.nbytes for bucket in each) for each in buckets])

    def _reserve_for_stream(
        self,
        first: Sequence[TensorSpec],
        bucket_bytes: int,
        expected: Mapping[str, TensorSpec],
        dtype_of: Callable[[TensorSpec], torch.dtype],
    ) -> None:
        """As :meth:`_reserve`, for a first bucket of these tensors, and at most the expected ones after it."""
        first_bytes = sum(spec.nbytes for spec in first)
        units: Counter[str] = Counter()
        for name, spec in expected.items():
            units[unit_key(name)] += replace(spec, dtype=dtype_of(spec)).nbytes
        seen_bytes = sum(units[key] for key in {unit_key(spec.name) for spec in first})
        # The trainer's tensors may be wider than those of the checkpoint, from which they are expected.
        scale = max(1.0, first_bytes / seen_bytes) if seen_bytes else 1.0
        left_bytes = math.ceil(scale * (sum(units.values()) - seen_bytes))
        largest = max(bucket_bytes, math.ceil(scale * max(units.values(), default=0)))
        if left_bytes <= bucket_bytes:  # one more bucket
            self._reserve_bytes([first_bytes, left_bytes] if left_bytes else [first_bytes])
        else:
            self._reserve_bytes([max(first_bytes, min(largest, left_bytes)), min(largest, left_bytes)])

    def _reserve_bytes(self, sizes: Sequence[int]) -> None:
        """Allocate the next buffers."""
        if self._allocate is None or self.is_staged or self._device is None or self._device.type != "cpu":
            return
        first = self._next_buffer
        for nbytes in sizes:
            self._take_buffer(nbytes, self._device)
        self._next_buffer = first

    def _shrink(self, num_buffers: int) -> None:
        for buffer in self._buffers[num_buffers:]:
            self._give_up(buffer)
        del self._buffers[num_buffers:]

    def _give_up(self, buffer: torch.Tensor | None) -> None:
        if buffer is not None and self._discard is not None:
            self._discard(buffer)

    def _needs_no_copy(self, bucket: Bucket, tensor: torch.Tensor) -> bool:
        if self._allocate is not None:
            return False
        is_on_device = self._device is None or tensor.device == self._device
        is_whole_bucket = len(bucket.slots) == 1 and tensor.dtype == bucket.dtypes[0]
        return is_whole_bucket and is_on_device and tensor.is_contiguous()

    def _take_buffer(self, nbytes: int, device: torch.device) -> torch.Tensor:
        device = self._device or device
        index = self._next_buffer
        self._next_buffer = index + 1 if self.is_staged else (index + 1) % _NUM_BUFFERS
        if index == len(self._buffers):
            self._buffers.append(None)
        buffer = self._buffers[index]
        if buffer is None or buffer.nbytes < nbytes or buffer.device != device:
            self._give_up(buffer)
            self._buffers[index] = buffer = None  # free the old buffer before the larger one is allocated
            if self._allocate is not None and device.type == "cpu":
                buffer = self._allocate(nbytes)
            else:
                buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self._buffers[index] = buffer
        return buffer[:nbytes]


def resolve_device(device: torch.device, tensor_device: torch.device) -> torch.device:
    """Add the index that ``device`` may lack: that of the device the weights are on.

    Weights are broadcast from the trainer's GPU. Torch's current device can't be used for that: it is GPU 0 in every
    new thread, and a server may run there.

    Args:
        device: a device with or without an index.
        tensor_device: the first tensor's device.

    Examples:
        >>> resolve_device(torch.device("cuda"), torch.device("cuda", 3))
        device(type='cuda', index=3)
        >>> resolve_device(torch.device("cpu"), torch.device("cuda", 3))
        device(type='cpu')
    """
    index: int | None = device.index  # torch's type stub lacks the None
    if device.type == "cpu" or index is not None:
        return device
    if tensor_device.type == device.type:
        return tensor_device
    return torch.device(device.type, torch.cuda.current_device())


def _synchronised(flat: torch.Tensor) -> torch.Tensor:
    """Wait for copies queued on a GPU: the thread that broadcasts does not wait for this thread's stream."""
    if flat.is_cuda:
        torch.cuda.current_stream(flat.device).synchronize()
    return flat


def _nbytes(pairs: Sequence[tuple[TensorSpec, torch.Tensor]]) -> int:
    return sum(spec.nbytes for spec, _ in pairs)
