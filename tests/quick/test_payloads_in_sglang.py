"""SGLang's own unpicklers, cut out of its packages, read the bytes that travel in requests."""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import pickle
import pickletools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import OLD_SGLANG
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.transports.tensor_payload import by_value, encode_tensors

_COMMON = Path("srt", "utils", "common.py")
_PARTS = ("_safe_load_torch_storage", "SafeUnpickler")
_NAMES = (
    *("float64", "float32", "bfloat16", "float16"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
)
DTYPES = [getattr(torch, name) for name in _NAMES]


@pytest.fixture(scope="module", params=["current", OLD_SGLANG])
def unpickler(request: pytest.FixtureRequest) -> Any:
    """``SafeUnpickler`` of a version of SGLang, without importing SGLang."""
    if request.param == "current":
        spec = importlib.util.find_spec("sglang")
        folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path("missing")
    else:
        folder = Path(sys.prefix) / f"sglang-{OLD_SGLANG}" / "sglang"
    file = folder / _COMMON
    if not file.exists():
        pytest.skip(f"SGLang ({request.param}) is not installed")
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in _PARTS]
    names: dict[str, Any] = {"pickle": pickle, "io": io, "torch": torch}
    exec(compile(tree, str(file), "exec"), names)
    return names["SafeUnpickler"]


def read(unpickler: Any, payload: bytes) -> Any:
    return unpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load()


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bytes, of which a bool has only two."""
    flat = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return flat.view(-1).view(dtype).view(shape)


def bytes_of(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []


def test_tensors_of_every_dtype_in_one_bucket_come_back(unpickler: Any) -> None:
    torch.manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        name = str(dtype)
        tensors |= {
            f"{name}.matrix": values(dtype, 3, 5),
            f"{name}.scalar": values(dtype),
            f"{name}.none": values(dtype, 0, 2),
        }
    bucket = Bucket.of([TensorSpec.of(name, tensor) for name, tensor in tensors.items()])
    flat = BucketPacker("cpu").pack(bucket, [(name, tensors[name]) for name in bucket.names])
    for received in (dict(read(unpickler, by_value(bucket, flat))), read(unpickler, encode_tensors(tensors))):
        assert received.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (received[name].dtype, received[name].shape) == (tensor.dtype, tensor.shape), name
            assert bytes_of(received[name]) == bytes_of(tensor), name
            assert received[name].is_contiguous()


@pytest.mark.parametrize("start", [0, 8])
def test_only_a_buckets_part_of_a_longer_buffer_travels(unpickler: Any, start: int) -> None:
    buffer = torch.arange(2**16, dtype=torch.float32).view(torch.uint8)
    bucket = Bucket.of([TensorSpec(name="w", shape=(4,), dtype=torch.float32)])
    payload = by_value(bucket, buffer[start : start + 16])
    assert len(payload) < 2000
    assert dict(read(unpickler, payload))["w"].tolist() == [start / 4 + index for index in range(4)]


def test_a_storage_is_not_built_from_bytes_element_by_element() -> None:
    """``UntypedStorage(bytes)`` is: it takes fifteen times as long."""
    bucket = Bucket.of([TensorSpec(name="w", shape=(4,), dtype=torch.uint8)])
    pickled = base64.b64decode(by_value(bucket, values(torch.uint8, 4)))
    names = {argument for _, argument, _ in pickletools.genops(pickled)}
    assert "_load_from_bytes" in names
    assert "UntypedStorage" not in names
