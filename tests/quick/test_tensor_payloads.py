"""The pickles of ``/update_weights_from_tensor``: SGLang's allow-list accepts them, and they give the tensors back."""

from __future__ import annotations

import base64
import pickletools

import pytest
import torch

from tests.fake_sglang.payloads import read_payload
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.transports.tensor_payload import by_cuda_handle, by_value, encode_tensors

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3),
    "half": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False]),
    "small": torch.tensor([1.0, 2.0], dtype=torch.float8_e4m3fn),
}


def bucket_of(tensors: dict[str, torch.Tensor]) -> tuple[Bucket, torch.Tensor]:
    bucket = Bucket.of([TensorSpec.of(name, tensor) for name, tensor in tensors.items()])
    return bucket, BucketPacker("cpu").pack(bucket, [(name, tensors[name]) for name in bucket.names])


def test_a_bucket_by_value_gives_every_tensor_back_with_its_dtype_and_shape() -> None:
    read = dict(read_payload(by_value(*bucket_of(TENSORS))))
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert read["matrix"].is_contiguous()


def test_a_bucket_of_empty_tensors_alone_is_read() -> None:
    read = read_payload(by_value(*bucket_of({"empty": torch.empty(0, 4), "none": torch.empty(0)})))
    assert [(name, tuple(tensor.shape)) for name, tensor in read] == [("empty", (0, 4)), ("none", (0,))]


def test_the_bytes_of_a_bucket_are_written_once_however_many_tensors_view_them() -> None:
    flat = torch.zeros(2**20)
    pieces = {f"w{index}": piece for index, piece in enumerate(flat.chunk(64))}
    assert len(by_value(*bucket_of(pieces))) < 1.4 * flat.nbytes


def test_an_adapter_is_a_dict() -> None:
    read = dict(read_payload(encode_tensors(TENSORS)))  # the same reader, which does not look at the type
    assert torch.equal(read["half"], TENSORS["half"])


def test_tensors_on_a_gpu_are_named_by_its_uuid_and_view_one_buffer_in_the_order_of_the_bucket() -> None:
    """What can be tested without a GPU: the calls that the pickle makes, and their arguments."""
    bucket, _ = bucket_of({"w": torch.zeros(2, 3), "b": torch.zeros(4), "h": torch.zeros(5, dtype=torch.bfloat16)})
    shared = ("GPU-1234", b"handle", 84, 0, False, b"counter", 3, b"event", True)
    names: list[str] = []
    strings: list[str] = []
    integers: list[int] = []
    for opcode, argument, _ in pickletools.genops(base64.b64decode(by_cuda_handle(bucket, shared))):
        if isinstance(argument, str):
            strings.append(argument)
        elif isinstance(argument, int) and "INT" in opcode.name:
            integers.append(argument)
        if opcode.name == "STACK_GLOBAL":
            names.append(".".join(strings[-2:]))
    assert "rebuild_cuda_tensor" in strings
    assert [text for text in strings if text in ("w", "b", "h")] == ["w", "b", "h"]
    assert strings.count("GPU-1234") == 1
    # offsets in elements: w at 0, b after 6 floats, h after 10 floats = 20 halves
    assert [offset for offset in integers if offset in (6, 20)] == [6, 20]


def test_a_name_that_sglang_does_not_allow_is_refused_by_the_fake_server_too() -> None:
    import pickle

    with pytest.raises(RuntimeError, match="Blocked unsafe global"):
        read_payload(base64.b64encode(pickle.dumps(print)).decode())
