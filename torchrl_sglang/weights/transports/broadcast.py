"""The default transport: one process group over trainer and servers, buckets broadcast inside one update session."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.group.bucket_loop import Transfer
from torchrl_sglang.weights.group.process_group import WeightGroup
from torchrl_sglang.weights.group.rendezvous import group_name
from torchrl_sglang.weights.transports.base import PackedBuckets, Packing
from torchrl_sglang.weights.update.session import UpdateSession

__all__ = ["BroadcastTransport"]


class BroadcastTransport:
    """Sends weights over a process group that is kept from one sync to the next.

    After a failure the group is dropped, since some rank may be lost in a collective; the next send makes a new one.

    Args:
        pool: the servers.
        config: how weights travel.
        owner: id of this trainer. Groups are named after it and counted, and a half-updated server is marked with that,
            so that the next trainer can free servers that a dead one left in its group.
    """

    name = "broadcast"

    def __init__(self, pool: SGLangPool, config: SyncConfig, owner: str) -> None:
        self._pool = pool
        self._owner = owner
        self._count = 0
        self._config = config
        self._groups: list[WeightGroup] = []
        self._packer: BucketPacker | None = None

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Make the process group, if it is not there yet for exactly these servers.

        Raises:
            ConfigError: a server can't take part in a weight group.
            WeightUpdateError: a server did not join.
        """
        _refuse_impossible(clients)
        members = [client.url for group in self._groups for client in group.clients]
        if members == [client.url for client in clients]:
            return
        self.close()
        self._count += 1
        if self._config.groups == "shared":
            self._groups = [WeightGroup.form(clients, self._config, group_name(self._mark))]
            return
        port = self._config.master_port
        for index, client in enumerate(clients):
            config = self._config if port is None else replace(self._config, master_port=port + index)
            self._groups.append(WeightGroup.form([client], config, group_name(self._mark)))

    @property
    def _mark(self) -> str:
        return f"{self._owner}.{self._count}"

    def send(
        self,
        clients: Sequence[SGLangClient],
        packing: Packing,
        version: WeightVersion,
        deadline: float,
        *,
        num_buckets: int | None,
    ) -> UpdateSession:
        """Make the group if need be, open a session, transfer. See :meth:`WeightTransport.send`."""
        start = time.monotonic()
        self.connect(clients)
        if self._packer is None:
            self._packer = BucketPacker(self._groups[0].device)
        packed = packing(self._packer)
        try:
            first = next(packed, None)  # gathered, checked and flattened while the servers still generate
            session = UpdateSession(
                self._pool, clients, version=version, config=self._config, deadline=deadline, mark=self._mark
            )
            session.seconds["prepare"] = time.monotonic() - start
            transfer = Transfer(self._groups, self._config, deadline)
            with session:
                session.transfer(transfer, _chain(first, packed), num_buckets=num_buckets)
        except BaseException:
            self.close()  # servers that got everything are still in it
            raise
        finally:
            packed.close()  # lets a sharded source's other ranks go, however this ended
        return session

    def drop(self) -> None:
        """Let go of the groups without asking the servers, which may be stuck in them."""
        for group in self._groups:
            group.drop()
        self._groups = []

    def close(self) -> None:
        """Take the groups down on both sides."""
        for group in self._groups:
            group.close()
        self._groups = []


def _chain(first: tuple[Bucket, torch.Tensor] | None, rest: PackedBuckets) -> PackedBuckets:
    if first is not None:
        yield first
        yield from rest


def _refuse_impossible(clients: Sequence[SGLangClient]) -> None:
    for client in clients:
        info = client.info
        if info.dp_size > 1:
            raise ConfigError(
                f"{client.url} runs dp_size={info.dp_size} replicas inside one server, and SGLang's weight updates "
                "reach only one of them: use several servers instead (AsyncSGLang.from_pretrained(..., dp_size=N))"
            )
        if info.pp_size > 1:
            raise ConfigError(
                f"{client.url} runs pp_size={info.pp_size} pipeline stages, whose ranks collide in a weight group: "
                "use tensor parallelism, or SyncConfig(transport='disk')"
            )
