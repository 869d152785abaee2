"""Tensors whose values are not in memory one after the other are refused by name, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from torchrl_sglang import ConfigError
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.source.factory import open_source

CHECKPOINT = Checkpoint.from_specs({"layer.weight": ((4, 4), torch.float32), "layer.bias": ((4,), torch.float32)})


class Wrapped(torch.Tensor):
    """Stands for another tensor, as torchao's quantised weights do."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapped) else value

        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda value: Wrapped(value) if isinstance(value, torch.Tensor) else value, result)


def freed() -> torch.Tensor:
    tensor = torch.ones(4, 4)
    tensor.untyped_storage().resize_(0)
    return tensor


UNREADABLE: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(4).to_sparse(), "is a sparse_coo tensor.*to_dense"),
    "compressed": (lambda: torch.eye(4).to_sparse_csr(), "is a sparse_csr tensor.*to_dense"),
    "mkldnn": (lambda: torch.eye(4).to_mkldnn(), "is a mkldnn tensor.*to_dense"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(4)] * 4), "is a nested tensor"),
    "freed": (freed, "has no memory: its storage was freed"),
    "of zeros": (lambda: torch._efficientzerotensor((4, 4)), "has no memory"),  # type: ignore[attr-defined]
    "wrapped": (lambda: Wrapped(torch.eye(4)), "is a Wrapped, which has no memory of its own"),
    "lazy": (nn.parameter.UninitializedParameter, "has no shape and no values yet"),
    "meta": (lambda: torch.ones(4, 4, device="meta"), "is on the meta device"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("given_as", ["dict", "module", "iterator", "function"])
def test_a_tensor_without_values_in_memory_is_refused_by_name(kind: str, given_as: str) -> None:
    make, message = UNREADABLE[kind]
    weights: Any = {"layer.weight": make(), "layer.bias": torch.ones(4)}
    if given_as == "module":
        module = nn.Module()
        module.layer = nn.Module()
        for name, tensor in weights.items():
            module.layer.register_buffer(name.partition(".")[2], tensor)
        weights = module
    elif given_as == "iterator":
        weights = iter(weights.items())
    elif given_as == "function":
        weights = weights.items().__iter__
    with pytest.raises(ConfigError, match=f"'layer.weight'.*{message}"):
        list(open_source(weights, CHECKPOINT).tensors())


def test_every_layout_of_a_dense_tensor_is_read() -> None:
    want = torch.arange(16.0).view(4, 4)
    for tensor in (
        want.t().contiguous().t(),
        torch.stack([want, -want], -1)[..., 0],
        torch.complex(torch.zeros(4, 4), -want).conj().imag,  # negated when it is read
        want.clone().requires_grad_(),
    ):
        weights = {"layer.weight": tensor, "layer.bias": torch.ones(1).expand(4)}
        read = dict(open_source(weights, CHECKPOINT).tensors())
        assert torch.equal(read["layer.weight"], want)
        assert torch.equal(read["layer.bias"], torch.ones(4))
