"""Who else holds a piece: the ranks that share a trainer's sharded tensors, and how they agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

__all__ = ["Ranks", "is_sharded", "ranks_of"]


class Ranks:
    """The ranks of a device mesh, spoken to over the mesh's own groups.

    Attributes:
        is_first: this rank has coordinate 0 in every dimension; it is the one that sends.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        coordinate = mesh.get_coordinate()
        self.is_first = coordinate is not None and not any(coordinate)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Flag by flag, whether it is set on any rank. Collective: every rank calls it with as many flags."""
        counts = torch.tensor(flags, dtype=torch.int32, device=self._mesh.device_type)
        for dimension in range(self._mesh.ndim):
            # One dimension after the other spreads a flag over the whole mesh.
            dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=self._mesh.get_group(dimension))
        return [bool(count) for count in counts.tolist()]


def is_sharded(module: nn.Module) -> bool:
    """Whether other ranks hold pieces of it."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def ranks_of(tensors: Iterable[torch.Tensor]) -> Ranks | None:
    """The ranks of the largest mesh among ``tensors``, or ``None`` if none of them is sharded."""
    meshes = [tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)]
    return Ranks(max(meshes, key=lambda mesh: mesh.size())) if meshes else None
