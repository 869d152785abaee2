"""The state of a pool: one record per server, one for the weights that the servers share, and one lock.

Other objects read it here and keep no copy. Records are immutable; a change replaces the record and increments its
``revision``. A method that changes a record is named after the event that it records.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torchrl_sglang.pool.record_store import weights_under
from torchrl_sglang.pool.records import Adapter, Phase, SavedWeights, ServerState, WeightState
from torchrl_sglang.pool.update_events import UpdateEvents
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["Adapter", "Phase", "PoolState", "SavedWeights", "ServerState", "WeightState"]

_log = logging.getLogger(__name__)


class PoolState(UpdateEvents):
    """The records of one pool. Thread-safe.

    Args:
        urls: the servers.

    Examples:
        >>> state = PoolState(["http://a:30000"])
        >>> before = state.quarantined("http://a:30000", "it does not answer")
        >>> state.quarantined("http://a:30000", "its weights are mixed").reason
        'its weights are mixed'
        >>> state.restored("http://a:30000", based_on=before)  # decided before the second event: refused
        False
    """

    # ------------------------------------------------------------------ events: members

    def joined(self, url: str, version: str, reason: str) -> ServerState:
        """A server is new in the pool. One that was a member before counts as a new process.

        Args:
            url: the server.
            version: version string that it holds.
            reason: what it waits for.
        """
        with self._lock:
            former = self._former.pop(url, None)
            self._servers[url] = ServerState(
                url=url,
                phase="joining",
                reason=reason,
                version=version,
                weights=weights_under(version),
                restarts=0 if former is None else former.restarts + 1,
                revision=0 if former is None else former.revision + 1,
            )
            return self._servers[url]

    def leaving(self, url: str, *, is_leaving: bool = True) -> ServerState:
        """A server is about to leave the pool, or stays after all."""
        with self._lock:
            return self._change(url, is_leaving=is_leaving)

    def left(self, url: str) -> None:
        """A server is no member any more."""
        with self._lock:
            known = self._servers.get(url)
            if known is not None:
                self._former[url] = replace(known, is_leaving=True, revision=known.revision + 1)
                del self._servers[url]  # last: readers hold no lock

    def came_again(self, url: str) -> None:
        """The original of this copy has removed a server and added it again: it counts as a new process."""
        with self._lock:
            known = self.server(url)
            if known.is_routed:
                reason = "it left the pool and has joined it again; it is looked at before its next request"
                known = replace(known, phase="dead", reason=reason)
            self._new_process(known, known.version)

    # ------------------------------------------------------------------ events: routing

    def connected(self, versions: Mapping[str, str]) -> None:
        """Every server has reported which version it holds."""
        parsed = [WeightVersion.parse(version) for version in versions.values()]
        with self._lock:
            for url, version in versions.items():
                self._change(url, version=version, weights=weights_under(version))
            # An unfinished update to N counts as version N - 1: the next update is numbered N again.
            found = max(0, *(version.number - version.dirty for version in parsed))
            self._weights = replace(self._weights, version=found)
            for held in parsed:
                before = replace(held, number=held.number - held.dirty, dirty=False)
                self._weights = self._weights.having_seen(before)

    def quarantined(self, url: str, reason: str) -> ServerState:
        """A server was found unfit to serve.

        Args:
            url: the server.
            reason: why; ends up in errors that say that no server is left.
        """
        with self._lock:
            if self.server(url).reason != reason:
                _log.warning("%s is taken out of routing: %s", url, reason)
            return self._change(url, phase="quarantined", reason=reason)

    def died(self, url: str, reason: str) -> ServerState:
        """A request found that a server is gone. The record of a server that gets no requests anyway stays as it is."""
        with self._lock:
            if not self.server(url).is_routed:
                return self.server(url)
            _log.warning("%s is taken out of routing: %s", url, reason)
            return self._change(url, phase="dead", reason=reason)

    def found_dirty(self, url: str, reason: str) -> ServerState:
        """The pool has connected to a server whose version is marked dirty: another process is updating it, or was."""
        with self._lock:
            _log.warning("%s gets no requests: %s", url, reason)
            return self._change(url, phase="dirty", reason=reason)

    def replaced_elsewhere(self, url: str, version: str) -> ServerState:
        """A server was found to be a new process that somebody else has started; it holds ``version``."""
        with self._lock:
            known = self.server(url)
            reason = (
                f"its process was replaced: it holds version {version!r} where it held {known.version!r}; the next "
                "weight update puts it to use"
            )
            _log.warning("%s is taken out of routing: %s", url, reason)
            return self._new_process(replace(known, phase="quarantined", reason=reason), version)

    def came_back_different(self, before: ServerState, reason: str) -> None:
        """A dead server answers again, and was found not to fit: it stays out until a process that fits is there.

        Args:
            before: its record when that was found out.
            reason: what does not fit.
        """
        with self._lock:
            known = self.server(before.url)
            if known.revision == before.revision and known.reason != reason:
                _log.warning("%s stays out of routing: %s", before.url, reason)
                self._change(before.url, reason=reason)

    def restart_begun(self, url: str) -> bool:
        """Somebody is about to start a server's process again.

        Returns:
            ``False`` if somebody else is doing so already, the server is leaving, or GPU memory is offloaded: a new
            process would take it.
        """
        with self._lock:
            known = self.server(url)
            if known.is_restarting or self.has_left(url) or self.offloaded_urls:
                return False
            # Not a change of what the server holds: a finding about it from before stays up to date.
            self._put(replace(known, is_restarting=True))
            return True

    def restart_ended(self, url: str) -> None:
        """The restart that :meth:`restart_begun` has announced is over, one way or the other."""
        with self._lock:
            self._put(replace(self.server(url), is_restarting=False))

    def restarted(self, url: str, version: str) -> ServerState:
        """A server's process was replaced by a new one, which holds ``version``."""
        with self._lock:
            return self._new_process(self.server(url), version)

    def restored(
        self, url: str, *, based_on: ServerState, new_process_with: str | None = None, updated_to: str | None = None
    ) -> bool:
        """A server was found fit to serve.

        Args:
            url: the server.
            based_on: its record when that was found out. If anything has happened to the server since, the finding is
                out of date, and it stays as it is.
            new_process_with: the version it holds, if it was found to be a new process.
            updated_to: the version it holds, if another process was found to have updated it.

        Returns:
            Whether it gets requests now.
        """
        with self._lock:
            known = self.server(url)
            if not known.is_verified:
                known = self._put(replace(known, is_verified=True))
            if known.is_leaving or known.offloaded_tags:
                return False
            if known.revision != based_on.revision:
                _log.info("%s stays %s: its state has changed since it was looked at", url, known.phase)
                return False
            if not known.is_routed:
                _log.info("%s is back in routing", url)
            known = self._change(url, phase="serving", reason="")
            if updated_to is not None:
                self._change(url, version=updated_to, weights=weights_under(updated_to))
                self._weights = self._weights.having_seen(WeightVersion.parse(updated_to))
            if new_process_with is not None:
                self._new_process(known, new_process_with)
            return True

    def replies_seen(self, versions: Iterable[str], server: str = "") -> None:
        """Replies came, made with weights of these versions, from this server if it is known."""
        parsed = [WeightVersion.parse(version) for version in versions]
        with self._lock:
            for version in parsed:
                self._weights = self._weights.having_seen(version)
            newest = max((version.number for version in parsed), default=0)
            known = self._servers.get(server)
            if known is not None and newest > known.newest_seen:
                self._put(replace(known, newest_seen=newest))

    # ------------------------------------------------------------------ events: GPU memory

    def memory_released(self, url: str, tags: Iterable[str], reason: str) -> None:
        """A server has released GPU memory, or is about to (then ``tags`` is empty)."""
        with self._lock:
            known = self.server(url)
            self._change(
                url,
                phase="offloaded",
                reason=reason,
                offloaded_tags=known.offloaded_tags | set(tags),
                before_offload=known.before_offload or (known.phase, known.reason),
            )

    def memory_resumed(self, url: str, tags: Iterable[str]) -> ServerState:
        """A server has allocated GPU memory again."""
        with self._lock:
            return self._change(url, offloaded_tags=self.server(url).offloaded_tags - set(tags))

    def offload_ended(self, url: str) -> ServerState:
        """A server has all of its GPU memory: it waits for what it has waited for before it released some.

        One that has served gets no requests before it is restored.
        """
        with self._lock:
            known = self.server(url)
            phase, reason = known.before_offload or (known.phase, known.reason)
            if phase in ("serving", "updating"):
                phase, reason = "quarantined", "it has its GPU memory again, and has not continued"
            return self._change(url, phase=phase, reason=reason, before_offload=None)

    def memory_lost(self, url: str, reason: str) -> ServerState:
        """A server whose GPU memory was released is gone."""
        with self._lock:
            _log.warning("%s is taken out of routing: %s", url, reason)
            return self._change(url, phase="dead", reason=reason, offloaded_tags=frozenset(), before_offload=None)
