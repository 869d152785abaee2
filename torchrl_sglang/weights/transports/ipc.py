"""Transport ``ipc``: servers on this host read the buckets from memory that the trainer shares with them.

Main memory is shared as named segments, which a server's ranks open and close with each request. Buckets that are
packed on a GPU are shared by the handles of its buffers, if every rank sees that GPU (written, not run on a GPU). No
process group is formed and no rank waits for the trainer: if that is killed at any point, the servers answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import PoolState, SGLangPool
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.shared_memory.gpus import can_open_gpu_memory
from torchrl_sglang.weights.shared_memory.keeper import SHARED_MEMORY
from torchrl_sglang.weights.shared_memory.room import available_bytes
from torchrl_sglang.weights.shared_memory.same_host import HostCheck, check_same_host
from torchrl_sglang.weights.shared_memory.segments import SegmentPool
from torchrl_sglang.weights.transports.base import PackedWeights
from torchrl_sglang.weights.transports.replicas import require_one_replica
from torchrl_sglang.weights.transports.tensor_loop import TensorLoop, send_tensors
from torchrl_sglang.weights.transports.tensor_payload import by_cuda_handle, by_shared_memory, share_cuda_buffer
from torchrl_sglang.weights.update.report import SyncReport
from torchrl_sglang.weights.update.session import UpdateSession

__all__ = ["HostChecks", "IpcTransport"]


class HostChecks:
    """Which servers share this host's memory; each server's process is checked once.

    Args:
        state: the pool's records, which know of replaced processes.
    """

    def __init__(self, state: PoolState) -> None:
        self._state = state
        self._known: dict[tuple[str, int], HostCheck] = {}

    def check(self, clients: Sequence[SGLangClient]) -> dict[str, HostCheck]:
        """The result per server URL."""
        keys = {client.url: (client.url, self._state.server(client.url).restarts) for client in clients}
        unknown = [client for client in clients if not self._is_known(keys[client.url])]
        if unknown:
            outcomes = side_by_side({client.url: partial(_check, client) for client in unknown})
            self._known |= {keys[url]: outcome.unwrap() for url, outcome in outcomes.items()}
        return {url: self._known[key] for url, key in keys.items()}

    def _is_known(self, key: tuple[str, int]) -> bool:
        check = self._known.get(key)
        return check is not None and (check.still_holds() if check.is_shared else not check.may_change)


def _check(client: SGLangClient) -> HostCheck:
    num_nodes = client.info.raw.get("nnodes")
    if isinstance(num_nodes, int) and num_nodes > 1:
        return HostCheck(reason=f"its ranks are on several hosts (nnodes={num_nodes})")
    return check_same_host(client.url)


def _openers(client: SGLangClient, check: HostCheck) -> list[int]:
    """The processes that open a segment when a server is told to, each as often as it has ranks."""
    pids = [process.pid for process in check.schedulers]
    return pids * max(1, client.info.tp_size // len(pids))


class IpcTransport:
    """Sends weights through memory that is shared with the servers' processes.

    Two buffers, or one per bucket if everything is staged, are kept from one sync to the next, and none is written to
    before every server has answered that it has loaded it. After a failure they are given up: a server that was told of
    one may still open it.

    Args:
        pool: the servers.
        config: bucket size and time-outs.
        checks: which servers share this host's memory.
        may_lack_room: where ``/dev/shm`` has no room, pack into memory of this process, and say so (:attr:`no_room`).
    """

    name = "ipc"

    def __init__(
        self, pool: SGLangPool, config: SyncConfig, checks: HostChecks | None = None, *, may_lack_room: bool = False
    ) -> None:
        self._pool = pool
        self._config = config
        self._checks = checks or HostChecks(pool.state)
        self._segments = SegmentPool(may_lack_room=may_lack_room)
        self._packer: BucketPacker | None = None
        self._openers: dict[str, list[int]] = {}
        self._shares_gpus = False
        self._gpu_handles: dict[int, tuple[Any, ...]] = {}

    @property
    def packer(self) -> BucketPacker:
        """Packs buckets in shared memory: where the weights are, unless a server does not see that GPU."""
        if self._packer is None:
            device = None if self._shares_gpus else "cpu"
            self._packer = BucketPacker(device, allocate=self._segments.make, discard=self._give_up)
        return self._packer

    def why_no_room(self, checkpoint: Checkpoint) -> str:
        """Why ``/dev/shm`` can't hold two buckets; empty if it can. A container has 64 MB of it by default."""
        if self._segments.names:
            return ""
        bucket_bytes = max(self._config.bucket_size(checkpoint.nbytes), checkpoint.largest_nbytes)
        needed = min(2 * bucket_bytes, checkpoint.nbytes)
        room = available_bytes([SHARED_MEMORY])
        if needed <= room:
            return ""
        return f"{SHARED_MEMORY} has room for {room / 1e6:.1f} MB, and two buckets need {needed / 1e6:.1f} MB"

    @property
    def no_room(self) -> str:
        """Why some of what was packed can't be opened by servers; empty if all can."""
        return self._segments.no_room

    def connect(self, clients: Sequence[SGLangClient], *, in_main_memory: bool = False) -> None:
        """Check that the servers can open this process's memory, and start the process that removes its segments.

        Args:
            clients: the servers.
            in_main_memory: pack there, although every server may see the GPU: the buckets have another use too.

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
        self._openers = {client.url: _openers(client, checks[client.url]) for client in clients}
        shares_gpus = (
            not in_main_memory
            and torch.cuda.is_available()
            and all(client.info.device == "cuda" for client in clients)
            and all(can_open_gpu_memory(pid) for pids in self._openers.values() for pid in pids)
        )
        if shares_gpus != self._shares_gpus:
            self.close()
            self._shares_gpus = shares_gpus
        if not self._segments.is_open:
            self.close()  # somebody has ended the process: its segments can't be opened any more
            self._segments.open()

    def stage(self, packed: PackedWeights, version: WeightVersion, report: SyncReport) -> None:
        """Gather, check and pack all buckets, or the first.

        Raises:
            ConfigError: a GPU's memory can't be shared.
        """
        packed.stage()
        for buffer in self.packer.buffers:
            if buffer.is_cuda:
                self._handle_of(buffer)

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

    def sending(self, bucket: Bucket, flat: torch.Tensor, clients: Sequence[SGLangClient]) -> Mapping[str, list[bytes]]:
        """See :class:`~torchrl_sglang.weights.transports.tensor_loop.BucketPayloads`."""
        if flat.is_cuda:
            payload = by_cuda_handle(bucket, self._handle_of(flat))
            return {client.url: [payload] * client.info.tp_size for client in clients}
        segment = self._segments.of(flat)
        self._segments.expect(segment, [pid for client in clients for pid in self._openers[client.url]])
        payload = by_shared_memory(bucket, segment)
        return {client.url: [payload] * client.info.tp_size for client in clients}

    def answered(self, flat: torch.Tensor) -> None:
        """See :class:`~torchrl_sglang.weights.transports.tensor_loop.BucketPayloads`."""
        if not flat.is_cuda:
            self._segments.answered(self._segments.of(flat))

    def _handle_of(self, buffer: torch.Tensor) -> tuple[Any, ...]:
        """What servers need to open a buffer on a GPU; asked for once, since torch counts every time."""
        address = buffer.data_ptr()
        if address not in self._gpu_handles:
            try:
                self._gpu_handles[address] = share_cuda_buffer(buffer)
            except RuntimeError as error:
                raise ConfigError(
                    f"memory of {buffer.device} can't be shared with other processes ({error}): "
                    "SyncConfig(transport='broadcast') or 'disk' does not need that"
                ) from error
        return self._gpu_handles[address]

    def _give_up(self, buffer: torch.Tensor) -> None:
        self._gpu_handles.pop(buffer.data_ptr(), None)
        if not buffer.is_cuda:
            self._segments.discard(buffer)

    def close(self) -> None:
        """Remove the segments."""
        self._packer = None
        self._gpu_handles.clear()
        self._segments.close()
