"""Too little room in ``/dev/shm``: another transport is chosen, or nothing is sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from torchrl_sglang.errors import StorageError
from torchrl_sglang.weights.buckets.layout import plan_buckets
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.shared_memory import same_host


def test_a_folder_that_takes_no_file_is_a_reason_to_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_host, "_owners_of_other_end", lambda url: {os.getpid()})
    monkeypatch.setattr(same_host, "_schedulers_below", lambda owners: owners)
    check = same_host.check_same_host("http://127.0.0.1:1", Path("/nonexistent/folder"))
    assert not check.is_shared
    assert "no file can be written to /dev/shm or /nonexistent/folder" in check.reason
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
