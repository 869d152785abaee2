"""One push: a trainer's opened weights are checked, packed, sent to the servers and verified there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial as bind
from typing import Any

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError, WeightSyncError, WeightUpdateError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import ServerState, SGLangPool
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.checksums.verifier import ChecksumVerifier, PushChecksums
from torchrl_sglang.weights.held_weights import HeldWeights
from torchrl_sglang.weights.newcomers import NewcomerUpdates
from torchrl_sglang.weights.planning import PushPlanner
from torchrl_sglang.weights.source.interface import WeightSource
from torchrl_sglang.weights.source.shards import Ranks, together
from torchrl_sglang.weights.transports.base import PackedWeights, TransportSession, WeightTransport
from torchrl_sglang.weights.transports.choice import num_copies
from torchrl_sglang.weights.transports.staging import bucket_bytes, is_staged
from torchrl_sglang.weights.update.liveness import LivenessCheck
from torchrl_sglang.weights.update.other_trainers import OtherTrainers
from torchrl_sglang.weights.update.report import SyncReport
from torchrl_sglang.weights.update.verification import Probe, verify_servers

__all__ = ["OpenedWeights", "Pusher"]

_PREPARING, _READING_CHECKSUMS = "preparing the servers", "reading the servers' checksums"
"""What the sending rank does between two agreements of all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedWeights:
    """What the caller of a push gave.

    Attributes:
        weights: the trainer's object.
        source: the same as named tensors.
        ranks: those that hold its shards; ``None`` if it is not sharded.
        partial: names that it lacks keep what they have.
    """

    weights: Any
    source: WeightSource
    ranks: Ranks | None
    partial: bool

    @property
    def to_send_again(self) -> Any:
        """``weights``, or ``None`` if they are only a part, or an iterator that is used up."""
        return None if self.partial or self.source.one_shot else self.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A push of which nothing is packed or sent yet.

    Attributes:
        clients: the servers that it goes to.
        version: what the weights are called.
        packed: the buckets, packed on demand.
        num_bytes: how much is sent to each server.
        num_buckets: in how many buckets.
        checksums: what is compared afterwards, if anything is.
        probe: the prompt that is scored afterwards, if one is.
        report: counts and phases of this push.
    """

    clients: list[SGLangClient]
    version: WeightVersion
    packed: PackedWeights
    num_bytes: int
    num_buckets: int
    checksums: PushChecksums | None
    probe: Probe | None
    report: SyncReport


class Pusher:
    """Does the pushes of one :class:`WeightSync`, under the pool's update lock.

    Args:
        pool: the servers.
        config: how weights travel.
        owner: id of this trainer.
        planner: plans what is sent.
        liveness: finds the servers that can be reached.
        others: ends what dead trainers have left.
        newcomers: what servers that join later get.

    Attributes:
        last_weights: what was pushed last, to be sent again by :meth:`WeightSync.heal`; ``None`` if it can't be.
    """

    def __init__(
        self,
        pool: SGLangPool,
        config: SyncConfig,
        owner: str,
        *,
        planner: PushPlanner,
        liveness: LivenessCheck,
        others: OtherTrainers,
        newcomers: NewcomerUpdates,
    ) -> None:
        self.last_weights: Any = None
        self._pool = pool
        self._config = config
        self._owner = owner
        self._planner = planner
        self._liveness = liveness
        self._others = others
        self._newcomers = newcomers
        self._checksums = ChecksumVerifier(pool.state, config)
        self._held = HeldWeights(pool, owner)

    def push(self, opened: OpenedWeights, transport: WeightTransport[Any], version: int | None) -> SyncReport | None:
        """See :meth:`WeightSync.push`; the report lacks the total time."""
        source = opened.source
        if not source.is_sender:
            self.last_weights = opened.to_send_again  # every rank calls heal()
            self._help(opened, transport)
            return None
        prepared = self._prepare(opened, transport, version)
        updated = self._update(opened, transport, prepared)
        self._serve(prepared.clients, prepared.version, updated)
        prepared.report.server_weights = {url: state.weights for url, state in updated.items()}
        if opened.to_send_again is not None:
            self._newcomers.remember(opened.weights, prepared.version)
        return prepared.report

    # ------------------------------------------------------------------ before anything is sent

    def require_not_older(self, version: int | None) -> None:
        """A version must not be lower than one that this pool's servers got before.

        Only numbers that grow tell which weights made a response, and whether a server has lost what it was sent.

        Raises:
            ConfigError: it is lower.
        """
        given = self._pool.state.weights.highest_version
        if version is not None and version < given:
            raise ConfigError(
                f"version {version} is lower than {given}, which these servers have been given: the responses of both "
                "could not be told apart by age. Nothing was sent. Leave version out, which takes the next one "
                f"({self._pool.state.weights.next_version}), also for weights of an earlier checkpoint. A trainer that "
                "starts anew may begin with any number"
            )

    def _prepare(self, opened: OpenedWeights, transport: WeightTransport[Any], version: int | None) -> _Prepared:
        source, partial = opened.source, opened.partial
        number = self._pool.state.weights.next_version if version is None else int(version)
        report = SyncReport(version=number, transport=transport.name)
        with report.phase("prepare"):
            with together(opened.ranks, _PREPARING):
                self.require_not_older(version)
                clients = self._connect(transport, partial)
            size = self._bucket_bytes(source, transport)
            plan = self._planner.plan(source, partial=partial, transport=transport.name, bucket_bytes=size)
            report.transport = transport.name  # "auto" has chosen
            report.is_staged = is_staged(self._config, transport, self._planner.num_bytes(plan))
            values = self._planner.check_values(source, plan, while_packing=report.is_staged)
            with together(opened.ranks, _READING_CHECKSUMS):
                checksums = self._begin_checksums(clients, source, self._planner.expected_plan(source, plan, size))
        self.last_weights = opened.to_send_again
        self._newcomers.forget()
        packed = self._planner.pack(
            source,
            plan,
            transport.packer,
            report,
            None if checksums is None else checksums.take,
            bucket_bytes=size,
            is_staged=report.is_staged,
            values=values,
        )
        num_bytes = self._planner.num_bytes(plan)
        return _Prepared(
            clients=clients,
            version=WeightVersion(number=number, owner=self._owner),
            packed=packed,
            num_bytes=num_bytes,
            num_buckets=len(plan) or 1 + num_bytes // self._config.bucket_size(num_bytes),  # no plan: read only once
            checksums=checksums,
            probe=None
            if self._config.verify == "off"
            else Probe(clients, self._pool.vocab_size, source, has_experts=self._planner.checkpoint.has_experts),
            report=report,
        )

    def _help(self, opened: OpenedWeights, transport: WeightTransport[Any]) -> None:
        """Gather with the sending rank, which goes through the same collectives in :meth:`_prepare`."""
        source = opened.source
        with together(opened.ranks, _PREPARING):
            pass
        size = self._bucket_bytes(source, transport)
        plan = self._planner.plan(source, partial=opened.partial, transport=transport.name, bucket_bytes=size)
        self._planner.check_values(source, plan, while_packing=False)
        with together(opened.ranks, _READING_CHECKSUMS):
            pass
        self._planner.gather_only(source, plan)

    def _bucket_bytes(self, source: WeightSource, transport: WeightTransport[Any]) -> int:
        """Most bytes per bucket; the ranks of a sharded source, which gather in the order of the buckets, know it."""
        nbytes = self._planner.checkpoint.nbytes
        return self._config.bucket_size(nbytes) if source.is_sharded else bucket_bytes(self._config, transport, nbytes)

    def _connect(self, transport: WeightTransport[Any], partial: bool) -> list[SGLangClient]:
        """The servers that this push goes to, connected by the transport."""
        try:
            patience_s = self._config.deadline_s(self._planner.checkpoint.nbytes)
            self._others.end_dead_updates(self._liveness.answering, patience_s)
            clients = self._liveness.reachable()
            if partial:  # a newcomer needs all tensors: it waits for a push of all
                servers = self._pool.state.servers
                clients = [client for client in clients if servers[client.url].phase != "joining"]
            self._held.begin(clients)
            if partial or self._config.only_trainable:
                self._held.require_own(clients, partial=partial)
            transport.connect(clients)
        except WeightSyncError as error:
            self._liveness.record_failure(error)
            raise
        return clients

    def _begin_checksums(
        self, clients: Sequence[SGLangClient], source: WeightSource, plan: Sequence[Bucket]
    ) -> PushChecksums | None:
        """Choose what to verify by checksums; ``None`` for an adapter, which changes none of the servers' tensors."""
        if self._config.verify == "off" or source.peft_config is not None:
            return None
        planner = self._planner
        checksums = self._checksums.begin(clients, planner.checkpoint, source, plan, planner.served_dtype)
        checksums.read_before()
        return checksums

    # ------------------------------------------------------------------ the update

    def _update(
        self, opened: OpenedWeights, transport: WeightTransport[Any], prepared: _Prepared
    ) -> dict[str, ServerState]:
        """Send and verify; returns what is known of each server, by URL."""
        clients, state, start = prepared.clients, self._pool.state, time.monotonic()
        incomplete = self._held.incomplete(clients) if opened.partial else []
        leaves_out = opened.partial or self._config.only_trainable
        require = self._held.require_same_processes if leaves_out else None
        updated: dict[str, ServerState] = {}
        try:
            session = self._send(transport, prepared, start, require)
            for client in incomplete:
                state.incomplete_found(client.url)
            updated = {client.url: state.server(client.url) for client in clients}
            self._verify(opened.source, session, prepared)
        except BaseException as error:
            transport.close()  # servers that have received everything are still in a group
            if isinstance(error, WeightSyncError):
                new = [client for client in clients if error.server_weights.get(client.url) == "new"]
                self._serve(new, prepared.version, updated)
            for client in clients:
                state.verification_ended(client.url)
            raise
        finally:
            if prepared.probe is not None:
                prepared.probe.end()
        return updated

    def _send(
        self,
        transport: WeightTransport[Any],
        prepared: _Prepared,
        start: float,
        require: Callable[[], None] | None,
    ) -> TransportSession:
        """One update on the servers, without verification; returns its finished session. ``require`` may refuse it."""
        packed, report = prepared.packed, prepared.report
        session: TransportSession
        try:
            with report.phase("prepare"):
                self._stage(transport, prepared)
            report.transport = transport.name  # "auto" may have changed its mind
            if prepared.probe is not None and report.is_staged and transport.name == "ipc":
                prepared.probe.start()  # this process only waits until the servers have loaded everything
            deadline = start + self._limit_s(prepared, transport)
            session = transport.open_session(prepared.clients, prepared.version, deadline, report)
            if require is not None:
                require()  # the session knows the servers' processes
            with session:
                transport.send(session, packed, deadline)
        finally:
            packed.close()  # however this ended, the other ranks of a sharded source go on
        return session

    def _stage(self, transport: WeightTransport[Any], prepared: _Prepared) -> None:
        try:
            transport.stage(prepared.packed, prepared.version, prepared.report)
        except WeightUpdateError as error:  # a server did not join the groups that were needed after all
            self._liveness.record_failure(error)
            raise

    def _limit_s(self, prepared: _Prepared, transport: WeightTransport[Any]) -> float:
        """How long the update may take, in seconds."""
        num_servers = len(prepared.clients)
        num_bytes = prepared.num_bytes * num_copies(transport, num_servers)
        return self._config.deadline_s(num_bytes, prepared.num_buckets * num_servers)

    def _verify(self, source: WeightSource, session: TransportSession, prepared: _Prepared) -> None:
        """Require that every server holds what was sent and answers as the trainer's model.

        Raises:
            WeightUpdateError: one does not; the session has put it back or taken it out of service.
        """
        if prepared.probe is None:
            return
        try:
            with prepared.report.phase("verify"):
                verify_servers(
                    prepared.clients,
                    probe=prepared.probe,
                    source=source,
                    config=self._config,
                    served_dtype=self._planner.served_dtype,
                    checksums=prepared.checksums,
                    report=prepared.report,
                    lora=session.adapter,
                )
        except WeightUpdateError as error:
            session.reject(error)
            raise

    def _serve(self, clients: Sequence[SGLangClient], version: WeightVersion, found: Mapping[str, ServerState]) -> None:
        """Route requests to servers that hold all of a version."""
        known = found or self._pool.state.servers
        calls = {each.url: bind(self._pool.restore, each.url, based_on=known[each.url]) for each in clients}
        for outcome in side_by_side(calls).values():  # a router checks each server before it admits it
            outcome.unwrap()
        if clients:
            self._pool.state.weights_served(version)
