"""Pushes after which a server keeps old values of some tensors, although every call of the update succeeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from torchrl_sglang import WeightSync
from torchrl_sglang.protocol.control import build_update_from_disk, check_success
from torchrl_sglang.protocol.messages import HttpRequest
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.transports.base import PackedWeights
from torchrl_sglang.weights.transports.broadcast import BroadcastTransport
from torchrl_sglang.weights.transports.tensor_payload import by_value

__all__ = ["keep_old", "put_back_on_one_rank", "reload_on_one_server"]


class OldValues(PackedWeights):
    """Buckets in which some tensors have their old values, unseen by the package's own bookkeeping."""

    def __init__(self, packed: PackedWeights, old: Mapping[str, torch.Tensor], is_kept: Callable[[str, int], bool]):
        self.num_buckets = packed.num_buckets
        self._packed = packed
        self._old = old
        self._is_kept = is_kept
        self._index = -1

    def __next__(self) -> Any:
        bucket, flat = next(self._packed)
        self._index += 1
        flat = flat.clone()
        for slot in bucket.slots:
            if self._is_kept(slot.name, self._index):
                slot.view(flat).copy_(self._old[slot.name])
        return bucket, flat


class ForgetfulTransport(BroadcastTransport):
    """A broadcast after which the servers hold the old values of some tensors."""

    change: Callable[[PackedWeights], PackedWeights]
    afterwards: Callable[[], None]

    def send(self, session: Any, packed: PackedWeights, deadline: float) -> None:
        super().send(session, self.change(packed), deadline)
        self.afterwards()


def _transport(sync: WeightSync) -> ForgetfulTransport:
    transport = sync._choose_transport()
    if not isinstance(transport, ForgetfulTransport):
        transport.close()
        sync._transport = ForgetfulTransport(sync._pool, sync.config, sync.owner, sync._planner.checkpoint)
    made: Any = sync._transport
    made.change = lambda packed: packed
    made.afterwards = lambda: None
    return made  # type: ignore[no-any-return]


def keep_old(sync: WeightSync, old: Mapping[str, torch.Tensor], is_kept: Callable[[str, int], bool]) -> None:
    """From now on, pushes leave tensors with ``is_kept(name, number of the bucket)`` as they are in ``old``."""
    _transport(sync).change = lambda packed: OldValues(packed, old, is_kept)


def put_back_on_one_rank(sync: WeightSync, name: str, old: torch.Tensor, new: torch.Tensor, rank: int) -> None:
    """From now on, pushes end with a request that gives one rank of each server the old value of a tensor."""

    def put_back() -> None:
        for client in sync._pool.clients:
            payloads = [_payload(name, old if each == rank else new) for each in range(client.info.tp_size)]
            body = {"serialized_named_tensors": payloads, "flush_cache": False}
            answer = client.send(HttpRequest(method="POST", path="/update_weights_from_tensor", body=body))
            check_success(answer, server=client.url, what="a tensor")

    _transport(sync).afterwards = put_back


def reload_on_one_server(sync: WeightSync, url: str, folder: Path) -> None:
    """From now on, pushes end with a request that makes one server load a checkpoint."""

    def reload() -> None:
        (client,) = (each for each in sync._pool.clients if each.url == url)
        check_success(client.send(build_update_from_disk(str(folder), version="reloaded")), server=url, what="a folder")

    _transport(sync).afterwards = reload


def _payload(name: str, tensor: torch.Tensor) -> bytes:
    return by_value(Bucket.of([TensorSpec.of(name, tensor)]), tensor.contiguous().view(-1).view(torch.uint8))
