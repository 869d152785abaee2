"""Weights to all servers, from whatever the trainer has: open, check, send, prove. The two flows meet in the pool."""

from __future__ import annotations

import logging
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import (
    ConfigError,
    ServerTimeoutError,
    SGLangError,
    WeightSyncError,
    WeightUpdateError,
)
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.dialect import MODEL_INFO
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.pending import PendingSync
from torchrl_sglang.weights.plan import gather_only, make_packing, make_plan
from torchrl_sglang.weights.source.factory import open_source
from torchrl_sglang.weights.source.interface import WeightSource
from torchrl_sglang.weights.source.shards import is_sharded, ranks_of
from torchrl_sglang.weights.transports.base import WeightTransport
from torchrl_sglang.weights.transports.broadcast import BroadcastTransport
from torchrl_sglang.weights.transports.disk import DiskTransport
from torchrl_sglang.weights.transports.lora import LoraTransport
from torchrl_sglang.weights.update.liveness import LivenessCheck
from torchrl_sglang.weights.update.report import SyncReport
from torchrl_sglang.weights.update.session import UpdateSession
from torchrl_sglang.weights.update.verification import compare_checksums, prove

__all__ = ["WeightSync"]

_log = logging.getLogger(__name__)


class WeightSync:
    """Keeps servers at a trainer's weights. One object per trainer; its process group lives from sync to sync.

    Args:
        pool: the servers.
        config: how weights travel.
        checkpoint: what the servers were started from; read from the served path when not given.
        restart: restarts the server at a URL and returns whether it is ours to restart
            (:meth:`AsyncSGLang.restart`); called for servers that are gone or stuck in a collective.

    Attributes:
        owner: id that this trainer writes into the servers' weight version.
        last_report: what the last successful sync did.
    """

    def __init__(
        self,
        pool: SGLangPool,
        config: SyncConfig | None = None,
        *,
        checkpoint: Checkpoint | None = None,
        restart: Callable[[str], bool] | None = None,
    ) -> None:
        self.owner = uuid.uuid4().hex[:8]
        self.last_report: SyncReport | None = None
        self._pool = pool
        self._config = config or SyncConfig()
        self._checkpoint = checkpoint
        self._transport: WeightTransport | None = None
        self._lora_transport = LoraTransport(pool, self.owner)
        self._full_sync_done = False
        self._liveness = LivenessCheck(pool, restart)
        self._sent_versions: dict[str, str] = {}
        self._last_weights: Any = None
        self._pending: PendingSync | None = None

    def connect(self) -> None:
        """Make ready what the first push would otherwise have to: read the checkpoint, make the process group.

        Raises:
            ConfigError: the servers can't take weights on this transport.
            WeightUpdateError: a server did not join.
        """
        with self._pool.update_lock:
            self.reach()
            self._choose_transport(self._read_checkpoint()).connect(self._reachable())

    def reach(self) -> None:
        """Ask the servers what they are, once; those that hang in an update whose trainer died are freed for it.

        Raises:
            ServerError: a server can't be reached, or hangs for another reason.
            ConfigError: the servers don't serve the same model.
        """
        deadline = time.monotonic() + self._config.group_timeout_s
        while True:
            try:
                self._pool.connect()
                return
            except ServerTimeoutError:
                freed = self._liveness.free_left_behind(self._pool.clients)
                if not freed or time.monotonic() > deadline:
                    raise

    def push(self, weights: Any, *, version: int | None = None, partial: bool = False) -> SyncReport | None:
        """Send weights to every server that can be reached, and return when they serve them.

        Under FSDP2 every rank calls this; the first one sends. A push under way in the background is waited for.

        Args:
            weights: a module, nested TensorDict, flat dict or iterator (see :func:`open_source`).
            version: number of the new version; ``None`` counts one up.
            partial: names that are not among ``weights`` keep what they have; otherwise a missing name is an error.

        Returns:
            What was done; ``None`` on ranks that only help to gather.

        Raises:
            ConfigError: weights nobody can read, or servers that can't take any.
            WeightCoverageError: names, shapes or values don't match; nothing was sent.
            WeightUpdateError: a server refused, died, hung or failed its proof; ``server_weights`` says what each
                server holds. The next push, with everything sent again, heals what can be healed.
        """
        self.wait()
        return self._push(weights, version, partial)

    def push_in_background(self, weights: Any, *, version: int | None = None) -> PendingSync:
        """Like :meth:`push`, but return at once: the next rollout may start while the weights travel.

        Requests that arrive meanwhile wait in the paused servers and are answered with the new weights. The trainer
        must leave its parameters alone until the push is done, and with a proof (``SyncConfig.verify``) not call the
        model either: it is asked for log-probs in evaluation mode.

        Returns:
            A handle; its :meth:`~PendingSync.result` raises what :meth:`push` would have raised. So does the next
            push, if nobody has asked the handle by then.

        Raises:
            ConfigError: the model is sharded; gathering it in a thread could cross the training's own collectives.
        """
        self.wait()
        if isinstance(weights, nn.Module) and is_sharded(weights):
            raise ConfigError("a sharded model can't be sent in the background: use push, or gather it first")
        self._pending = PendingSync(Task(lambda: self._push(weights, version, False), name="weight-sync"))
        return self._pending

    def wait(self) -> None:
        """Wait for a push under way in the background.

        Raises:
            SGLangError: it failed, and nobody has asked its handle.
        """
        pending, self._pending = self._pending, None
        if pending is not None and not pending.asked:
            pending.result()

    def _push(self, weights: Any, version: int | None, partial: bool) -> SyncReport | None:
        with self._pool.update_lock:  # a server that is just being started again is waited for
            report = self._push_now(weights, version, partial)
            if partial:
                self._pool.saved = None  # what a shared folder now holds of this version is not the whole of it
            return report

    def _push_now(self, weights: Any, version: int | None, partial: bool) -> SyncReport | None:
        start = time.monotonic()
        checkpoint = self._connect_all_ranks(weights)
        if self._config.transport == "lora":
            return self._push_adapter(weights, version, start)
        source = open_source(weights, checkpoint, name_map=self._config.name_map, ignore=self._config.ignore)
        if not source.is_sender:
            gather_only(source, self._plan(source, checkpoint, partial))
            return None
        try:
            clients = self._reachable()
            if partial or self._config.only_trainable:
                self._require_ours(clients, partial)
            transport = self._choose_transport(checkpoint)
            transport.connect(clients)
        except SGLangError as error:
            if isinstance(error, WeightSyncError):
                self._liveness.remember_stuck(error)
                self._liveness.describe_the_others(error)
            if source.is_sharded:  # the other ranks wait for us to gather with them
                gather_only(source, self._plan(source, checkpoint, partial))
            raise
        plan = self._plan(source, checkpoint, partial)
        number = self._next_number() if version is None else version
        deadline = time.monotonic() + self._config.deadline_s(
            sum(bucket.nbytes for bucket in plan) or checkpoint.nbytes
        )
        packing = make_packing(source, checkpoint, self._config, plan, served_dtype=self._served_dtype(checkpoint))
        self._last_weights = None if source.one_shot else weights
        try:
            session = transport.send(
                clients,
                packing,
                WeightVersion(number=number, owner=self.owner),
                deadline,
                num_buckets=None if source.one_shot else len(plan),
            )
            gap = self._prove(transport, clients, source, session)
        except WeightSyncError as error:
            self._liveness.remember_stuck(error)
            self._full_sync_done = False
            self._put_to_use([url for url, state in error.server_weights.items() if state == "new"], number)
            raise
        self._put_to_use([client.url for client in clients], number)
        self._full_sync_done = True
        self.last_report = SyncReport(
            version=number,
            transport=transport.name,
            num_bytes=session.num_bytes,
            num_tensors=session.num_tensors,
            num_buckets=session.num_buckets,
            pause=session.pause_mode,
            seconds=dict(session.seconds),
            generation_paused_s=session.generation_paused_s,
            total_s=time.monotonic() - start,
            max_logprob_gap=gap,
            server_weights=dict(session.server_weights),
        )
        _log.info("weights %d on %d servers in %.3f s", number, len(clients), self.last_report.total_s)
        return self.last_report

    def _next_number(self) -> int:
        """No number names two different weights, not even one whose update failed."""
        return max(self._pool.weight_version, self._pool.highest_version) + 1

    def _connect_all_ranks(self, weights: Any) -> Checkpoint:
        """Reach the servers and read their checkpoint. Ranks of a sharded model fail alike: none is left gathering."""
        ranks = ranks_of(weights.parameters()) if isinstance(weights, nn.Module) else None
        try:
            self.reach()
            self._pool.refuse_while_offloaded()
            checkpoint = self._read_checkpoint()
            _refuse_quantised_online(self._pool.clients, checkpoint)
        except SGLangError:
            if ranks is not None:
                ranks.any([True])
            raise
        if ranks is not None and ranks.any([False])[0]:
            raise WeightUpdateError("another rank could not reach the servers or read their checkpoint; it says why")
        return checkpoint

    def _push_adapter(self, weights: Any, version: int | None, start: float) -> SyncReport:
        clients = self._reachable()
        number = self._next_number() if version is None else version
        self.last_report = self._lora_transport.push(
            clients, weights, WeightVersion(number=number, owner=self.owner), self._config, start
        )
        self._last_weights = weights
        self._put_to_use([client.url for client in clients], number)
        return self.last_report

    def heal(self) -> SyncReport | None:
        """Send the weights of the last push again, to every server: for after a failure, or a server's return.

        Raises:
            ConfigError: nothing was pushed yet, or it came as an iterator that can't be read twice.
            WeightUpdateError: as :meth:`push`.
        """
        if self._last_weights is None:
            raise ConfigError("there are no weights to send again: push(model) them")
        return self.push(self._last_weights)

    def close(self) -> None:
        """Take the process group down, after a push under way has ended; the servers go on serving."""
        if self._pending is not None:
            self._pending.join()
        if self._transport is not None:
            self._transport.close()
        self._last_weights = None

    # ------------------------------------------------------------------ what goes over

    def _read_checkpoint(self) -> Checkpoint:
        if self._checkpoint is None:
            self._checkpoint = Checkpoint.read(self._pool.info.model_path)
        return self._checkpoint

    def _plan(self, source: WeightSource, checkpoint: Checkpoint, partial: bool) -> list[Bucket]:
        return make_plan(
            source,
            checkpoint,
            self._config,
            served_dtype=self._served_dtype(checkpoint),
            server=self._pool.clients[0].url,
            partial=partial,
            skip_frozen=self._may_skip_frozen(source),
        )

    def _may_skip_frozen(self, source: WeightSource) -> bool:
        """Only where every server is known to hold this trainer's frozen tensors.

        Never for a sharded model: the ranks that help to gather don't learn of a server's failure, and all ranks have
        to gather the same tensors. Never on the disk transport, whose checkpoints are whole.
        """
        wanted = (
            self._config.only_trainable and not source.is_sharded and not isinstance(self._transport, DiskTransport)
        )
        return wanted and self._full_sync_done and not self._pool.quarantined

    def _served_dtype(self, checkpoint: Checkpoint) -> torch.dtype | None:
        dtype = getattr(torch, self._pool.info.dtype, None)
        return dtype if isinstance(dtype, torch.dtype) else checkpoint.dtype

    # ------------------------------------------------------------------ where it goes

    def _choose_transport(self, checkpoint: Checkpoint) -> WeightTransport:
        if self._transport is None:
            several_inside = any(client.info.dp_size * client.info.pp_size > 1 for client in self._pool.clients)
            by_disk = self._config.transport == "disk" or (several_inside and self._config.disk_dir is not None)
            if by_disk and self._config.transport != "broadcast":
                self._transport = DiskTransport(self._pool, self._config, checkpoint.path)
            else:
                self._transport = BroadcastTransport(self._pool, self._config, self.owner)
                # Also runs at exit, while sockets and threads still work: a scheme held by a collector is only
                # collected after that.
                weakref.finalize(self, self._transport.close)
        return self._transport

    def _reachable(self) -> list[SGLangClient]:
        clients = self._liveness.reachable()
        if self._liveness.restarted:
            self._full_sync_done = False  # they need the frozen tensors too
            if self._transport is not None:
                self._transport.drop()  # at the same address, but no longer in the group
        return clients

    def _require_ours(self, clients: Sequence[SGLangClient], partial: bool) -> None:
        """Some tensors only are to be sent: the others must be on every server, and as this trainer knows them.

        Raises:
            ConfigError: they aren't, and the caller has no others to send.
        """
        for client in clients:
            held = str(client.send(MODEL_INFO)["weight_version"])
            if (
                held == self._sent_versions.get(client.url, client.info.weight_version)
                and not WeightVersion.parse(held).dirty
            ):
                continue
            self._full_sync_done = False
            if partial:
                raise ConfigError(
                    f"{client.url} holds version {held!r}, which this trainer did not send: push all weights first"
                )

    # ------------------------------------------------------------------ what came out

    def _put_to_use(self, urls: Sequence[str], number: int) -> None:
        """Servers that hold all of version ``number``; in a failed sync these may be some of them only."""
        for url in urls:
            self._pool.restore(url)
            self._sent_versions[url] = str(WeightVersion(number=number, owner=self.owner))
        if urls:
            self._pool.weight_version = number

    def _prove(
        self, transport: WeightTransport, clients: Sequence[SGLangClient], source: WeightSource, session: UpdateSession
    ) -> float | None:
        vocab_size = self._pool.vocab_size
        if self._config.verify == "off" or vocab_size is None:
            return None
        start = time.monotonic()
        served = self._served_dtype(self._read_checkpoint())
        model = source.module if _can_be_asked(source) else None
        exact = served == torch.float32 and (model is None or next(model.parameters()).dtype == torch.float32)
        try:
            gap = prove(clients, vocab_size=vocab_size, model=model, config=self._config, exact=exact)
            if self._config.verify == "full":
                compare_checksums(clients)
        except WeightUpdateError as error:
            self._withdraw(clients, error, session)
            transport.close()
            raise
        session.seconds["prove"] = time.monotonic() - start
        return gap

    def _withdraw(self, clients: Sequence[SGLangClient], error: WeightUpdateError, session: UpdateSession) -> None:
        """Take servers that failed their proof out of service again."""
        failed = set(error.server_weights)
        for client in clients:
            if client.url in failed:
                self._pool.quarantine(client.url, f"it failed its proof ({error})")
                session.withdraw(client)
        error.server_weights.update(session.server_weights)


def _refuse_quantised_online(clients: Sequence[SGLangClient], checkpoint: Checkpoint) -> None:
    for client in clients:
        if client.info.quantization is not None and checkpoint.quantization is None:
            raise ConfigError(
                f"{client.url} quantises its weights while loading (--quantization {client.info.quantization}): what "
                "it would make of new ones can't be checked. Serve a checkpoint that is quantised already, or none"
            )


def _can_be_asked(source: WeightSource) -> bool:
    """A sharded model computes only when all ranks call it, which they don't do here."""
    return source.module is not None and not is_sharded(source.module)
