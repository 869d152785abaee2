"""Tensors sharded by FSDP2: gathering one, and agreement between the ranks that hold its shards."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchrl_sglang.errors import SGLangError, WeightUpdateError

__all__ = ["Ranks", "full_tensor", "is_sharded", "local_tensor", "ranks_of", "ranks_of_weights", "reshard", "together"]


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
        return [bool(count) for count in self._largest([int(flag) for flag in flags])]

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Leave the block on all ranks, or raise on all of them: no rank then waits in a gather for one that failed.

        Collective, and the block itself must not be: a rank that fails would miss its collectives. Whatever is raised
        counts, ``KeyboardInterrupt`` included. A rank that has not failed raises the error of one that has: the same,
        if it is one of this package's, else a :class:`WeightUpdateError` that describes it.

        Args:
            doing: what the block does, for that error.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            other = self._exchange(failure, doing)
            if failure is None and other is not None:
                raise other

    def _exchange(self, failure: BaseException | None, doing: str) -> SGLangError | None:
        """The error of one of the ranks that have failed, ``None`` if there is none. Collective."""
        rank = dist.get_rank()
        message = b"" if failure is None else _pickled(failure, f"rank {rank} failed while {doing}")
        # The highest rank that has failed, and the size of its error.
        (failed,) = self._largest([rank if failure is not None else -1])
        if failed < 0:
            return None
        (size,) = self._largest([len(message) if failed == rank else 0])
        values = self._largest(list(message) if failed == rank else [0] * size)
        error: SGLangError = pickle.loads(bytes(values))
        return error

    def _largest(self, values: Sequence[int]) -> list[int]:
        """Per position the largest value over all ranks."""
        largest = torch.tensor(values, dtype=torch.int32, device=self._mesh.device_type)
        for dimension in range(self._mesh.ndim):
            # A reduction along each dimension in turn covers the whole mesh.
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._mesh.get_group(dimension))
        return [int(value) for value in largest.tolist()]


def _pickled(failure: BaseException, where: str) -> bytes:
    """An error as the other ranks are to raise it."""
    if isinstance(failure, SGLangError):
        with suppress(pickle.PicklingError, TypeError, AttributeError):
            message = pickle.dumps(failure)
            pickle.loads(message)
            return message
    return pickle.dumps(WeightUpdateError(f"{where}: {type(failure).__name__}: {failure}. Nothing was sent"))


@contextmanager
def together(ranks: Ranks | None, doing: str) -> Iterator[None]:
    """:meth:`Ranks.together`, or nothing where no other rank takes part."""
    with nullcontext() if ranks is None else ranks.together(doing):
        yield


def ranks_of_weights(weights: Any) -> Ranks | None:
    """The ranks of what a trainer sends, a module, TensorDict or dict; ``None`` if it is not sharded.

    Of an iterator it can't be told before it is read.
    """
    if isinstance(weights, nn.Module):
        reshard(weights)
        return ranks_of(weights.parameters())
    if isinstance(weights, TensorDictBase):
        return ranks_of(weights.values(include_nested=True, leaves_only=True))
    return ranks_of(_tensors_in(weights)) if isinstance(weights, Mapping) else None


def _tensors_in(weights: Mapping[Any, Any]) -> Iterator[torch.Tensor]:
    for value in weights.values():
        if isinstance(value, Mapping):
            yield from _tensors_in(value)
        elif isinstance(value, torch.Tensor):
            yield value


def reshard(module: nn.Module) -> None:
    """Undo what a forward pass leaves: an unsharded root, which would be read without its other ranks."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


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
