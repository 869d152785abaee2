"""Transport ``auto``: ``ipc`` for the servers that share this host's memory, ``broadcast`` for the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError, SGLangError, StorageError, WeightUpdateError
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.group.process_group import choose_backend
from torchrl_sglang.weights.transports.base import PackedWeights
from torchrl_sglang.weights.transports.broadcast import BroadcastTransport
from torchrl_sglang.weights.transports.bucket_tee import BucketTee
from torchrl_sglang.weights.transports.ipc import HostChecks, IpcTransport
from torchrl_sglang.weights.transports.replicas import require_one_replica
from torchrl_sglang.weights.transports.tensor_loop import TensorLoop
from torchrl_sglang.weights.update.report import SyncReport
from torchrl_sglang.weights.update.session import UpdateSession

__all__ = ["AutoTransport", "TransportChoice"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """The transport of one server.

    Attributes:
        transport: ``"ipc"`` or ``"broadcast"``.
        reason: why.
    """

    transport: str
    reason: str


class AutoTransport:
    """Sends weights to each server by the transport that suits it, in one update of all servers.

    The choice is made for each update, since servers come and go. Where ``/dev/shm`` turns out to have less room than
    it says, all servers get a broadcast, in that update and in all later ones.

    Args:
        pool: the servers.
        config: settings of both transports.
        owner: id of this trainer.
        checkpoint: what the servers were started from.

    Attributes:
        choices: per server URL its transport and the reason; filled by :meth:`connect`.
    """

    def __init__(self, pool: SGLangPool, config: SyncConfig, owner: str, checkpoint: Checkpoint) -> None:
        self.choices: dict[str, TransportChoice] = {}
        self._pool = pool
        self._config = config
        self._checkpoint = checkpoint
        self._no_room = ""
        self._checks = HostChecks(pool.state)
        self._ipc = IpcTransport(pool, config, self._checks, may_lack_room=True)
        self._broadcast = BroadcastTransport(pool, config, owner, checkpoint)

    @property
    def name(self) -> str:
        """``"ipc"``, ``"broadcast"``, or ``"ipc+broadcast"`` where the servers differ; ``"auto"`` until it is known."""
        return "+".join(name for name in ("ipc", "broadcast") if self._has(name)) or "auto"

    @property
    def packer(self) -> BucketPacker:
        """The packer of ``ipc``, whose buffers can be broadcast too, unless nothing goes that way."""
        return self._ipc.packer if self._has("ipc") else self._broadcast.packer

    @property
    def num_copies(self) -> int:
        """How often the trainer sends every byte."""
        return self._has("ipc") + (self._broadcast.num_copies if self._has("broadcast") else 0)

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Choose, and prepare what was chosen.

        Raises:
            ConfigError: a server can take weights by neither transport.
            WeightUpdateError: a server did not join the process group.
        """
        require_one_replica(clients)
        self.choices = self._choose(clients)
        near, far = self._divided(clients)
        if near:
            try:
                self._ipc.connect(near, in_main_memory=bool(far))  # from where gloo broadcasts them too
            except ConfigError as error:
                self._give_up_ipc(str(error))
                near, far = [], list(clients)
        if not near:
            self._ipc.close()
        if far:
            self._broadcast.connect(far)
        else:
            self._broadcast.close()

    def _divided(self, clients: Sequence[SGLangClient]) -> tuple[list[SGLangClient], list[SGLangClient]]:
        """Those that share memory, and the others."""
        near = [client for client in clients if self.choices[client.url].transport == "ipc"]
        return near, [client for client in clients if client not in near]

    def _give_up_ipc(self, reason: str) -> None:
        """No memory can be shared here: choose a broadcast for all servers."""
        _log.warning("weights go to all servers by broadcast: %s", reason)
        self.choices = {
            url: TransportChoice("broadcast", reason) if choice.transport == "ipc" else choice
            for url, choice in self.choices.items()
        }

    def _choose(self, clients: Sequence[SGLangClient]) -> dict[str, TransportChoice]:
        checks = self._checks.check(clients)
        no_room = self._no_room or self._ipc.why_no_room(self._checkpoint)
        choices = {
            url: TransportChoice("ipc", "it shares this host's memory")
            if check.is_shared and not no_room
            else TransportChoice("broadcast", check.reason or no_room)
            for url, check in checks.items()
        }
        far = [client for client in clients if choices[client.url].transport == "broadcast"]
        if 0 < len(far) < len(clients) and choose_backend(self._config, far) != "gloo":
            # An NCCL broadcast needs the buckets on a GPU, and not every server here can open this process's GPU.
            reason = "other servers need an NCCL broadcast, and one set of buckets serves all"
            choices = {
                url: TransportChoice("broadcast", reason) if choice.transport == "ipc" else choice
                for url, choice in choices.items()
            }
        return choices

    def stage(self, packed: PackedWeights, version: WeightVersion, report: SyncReport) -> None:
        """Gather, check and pack all buckets, or the first.

        ``/dev/shm`` may have less room than it says, because of a quota or another program. Then the buckets lie in
        this process's own memory, from where they are broadcast.

        Raises:
            StorageError: that is so, and NCCL can't broadcast from there. The next update packs for it.
        """
        packed.stage()
        self._no_room = self._no_room or self._ipc.no_room
        if not self._ipc.no_room:
            return
        clients = [client for client in self._pool.clients if client.url in self.choices]
        self._give_up_ipc(self._no_room)
        self._ipc.close()
        if choose_backend(self._config, clients) != "gloo":
            raise StorageError(f"{self._no_room}. Nothing was sent; the next sync uses a broadcast")
        self._broadcast.connect(clients)

    def open_session(
        self, clients: Sequence[SGLangClient], version: WeightVersion, deadline: float, report: SyncReport
    ) -> UpdateSession:
        """Pauses the servers. See :meth:`WeightTransport.open_session`."""
        transport = self._broadcast if self._has("broadcast") else self._ipc
        return transport.open_session(clients, version, deadline, report)

    def send(self, session: UpdateSession, packed: PackedWeights, deadline: float) -> None:
        """Send the buckets by the chosen transports. See :meth:`WeightTransport.send`."""
        if self.name != "ipc+broadcast":
            (self._ipc if self._has("ipc") else self._broadcast).send(session, packed, deadline)
            return
        session.begin()
        flush = session.flushes and packed.num_buckets is not None
        with session.report.phase("transfer"):
            failed = self._send_both(session, packed, deadline, flush=flush)
        session.received(flushed=flush and session.report.num_buckets > 0, failed=failed)

    def _send_both(
        self, session: UpdateSession, packed: PackedWeights, deadline: float, *, flush: bool
    ) -> Mapping[str, SGLangError]:
        """Run both senders side by side; a failure of one leaves the other's servers with the new weights.

        Raises:
            WeightUpdateError: every server has failed.
        """
        near, far = self._divided(session.clients)
        tee = BucketTee(packed, 2)
        to_near, to_far = tee.reader(), tee.reader()
        tensors = TensorLoop(near, self._pool.state, self._ipc, self._config, deadline)
        buckets = self._broadcast.bucket_loop(deadline)
        num_buckets = packed.num_buckets

        def send_near() -> None:
            try:
                tensors.run(to_near, num_buckets=num_buckets, flush_cache=flush)
            finally:
                tee.leave(0)

        sending = Task(send_near, name="sglang-ipc")
        failed: dict[str, SGLangError] = {}
        try:
            failed |= buckets.run(to_far, num_buckets=num_buckets, flush_cache=flush)
        except WeightUpdateError as error:
            failed |= {client.url: error for client in far}
        except BaseException as error:
            tee.stop(error)
            raise
        finally:
            tee.leave(1)
        refused = sending.outcome().error
        failed |= {client.url: refused for client in near} if refused is not None else {}
        failed |= tensors.failed  # names each server's own error
        if len(failed) == len(session.clients):
            raise next(iter(failed.values()))
        return failed

    def close(self) -> None:
        """Destroy the groups and remove the segments."""
        self._no_room = self._no_room or self._ipc.no_room  # it may have turned out in the middle of an update
        self._ipc.close()
        self._broadcast.close()

    def _has(self, transport: str) -> bool:
        return any(choice.transport == transport for choice in self.choices.values())
