"""Tensors sharded by FSDP2: gathering one, and agreement between the ranks that hold its shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

__all__ = ["Ranks", "full_tensor", "is_sharded", "local_tensor", "ranks_of"]


class Ranks:
    """The ranks of a device mesh; they communicate over the mesh's own process groups.

    Attributes:
        is_first: whether this rank has coordinate 0 in every dimension. This rank sends.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        coordinate = mesh.get_coordinate()
        self.is_first = coordinate is not None and not any(coordinate)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether any rank has set it. Collective: every rank passes the same number of flags."""
        counts = torch.tensor(flags, dtype=torch.int32, device=self._mesh.device_type)
        for dimension in range(self._mesh.ndim):
            # A reduction along each dimension in turn covers the whole mesh.
            dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=self._mesh.get_group(dimension))
        return [bool(count) for count in counts.tolist()]


def is_sharded(module: nn.Module) -> bool:
    """Whether other ranks hold shards of the module's parameters."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def ranks_of(tensors: Iterable[torch.Tensor]) -> Ranks | None:
    """The ranks of the largest device mesh of ``tensors``; ``None`` if no tensor is sharded."""
    meshes = [tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)]
    return Ranks(max(meshes, key=lambda mesh: mesh.size())) if meshes else None


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, detached. Gathers a DTensor from all ranks (collective); returns others as they are."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    sharded: Any = tensor.detach()
    mesh_device = sharded.device_mesh.device_type
    if sharded.device.type != mesh_device:
        sharded = sharded.to(mesh_device)  # FSDP2 with CPU offload: the collective runs on the mesh's device
    whole: torch.Tensor = sharded.full_tensor()
    return whole


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor, or the whole tensor if it is not sharded; detached."""
    detached: Any = tensor.detach()
    local: torch.Tensor = detached.to_local() if isinstance(detached, DTensor) else detached
    return local
