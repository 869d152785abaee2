"""Name, shape and dtype of one tensor, without its values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["TensorSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, shape and dtype of one tensor.

    Attributes:
        name: checkpoint name.
        shape: sizes per dimension; ``()`` for a scalar.
        dtype: element type.
        trainable: whether an optimiser changes the tensor. True for a frozen weight with a trainable adapter.

    Examples:
        >>> TensorSpec(name="w", shape=(2, 3), dtype=torch.bfloat16).nbytes
        12
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool = True

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorSpec:
        """Describe ``tensor`` under ``name``.

        Examples:
            >>> TensorSpec.of("w", torch.zeros(2, 3))
            TensorSpec(name='w', shape=(2, 3), dtype=torch.float32, trainable=True)
        """
        return cls(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize
