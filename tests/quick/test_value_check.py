"""Values are checked in the pass that copies them: what is found, wherever it is, and what is no fault."""

from __future__ import annotations

import pytest
import torch

from torchrl_sglang.errors import WeightCoverageError
from torchrl_sglang.weights.buckets.layout import plan_buckets
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.buckets.value_check import ValueCheck
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec

LARGE = 2**20 + 3  # more than one part, and a part that is not full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("position", [0, 2**19 - 1, 2**19, LARGE - 1])
def test_a_wrong_value_is_found_wherever_it_is(dtype: torch.dtype, position: int) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        source = torch.ones(LARGE, dtype=dtype)
        source[position] = value
        view = torch.empty_like(source)
        check = ValueCheck()
        check.copy("w", source, view)
        assert check.problems == {"w": f"1 of {LARGE} elements NaN or infinite"}
        assert torch.equal(view[:position], source[:position])


@pytest.mark.parametrize(
    ("source", "wire", "target"),
    [
        (torch.full((LARGE,), 1e30), torch.float32, None),  # the sum of squares overflows
        (torch.full((7,), 1e30), torch.float32, torch.bfloat16),
        (torch.full((7,), 6e4), torch.float32, torch.float16),
        (torch.randn(40, 50).t(), torch.float32, None),  # not contiguous
        (torch.randn(5), torch.bfloat16, torch.bfloat16),
        (torch.arange(9), torch.int64, None),
        (torch.empty(0, 3), torch.float32, None),
        (torch.tensor(1.5), torch.float32, None),
        (torch.ones(LARGE, dtype=torch.float8_e4m3fn), torch.float8_e4m3fn, None),
    ],
)
def test_finite_values_are_copied_exactly_and_are_no_fault(
    source: torch.Tensor, wire: torch.dtype, target: torch.dtype | None
) -> None:
    view = torch.empty(source.shape, dtype=wire)
    check = ValueCheck(target)
    check.copy("w", source, view)
    check.raise_if_any()
    assert torch.equal(view.to(torch.float64), source.to(wire).to(torch.float64))


def test_a_value_that_the_server_can_not_represent_is_a_fault_before_and_after_the_cast() -> None:
    for wire in (torch.float32, torch.float16):
        check = ValueCheck(torch.float16)
        check.copy("w", torch.tensor([1.0, 1e6]), torch.empty(2, dtype=wire))
        with pytest.raises(WeightCoverageError, match="w: 1 of 2 elements"):
            check.raise_if_any()


def test_a_tensor_that_is_a_bucket_of_its_own_is_checked_although_it_is_not_copied() -> None:
    tensors = {"a": torch.tensor([float("nan")] * 100), "b": torch.ones(3)}
    plan = plan_buckets([TensorSpec.of(name, tensor) for name, tensor in tensors.items()], bucket_bytes=64)
    check = ValueCheck()
    for _ in BucketPacker("cpu").packed(plan, lambda names: [(name, tensors[name]) for name in names], check):
        pass
    assert list(check.problems) == ["a"]


def test_staged_buckets_keep_their_bytes_and_their_buffers_from_plan_to_plan() -> None:
    tensors = {f"w{index}": torch.full((8,), float(index)) for index in range(5)}
    plan = plan_buckets([TensorSpec.of(name, tensor) for name, tensor in tensors.items()], bucket_bytes=40)
    packer = BucketPacker("cpu", allocate=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    packer.is_staged = True
    addresses = []
    for shift in (0.0, 1.0):
        shifted = {name: tensor + shift for name, tensor in tensors.items()}
        packed = list(packer.packed(plan, lambda names, new=shifted: [(name, new[name]) for name in names]))
        for bucket, flat in packed:
            for name, view in zip(bucket.names, bucket.views(flat), strict=True):
                assert torch.equal(view, shifted[name])
        addresses.append([flat.data_ptr() for _, flat in packed])
    assert addresses[0] == addresses[1]
    assert len(set(addresses[0])) == 5
    packer.is_staged = False
    flats = [flat for _, flat in packer.packed(plan, lambda names: [(name, tensors[name]) for name in names])]
    assert len({flat.data_ptr() for flat in flats}) == 2
    assert len(packer.buffers) == 2
