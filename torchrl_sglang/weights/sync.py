"""A pool's one weight sync: what engine, scheme and user code call to send a trainer's weights to its servers."""

from __future__ import annotations

import logging
import os
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.config.checking import require_number
from torchrl_sglang.errors import ConfigError, ServerTimeoutError, WeightSyncError, WeightUpdateError
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.group.trainer_mark import TrainerMark
from torchrl_sglang.weights.newcomers import NewcomerUpdates
from torchrl_sglang.weights.pending_sync import PendingSync
from torchrl_sglang.weights.planning import PushPlanner
from torchrl_sglang.weights.push import OpenedWeights, Pusher
from torchrl_sglang.weights.source.shards import ranks_of_weights, together
from torchrl_sglang.weights.transports.auto import TransportChoice
from torchrl_sglang.weights.transports.base import WeightTransport
from torchrl_sglang.weights.transports.choice import choices_of, make_transport
from torchrl_sglang.weights.update.liveness import LivenessCheck
from torchrl_sglang.weights.update.other_trainers import OtherTrainers
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["WeightSync"]

_log = logging.getLogger(__name__)

_LARGEST_VERSION = 2**63 - 1


class WeightSync:
    """Sends a trainer's weights to the servers of one pool. Process groups are kept from sync to sync.

    A forked child that pushes is another trainer, with process groups of its own.

    Engine, scheme and sender of a pool share one object (:meth:`of`). If user code has made one first, it is that.

    Args:
        pool: the servers.
        config: how weights travel.
        checkpoint: what the servers were started from; read from the served path when not given.
        restart: restarts the server at a URL and returns whether its engine launched it
            (see :meth:`AsyncSGLang.restart`); called for servers that are gone or stuck in a collective, from threads
            of its own while this one holds the pool's update lock.

    Attributes:
        owner: id that this trainer writes into the servers' weight version.
        config: as given.
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
        self.config = config or SyncConfig()
        self._is_made_by_hand = True
        self._config_is_given = config is not None
        self._pool = pool
        self._users: weakref.WeakKeyDictionary[Any, SyncConfig | None] = weakref.WeakKeyDictionary()
        self._begin(checkpoint, restart)

    def _begin(self, checkpoint: Checkpoint | None, restart: Callable[[str], bool] | None) -> None:
        """Start as a trainer that has sent nothing yet."""
        pool = self._pool
        self.owner = uuid.uuid4().hex[:8]
        self.last_report: SyncReport | None = None
        self._pid = os.getpid()
        self._planner = PushPlanner(pool, self.config, self.owner, checkpoint)
        self._liveness = LivenessCheck(pool, restart, patience_s=self.config.fixed_timeout_s)
        self._others = OtherTrainers(pool, self.owner, takeover=self.config.takeover)
        self._transport: WeightTransport[Any] | None = None
        self._newcomers = NewcomerUpdates(pool, self._planner, self.config, self.owner)
        self._pusher = Pusher(
            pool,
            self.config,
            self.owner,
            planner=self._planner,
            liveness=self._liveness,
            others=self._others,
            newcomers=self._newcomers,
        )
        self._pending: PendingSync | None = None
        if pool.weight_sync is None:
            pool.weight_sync = self

    def _begin_in_child(self) -> None:
        """In a forked child, start anew: process groups and sessions with the servers are the parent's."""
        if self._pid == os.getpid():
            return
        torch.set_num_threads(1)  # of OpenMP's threads none is left: to compute with several would wait for ever
        self._begin(self._planner.known_checkpoint, self._liveness.restart)

    @classmethod
    def of(
        cls,
        pool: SGLangPool,
        config: SyncConfig | None = None,
        *,
        user: object,
        restart: Callable[[str], bool] | None = None,
    ) -> WeightSync:
        """The pool's one weight sync, made when it is first needed.

        Args:
            pool: the servers.
            config: how weights travel; ``None`` takes what the pool's sync has, or the defaults.
            user: the object that uses it; :meth:`release` of the last one closes it.
            restart: a method as described at the class, used if the pool's sync has none yet. Its object (the engine)
                is referenced weakly: the engine holds the sync, and an unused engine must end its servers.

        Raises:
            ConfigError: another user, or the code that made the pool's sync by hand, gave it other settings. One
                process group can't have two.
        """
        sync: WeightSync | None = pool.weight_sync
        if sync is not None and config is not None and config != sync.config:
            others = [given for other, given in sync._users.items() if other is not user]
            if (sync._is_made_by_hand and sync._config_is_given) or any(given is not None for given in others):
                raise ConfigError(
                    "these servers' weights are already sent with another SyncConfig, and engine, scheme and sender "
                    "share one process group: give the same config to all, or shutdown() the scheme that has the other"
                )
            if not sync._is_made_by_hand:
                sync.close()
            sync = None
        if sync is None:
            pool.weight_sync = sync = cls(pool, config)
            sync._is_made_by_hand = False
        if restart is not None and sync._liveness.restart is None:
            sync._liveness.restart = _held_weakly(restart)
        sync._users[user] = config
        return sync

    def release(self, user: object) -> None:
        """Close if nobody but ``user`` uses this object (see :meth:`of`). One that was made by hand stays open."""
        self._users.pop(user, None)
        if not self._users and not self._is_made_by_hand:
            self.close()

    # ------------------------------------------------------------------ what callers use

    def connect(self) -> None:
        """Prepare what the first push would otherwise prepare: read the checkpoint, make the process group.

        Raises:
            ConfigError: the servers can't take weights by this transport.
            WeightUpdateError: a server did not join.
        """
        self._begin_in_child()
        with self._errors_name_all_servers(), self._update_lock("making the process group"):
            self._pool.refuse_while_offloaded()
            self.reach()
            self._others.end_dead_updates(self._liveness.answering, None)
            self._choose_transport().connect(self._liveness.reachable())

    @property
    def transport_choices(self) -> dict[str, TransportChoice]:
        """How weights reach each server, and why, by URL; empty before the first :meth:`connect` or :meth:`push`."""
        self._begin_in_child()
        return {} if self._transport is None else choices_of(self._transport, self._pool)

    def reach(self, patience_s: float | None = None) -> None:
        """Connect the pool, if it is not connected yet. Servers that hang in a dead trainer's update are freed first.

        Args:
            patience_s: how long the mark of another trainer must stay the same to count as that of a dead one;
                ``None`` frees only servers of trainers whose process is known to have ended.

        Raises:
            ServerError: a server can't be reached, or hangs for another reason.
            ConfigError: the servers don't serve the same model.
            WeightUpdateError: another trainer is updating a server.
        """
        self._begin_in_child()
        deadline = time.monotonic() + self.config.group_timeout_s
        while True:
            try:
                self._pool.connect()
                return
            except ServerTimeoutError:
                freed = self._others.end_dead_updates(self._pool.clients, patience_s)
                if not freed or time.monotonic() > deadline:
                    raise

    def push(self, weights: Any, *, version: int | None = None, partial: bool = False) -> SyncReport | None:
        """Send weights to every server that can be reached, and return when the servers serve them.

        Under FSDP2 every rank calls this; the first one sends. A push under way in the background is waited for.

        Args:
            weights: a module, nested TensorDict, flat dict or iterator (see :func:`open_source`).
            version: number of the new version; ``None`` takes the next one. A trainer may begin with any number, as
                after a resume; from then on none may be lower than the one before. The same number again is for the
                same weights, after a failure: a server that has missed the second push can't be told by its number.
            partial: names that are not among ``weights`` keep what they have; otherwise a missing name is an error.

        Returns:
            What was done; ``None`` on ranks that only help to gather.

        Raises:
            ConfigError: weights of an unknown kind, servers that can't take any, or a version that is too low.
            WeightCoverageError: names, shapes or values don't match; nothing was sent.
            WeightUpdateError: a server refused, died, hung or failed verification; ``server_weights`` says what each
                server holds. The next push sends everything again and heals what can be healed.
        """
        require_number("version", version, whole=True, optional=True, at_least=0, at_most=_LARGEST_VERSION)
        self.wait()
        return self._push(weights, version, partial)

    def push_in_background(self, weights: Any, *, version: int | None = None) -> PendingSync:
        """Like :meth:`push`, but return at once: the next rollout may start while the weights travel.

        Requests that arrive meanwhile wait in the paused servers and are answered with the new weights. The trainer
        must leave its parameters alone until the push is done; with verification (``SyncConfig.verify``) it must not
        call the model either, since verification calls it in evaluation mode.

        Returns:
            A handle. Its :meth:`~PendingSync.result` raises what :meth:`push` would have raised; so does the next push
            if the result has not been retrieved by then.

        Raises:
            ConfigError: the version is too low; or the weights are sharded, and gathering them in a thread could
                interleave with the training's own collectives.
        """
        require_number("version", version, whole=True, optional=True, at_least=0, at_most=_LARGEST_VERSION)
        self.wait()
        self._pusher.require_not_older(version)
        if ranks_of_weights(weights) is not None:
            raise ConfigError("sharded weights can't be sent in the background: use push, or gather them first")
        self._pending = PendingSync(Task(lambda: self._push(weights, version, False), name="weight-sync"))
        return self._pending

    def wait(self) -> None:
        """Wait for a push under way in the background.

        Raises:
            SGLangError: it failed, and its result was not retrieved.
        """
        self._begin_in_child()
        pending, self._pending = self._pending, None
        if pending is not None and not pending.retrieved:
            pending.result()

    def heal(self) -> SyncReport | None:
        """Send the weights of the last push again, to every server: after a failure, or when a server has returned.

        Raises:
            ConfigError: nothing was pushed yet, or it was only a part of the tensors, or an iterator that can't be read
                twice.
            WeightUpdateError: as :meth:`push`.
        """
        self._begin_in_child()
        if self._pusher.last_weights is None:
            raise ConfigError("there are no weights to send again: push(model) them")
        return self.push(self._pusher.last_weights)

    def bring_up_to_date(self, clients: Sequence[SGLangClient]) -> list[SGLangClient]:
        """Send the weights of the last push to servers that have just joined; only these are paused.

        The trainer's tensors may have changed since that push. Then, and if the model is sharded or came as an
        iterator, the servers wait for the next push, unless the weights lie in a shared folder (``transport="disk"``)
        or are an adapter, which is kept. What they got is compared with what the other servers hold.

        Args:
            clients: members of the pool that get no requests yet.

        Returns:
            Those that have to wait for the next push; the others get requests.

        Raises:
            ConfigError: a server can't take weights by this transport, or an adapter needs another base model than its.
            WeightUpdateError: a server failed.
        """
        self._begin_in_child()
        with self._pool.update_lock:
            if self.last_report is None:
                return list(clients)
            return self._newcomers.update(clients, self._choose_transport())

    def is_left_behind(self, version: str) -> bool:
        """Whether a server's dirty version is of a failed update of this trainer, or of a trainer that has ended.

        A trainer on another host may still be at work.
        """
        self._begin_in_child()
        mark = TrainerMark.parse(WeightVersion.parse(version).owner or "")
        return mark.owner == self.owner or mark.is_alive() is False

    def servers_leave(self) -> None:
        """Servers are about to leave the pool: process groups are destroyed, and the next push makes new ones."""
        self._begin_in_child()
        with self._pool.update_lock:
            if self._transport is not None:
                self._transport.close()

    def close(self) -> None:
        """Wait for a push under way, then destroy the process group. The servers go on serving."""
        self._begin_in_child()
        if self._pending is not None:
            self._pending.join()
        if self._transport is not None:
            self._transport.close()
        self._pusher.last_weights = None
        self._newcomers.forget()
        if self._pool.weight_sync is self:
            self._pool.weight_sync = None

    # ------------------------------------------------------------------ one push

    def _push(self, weights: Any, version: int | None, partial: bool) -> SyncReport | None:
        with self._errors_name_all_servers(), self._update_lock("a weight update"):
            try:
                return self._push_now(weights, version, partial)
            finally:
                if partial:  # a shared folder does not hold all of the newest version
                    self._pool.state.weights_saved(None)

    def _push_now(self, weights: Any, version: int | None, partial: bool) -> SyncReport | None:
        start = time.monotonic()
        ranks = ranks_of_weights(weights)
        with together(ranks, "reaching the servers and opening its weights"):
            self.reach(self.config.fixed_timeout_s)
            self._pool.refuse_while_offloaded()
            transport = self._choose_transport()
            source = self._planner.open_source(weights)
        opened = OpenedWeights(weights=weights, source=source, ranks=ranks, partial=partial)
        report = self._pusher.push(opened, transport, version)
        if report is not None:
            report.total_s = time.monotonic() - start
            self.last_report = report
            _log.info("weights %d on %d servers in %.3f s", report.version, len(report.server_weights), report.total_s)
        return report

    @contextmanager
    def _errors_name_all_servers(self) -> Iterator[None]:
        try:
            yield
        except WeightSyncError as error:
            self._liveness.name_all_servers(error)
            raise

    @contextmanager
    def _update_lock(self, purpose: str) -> Iterator[None]:
        """Hold the pool's update lock. It is waited for as long as another update may take.

        Raises:
            WeightUpdateError: it stays held; says by whom.
        """
        step_s = max(client.config.update_timeout_s for client in self._pool.clients)
        timeout_s = self.config.deadline_s(self._planner.known_nbytes * len(self._pool.clients)) + step_s
        with ExitStack() as stack:
            try:
                stack.enter_context(self._pool.update_lock.held_for(purpose, timeout_s))
            except TimeoutError as error:
                raise WeightUpdateError(
                    f"{purpose} waited {timeout_s:.0f} s for another thread, which holds the servers for {error}. "
                    "Nothing was sent. End what that thread does, or update from one thread only"
                ) from error
            yield

    def _choose_transport(self) -> WeightTransport[Any]:
        if self._transport is None:
            self._transport = make_transport(self._pool, self.config, self.owner, self._planner.checkpoint)
            # Also runs at exit, while sockets and threads still work: a scheme held by a collector is collected later.
            weakref.finalize(self, _close_unless_forked, self._transport, os.getpid())
        return self._transport


def _close_unless_forked(transport: WeightTransport[Any], pid: int) -> None:
    """Close a transport; in a forked child that ends, leave the groups of its parent alone."""
    if os.getpid() == pid:
        transport.close()


def _held_weakly(restart: Callable[[str], bool]) -> Callable[[str], bool]:
    """Call a method as long as its object exists; then return ``False``."""
    method = weakref.WeakMethod(restart)

    def call(url: str) -> bool:
        alive = method()
        return alive is not None and alive(url)

    return call
