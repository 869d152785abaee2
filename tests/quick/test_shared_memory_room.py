"""Too little room in ``/dev/shm``: another transport is chosen, or nothing is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from torchrl_sglang.errors import StorageError
from torchrl_sglang.weights.buckets.layout import plan_buckets
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.shared_memory import same_host
from torchrl_sglang.weights.transports.base import PackedWeights
from torchrl_sglang.weights.update.report import SyncReport


def test_a_folder_that_takes_no_file_is_a_reason_to_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_host, "_owners_of_other_end", lambda url: {os.getpid()})
    monkeypatch.setattr(same_host, "_schedulers_below", lambda owners: owners)
    monkeypatch.setattr(same_host, "SHARED_MEMORY", Path("/proc/self"))  # a folder
    check = same_host.check_same_host("http://127.0.0.1:1")
    assert not check.is_shared
    assert "no file can be written to /proc/self (" in check.reason
    assert check.may_change, "there may be room at the next update"


def test_both_buffers_are_allocated_before_the_first_bucket_is_sent() -> None:
    tensors = {f"w{index}": torch.full((8 * (1 + index),), float(index)) for index in range(4)}
    plan = plan_buckets([TensorSpec.of(name, tensor) for name, tensor in tensors.items()], bucket_bytes=8)
    assert len(plan) == 4
    made: list[int] = []
    room = 200

    def allocate(nbytes: int) -> torch.Tensor:
        if sum(made) + nbytes > room:
            raise StorageError("no room")
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    packer = BucketPacker("cpu", allocate=allocate)
    with pytest.raises(StorageError):
        next(packer.packed(plan, lambda names: [(name, tensors[name]) for name in names]))
    room, made = 10_000, []
    packer = BucketPacker("cpu", allocate=allocate)
    for _ in range(2):
        for bucket, flat in packer.packed(plan, lambda names: [(name, tensors[name]) for name in names]):
            assert torch.equal(bucket.views(flat)[0], tensors[bucket.names[0]])
    assert sorted(made) == sorted(bucket.nbytes for bucket in plan)[-2:], "none is allocated twice"


@pytest.mark.parametrize("is_staged", [False, True])
def test_a_sharded_source_is_gathered_to_its_end_although_there_is_no_room(is_staged: bool) -> None:
    """The other ranks wait in the gather of each tensor."""
    tensors = {f"w{index}": torch.zeros(8) for index in range(4)}
    plan = plan_buckets([TensorSpec.of(name, tensor) for name, tensor in tensors.items()], bucket_bytes=8)
    gathered: list[str] = []

    def gathering(names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            for name in names:
                gathered.append(name)
                yield name, tensors[name]
        except GeneratorExit:
            gathered.extend(names[len(gathered) :])
            raise

    def allocate(nbytes: int) -> torch.Tensor:
        raise StorageError("no room")

    packer = BucketPacker("cpu", allocate=allocate)
    packer.is_staged = is_staged
    report = SyncReport(version=1, transport="ipc")
    packed = PackedWeights(packer.packed(plan, gathering), report, num_buckets=4, is_sharded=True, is_staged=is_staged)
    with pytest.raises(StorageError):
        packed.stage()
    packed.close()
    assert gathered == list(tensors)


class Memory:
    """Has room for some bytes; what is given back can be used again."""

    def __init__(self, room: int) -> None:
        self.room = self.smallest_room = room

    def allocate(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.room:
            raise StorageError("no room")
        self.room -= nbytes
        self.smallest_room = min(self.smallest_room, self.room)
        return torch.empty(nbytes, dtype=torch.uint8)

    def discard(self, buffer: torch.Tensor) -> None:
        self.room += buffer.nbytes


SIZES = [
    [1, 2, 3, 4],
    [4, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 30],
    [30, 1],
    [2, 2],
    [3, 3, 3, 3, 3],
    [1, 20, 1, 20, 1],
]


@pytest.mark.parametrize("is_wider", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_stream_of_tensors_runs_out_of_room_before_its_first_bucket_or_never(
    sizes: list[int], is_wider: bool
) -> None:
    dtype = torch.float64 if is_wider else torch.float32
    tensors = {f"w{index}": torch.full((size,), float(index), dtype=dtype) for index, size in enumerate(sizes)}
    expected = {
        name: TensorSpec(name=name, shape=tuple(tensor.shape), dtype=torch.float32) for name, tensor in tensors.items()
    }
    total, outcomes = sum(tensor.nbytes for tensor in tensors.values()), []
    for room in range(0, 2 * total + 200, 4):
        memory = Memory(room)
        packer = BucketPacker("cpu", allocate=memory.allocate, discard=memory.discard)
        buckets = packer.packed_stream(
            tensors.items(), bucket_bytes=32, dtype_of=lambda spec: spec.dtype, expected=expected
        )
        try:
            next(buckets)
        except StorageError:
            outcomes.append("refused")
            continue
        for _ in buckets:
            pass
        outcomes.append("sent")
    assert outcomes == sorted(outcomes), "with more room it never works less well"
    assert outcomes[-1] == "sent"


def test_a_stream_of_one_bucket_needs_room_for_no_more(  # as a partial update by an iterator
) -> None:
    memory = Memory(8)
    packer = BucketPacker("cpu", allocate=memory.allocate)
    expected = {f"w{index}": TensorSpec(name=f"w{index}", shape=(100,), dtype=torch.float32) for index in range(9)}
    stream = packer.packed_stream(
        [("w0", torch.ones(2))], bucket_bytes=400, dtype_of=lambda spec: spec.dtype, expected=expected
    )
    assert [bucket.nbytes for bucket, _ in stream] == [8]
