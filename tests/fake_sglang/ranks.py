"""The server's side of a weight-update group: gloo ranks that receive the trainer's broadcasts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from tests.fake_sglang.model import Weights

__all__ = ["Announcement", "Ranks"]

T = TypeVar("T")


class Announcement:
    """The tensors that an update request announces.

    Args:
        names: tensor names.
        dtypes: their dtypes, ``"float32"`` and the like.
        shapes: their shapes.
        flattened: whether one uint8 tensor holds all the bytes; otherwise there is one broadcast per tensor.
        strict: check lengths and alignment before any rank joins the broadcast, as SGLang does from 0.5.21 on. Older
            servers join, and fail when they split the received bytes.

    Raises:
        ValueError: lengths differ, a dimension is negative, a byte offset is unaligned, or a bucket is empty.
        AttributeError: torch has no dtype of that name.
    """

    def __init__(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        flattened: bool,
        strict: bool = True,
    ) -> None:
        self.flattened = flattened
        self.entries: list[tuple[str, torch.dtype, torch.Size]] = []
        offset = 0
        for name, dtype_name, dims in zip(names, dtypes, shapes, strict=flattened and strict):
            dtype: torch.dtype = getattr(torch, dtype_name)
            if any(dim < 0 for dim in dims):
                raise ValueError(f"Negative dimension in received tensor {name}: torch.Size({list(dims)})")
            if flattened and strict and offset % dtype.itemsize:
                raise ValueError(f"Unaligned received tensor {name}: byte offset {offset}, dtype {dtype}")
            shape = torch.Size(dims)
            self.entries.append((name, dtype, shape))
            offset += shape.numel() * dtype.itemsize
        if flattened and not self.entries:
            raise ValueError("Cannot create empty tensor bucket")
        self.total_bytes = offset

    def buffers(self) -> list[torch.Tensor]:
        """New tensors to receive into, one per broadcast."""
        if self.flattened:
            return [torch.empty(self.total_bytes, dtype=torch.uint8)]
        return [torch.empty(shape, dtype=dtype) for _, dtype, shape in self.entries]

    def named(self, buffers: list[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """The received tensors by name; views of the buffers."""
        if not self.flattened:
            return [(name, buffer) for (name, _, _), buffer in zip(self.entries, buffers, strict=True)]
        out = []
        offset = 0
        for name, dtype, shape in self.entries:
            size = shape.numel() * dtype.itemsize
            out.append((name, buffers[0][offset : offset + size].view(dtype).reshape(shape)))
            offset += size
        return out


class Ranks:
    """All tensor-parallel ranks of one fake server, each with its own copy of the weights and its own connections.

    Args:
        weights: the initial weights of each rank; requests are answered with those of the first.
        timeout_s: how long a rank waits at a store or in a collective.
    """

    def __init__(self, weights: list[Weights], timeout_s: float) -> None:
        self.weights = weights
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: dict[str, list[ProcessGroupGloo]] = {}

    def reach_store(self, address: str, port: int, world_size: int) -> list[Any]:
        """Connect every rank to the trainer's store; waits until a store listens there.

        Raises:
            RuntimeError: no store listened in time.
        """
        return self._on_each_rank(lambda _: TCPStore(address, port, world_size, False, self._timeout))

    def join(self, name: str, stores: list[Any], rank_offset: int, world_size: int) -> None:
        """Form the group: connect every rank to all others under SGLang's store prefixes.

        Raises:
            RuntimeError: a member did not connect in time.
        """

        def connect(rank: int) -> ProcessGroupGloo:
            store = PrefixStore("cpu/", PrefixStore(f"{name}/", PrefixStore(name, stores[rank])))
            return ProcessGroupGloo(store, rank_offset + rank, world_size, self._timeout)

        self._groups[name] = self._on_each_rank(connect)

    def is_formed(self, name: str) -> bool:
        """Whether the group exists."""
        return name in self._groups

    def leave(self, name: str) -> None:
        """Close the group's connections."""
        self._groups.pop(name, None)

    def leave_all(self) -> None:
        """Close every group's connections."""
        self._groups.clear()

    def receive(
        self, name: str, announcement: Announcement, on_joined: Callable[[], None]
    ) -> list[list[tuple[str, torch.Tensor]]]:
        """Take part in the announced broadcasts on every rank.

        Args:
            name: the group.
            announcement: the tensors to receive.
            on_joined: called once, after every rank has entered the first collective and before any waits for it.

        Returns:
            Per rank the tensors by name.

        Raises:
            RuntimeError: a member of the group disconnected or did not send in time.
        """
        groups = self._groups[name]
        per_rank = [announcement.buffers() for _ in groups]
        works = [[_broadcast(group, buffer) for buffer in mine] for group, mine in zip(groups, per_rank, strict=True)]
        on_joined()

        def wait(rank: int) -> list[tuple[str, torch.Tensor]]:
            for work in works[rank]:
                work.wait()
            return announcement.named(per_rank[rank])

        return self._on_each_rank(wait)

    def _on_each_rank(self, work: Callable[[int], T]) -> list[T]:
        """Run ``work`` for all ranks concurrently; raises the error of the lowest rank that failed."""
        results: dict[int, T] = {}
        errors: dict[int, BaseException] = {}

        def run(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:  # noqa: BLE001  raised in the calling thread
                errors[rank] = error

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(1, len(self.weights))]
        for thread in threads:
            thread.start()
        run(0)
        for thread in threads:
            thread.join()
        try:
            if errors:
                raise errors[min(errors)]
        finally:
            # The error's traceback refers to this frame, and so to `errors` and `work`. Without this, the cycle keeps
            # the failed collective, and with it the group's sockets, open until a garbage collection.
            errors.clear()
        return [results[rank] for rank in range(len(self.weights))]


def _broadcast(group: Any, buffer: torch.Tensor) -> Any:
    options = BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return group.broadcast([buffer], options)
