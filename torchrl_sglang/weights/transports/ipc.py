"""Transport ``ipc``: servers on this host read the buckets from memory that the trainer shares with them.

Main memory is shared as named segments, which a server's ranks open and close with each request. No process group is
formed and no rank waits for the trainer, so one that is killed at any point leaves servers that answer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.shared_memory.same_host import HostCheck, check_same_host
from torchrl_sglang.weights.shared_memory.segments import SegmentPool
from torchrl_sglang.weights.transports.base import PackedWeights
from torchrl_sglang.weights.transports.replicas import require_one_replica
from torchrl_sglang.weights.transports.tensor_loop import TensorLoop, send_tensors
from torchrl_sglang.weights.transports.tensor_payload import by_shared_memory
from torchrl_sglang.weights.update.report import SyncReport
from torchrl_sglang.weights.update.session import UpdateSession

__all__ = ["HostChecks", "IpcTransport"]


class HostChecks:
    """Which servers share this host's memory; each server's process is checked once."""

    def __init__(self) -> None:
        self._known: dict[str, HostCheck] = {}

    def check(self, clients: Sequence[SGLangClient]) -> dict[str, HostCheck]:
        """The result per server URL."""
        unknown = [
            each.url for each in clients if each.url not in self._known or not self._known[each.url].still_holds()
        ]
        if unknown:
            folder = Path(tempfile.gettempdir())
            outcomes = side_by_side({url: partial(check_same_host, url, folder) for url in unknown})
            self._known |= {url: outcome.unwrap() for url, outcome in outcomes.items()}
        return {client.url: self._known[client.url] for client in clients}


def _openers(client: SGLangClient, check: HostCheck) -> list[int]:
    """The processes that open a segment when a server is told to, each as often as it has ranks."""
    pids = [process.pid for process in check.schedulers]
    return pids * max(1, client.info.tp_size // len(pids))


class IpcTransport:
    """Sends weights through memory that is shared with the servers' processes.

    Two segments, or one per bucket if everything is staged, are kept from one sync to the next. After a failure they
    are given up: a server that was told of one may still open it.

    Args:
        pool: the servers.
        config: bucket size and time-outs.
        checks: which servers share this host's memory.
    """

    name = "ipc"

    def __init__(self, pool: SGLangPool, config: SyncConfig, checks: HostChecks | None = None) -> None:
        self._pool = pool
        self._config = config
        self._checks = checks or HostChecks()
        self._segments = SegmentPool()
        self._packer: BucketPacker | None = None

    @property
    def packer(self) -> BucketPacker:
        """Packs buckets in shared memory."""
        if self._packer is None:
            self._packer = BucketPacker("cpu", allocate=self._segments.make, discard=self._segments.discard)
        return self._packer

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Check that the servers can open this process's memory, and start the process that removes its segments.

        Raises:
            ConfigError: a server can't open it.
        """
        require_one_replica(clients)
        checks = self._checks.check(clients)
        elsewhere = [f"{url}: {check.reason}" for url, check in checks.items() if not check.is_shared]
        if elsewhere:
            raise ConfigError(
                f"transport='ipc' needs servers that share this host's memory. {'; '.join(elsewhere)}. "
                "SyncConfig(transport='auto') uses it for the servers that can, and a broadcast for the others"
            )
        if not self._segments.is_open:
            self.close()  # somebody has ended the process: its segments can't be opened any more
            self._segments.open()

    def stage(self, packed: PackedWeights, version: WeightVersion, report: SyncReport) -> None:
        """Gather, check and pack all buckets, or the first."""
        packed.stage()

    def open_session(
        self, clients: Sequence[SGLangClient], version: WeightVersion, deadline: float, report: SyncReport
    ) -> UpdateSession:
        """Pauses the servers. See :meth:`WeightTransport.open_session`."""
        return UpdateSession(
            self._pool, clients, version=version, config=self._config, deadline=deadline, report=report
        )

    def send(self, session: UpdateSession, packed: PackedWeights, deadline: float) -> None:
        """Make the servers read the buckets. See :meth:`WeightTransport.send`."""
        loop = TensorLoop(session.clients, self._pool.state, self, self._config, deadline)
        send_tensors(session, loop, packed)

    def sending(self, bucket: Bucket, flat: torch.Tensor, clients: Sequence[SGLangClient]) -> Mapping[str, list[str]]:
        """See :class:`~torchrl_sglang.weights.transports.tensor_loop.BucketPayloads`."""
        segment = self._segments.of(flat)
        checks = self._checks.check(clients)
        self._segments.expect(segment, [pid for each in clients for pid in _openers(each, checks[each.url])])
        payload = by_shared_memory(bucket, segment)
        return {client.url: [payload] * client.info.tp_size for client in clients}

    def answered(self, flat: torch.Tensor) -> None:
        """See :class:`~torchrl_sglang.weights.transports.tensor_loop.BucketPayloads`."""
        self._segments.answered(self._segments.of(flat))

    def close(self) -> None:
        """Remove the segments."""
        self._packer = None
        self._segments.close()
