"""Transport ``broadcast``, the default: buckets go over a process group of trainer and servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.group.bucket_loop import BucketLoop
from torchrl_sglang.weights.group.process_group import WeightGroup, choose_backend, close_groups
from torchrl_sglang.weights.group.rendezvous import group_mark, group_name
from torchrl_sglang.weights.transports.base import PackedWeights
from torchrl_sglang.weights.transports.replicas import require_one_replica
from torchrl_sglang.weights.update.report import SyncReport
from torchrl_sglang.weights.update.session import UpdateSession

__all__ = ["BroadcastTransport"]


class BroadcastTransport:
    """Sends weights over process groups that are kept from one sync to the next.

    After a failure the groups are dropped, since some rank may wait in a collective; the next :meth:`connect` makes new
    ones.

    Args:
        pool: the servers.
        config: address, backend, groups and time-outs.
        owner: id of this trainer. Groups are named after it and counted, and a server with mixed weights is marked with
            that name, so that the next trainer can destroy groups in which a dead trainer left servers waiting.
        checkpoint: what the servers were started from; it says how large a bucket may be.
    """

    name = "broadcast"

    def __init__(self, pool: SGLangPool, config: SyncConfig, owner: str, checkpoint: Checkpoint) -> None:
        self._pool = pool
        self._config = config
        self._owner = owner
        self._checkpoint = checkpoint
        self._mark = owner
        self._count = 0
        self._members: list[tuple[str, int]] = []
        self._groups: list[WeightGroup] = []
        self._packer: BucketPacker | None = None

    @property
    def packer(self) -> BucketPacker:
        """Packs buckets on the device that the group broadcasts from."""
        if self._packer is None:
            self._packer = BucketPacker(self._groups[0].device)
        return self._packer

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Make the process groups, unless they are there for exactly these server processes.

        Raises:
            ConfigError: a server can't take part in a weight group.
            WeightUpdateError: a server did not join.
        """
        require_one_replica(clients)
        members = [(client.url, self._pool.state.server(client.url).restarts) for client in clients]
        if self._groups and members == self._members:
            return
        if any(self._pool.state.server(url).restarts != restarts for url, restarts in self._members):
            self._drop()  # a restarted server is in no group, and the others may still wait for its old process
        else:
            self.close()
        self._members = []  # if one group can't be formed, the next call forms all
        self._count += 1
        divided = divide(clients, self._config)
        is_gloo = choose_backend(self._config, clients) == "gloo"
        bucket_bytes = self._config.bucket_size(self._checkpoint.nbytes, in_main_memory=is_gloo)
        largest_bytes = max(min(bucket_bytes, self._checkpoint.nbytes), self._checkpoint.largest_nbytes)
        self._mark = group_mark(self._owner, self._count, _rank_limit_s(self._config, divided, largest_bytes))
        forming = {group[0].url: partial(self._form, index, group) for index, group in enumerate(divided)}
        outcomes = side_by_side(forming).values()
        self._groups = [outcome.value for outcome in outcomes if outcome.value is not None]
        for outcome in outcomes:
            outcome.unwrap()
        self._members = members

    def _form(self, index: int, clients: Sequence[SGLangClient]) -> WeightGroup:
        port = self._config.master_port
        config = self._config if port is None else replace(self._config, master_port=port + index)
        return WeightGroup.form(clients, config, group_name(self._mark))

    @property
    def num_copies(self) -> int:
        """How often the trainer sends every byte."""
        return len(self._groups)

    def stage(self, packed: PackedWeights, version: WeightVersion, report: SyncReport) -> None:
        """Gather, check and pack all buckets, or the first."""
        packed.stage()

    def open_session(
        self, clients: Sequence[SGLangClient], version: WeightVersion, deadline: float, report: SyncReport
    ) -> UpdateSession:
        """Pauses the servers; after a failure they leave the groups first. See :meth:`WeightTransport.open_session`."""
        return UpdateSession(
            self._pool,
            clients,
            version=version,
            config=self._config,
            deadline=deadline,
            report=report,
            mark=self._mark,
            groups=self._groups,
        )

    def send(self, session: UpdateSession, packed: PackedWeights, deadline: float) -> None:
        """Broadcast the buckets. See :meth:`WeightTransport.send`."""
        session.begin()
        loop = self.bucket_loop(deadline)
        flush = session.flushes and packed.num_buckets is not None
        with session.report.phase("transfer"):
            failed = loop.run(packed, num_buckets=packed.num_buckets, flush_cache=flush)
        session.received(flushed=flush and session.report.num_buckets > 0, failed=failed)

    def bucket_loop(self, deadline: float) -> BucketLoop:
        """What sends the buckets of one update over the groups."""
        return BucketLoop(self._groups, self._pool.state, self._config, deadline)

    def close(self) -> None:
        """Destroy the groups on both sides."""
        groups, self._groups = self._groups, []
        close_groups(groups)

    def _drop(self) -> None:
        """Destroy the trainer's side of the groups only."""
        for group in self._groups:
            group.drop()
        self._groups = []


def divide(clients: Sequence[SGLangClient], config: SyncConfig) -> list[list[SGLangClient]]:
    """Which servers share a process group (:attr:`SyncConfig.groups`).

    gloo's broadcast is a tree in which servers send to each other: where one hangs, healthy ones wait for it, and no
    trainer's death frees them. With a group of its own, a server of at most two ranks waits for the trainer alone.
    """
    shared = config.groups == "shared" or (config.groups == "auto" and choose_backend(config, clients) == "nccl")
    return [list(clients)] if shared else [[client] for client in clients]


def _rank_limit_s(config: SyncConfig, divided: Sequence[Sequence[SGLangClient]], largest_bytes: int) -> float:
    """How long a rank may have to wait in a group, in seconds: for the others to join, or for a bucket."""
    num_ranks = 1 + max(sum(client.info.tp_size for client in group) for group in divided)
    return max(config.group_limit_s(num_ranks), config.bucket_limit_s(largest_bytes * len(divided)))
