"""The records of a pool: one per server, one for the weights that the servers share, and one lock.

Records are immutable: a change replaces the record and increments its ``revision``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torchrl_sglang.errors import ServerWeights
from torchrl_sglang.pool.records import Phase, ServerState, WeightState
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["RecordStore", "weights_under"]


class RecordStore:
    """Reads and replaces records; what is done to them is in the classes made of it. Thread-safe.

    Args:
        urls: the servers.
    """

    def __init__(self, urls: Iterable[str]) -> None:
        self._lock = threading.Lock()
        self._servers = {url: ServerState(url=url) for url in urls}
        self._former: dict[str, ServerState] = {}
        self._weights = WeightState()

    # ------------------------------------------------------------------ reading

    def server(self, url: str) -> ServerState:
        """The record of one server; of one that has left, the last one: no event changes it any more."""
        record = self._servers.get(url)  # read once: it may leave meanwhile
        return self._former[url] if record is None else record

    def has_left(self, url: str) -> bool:
        """Whether a server is leaving, or is no member any more: what it has not answered is generated elsewhere."""
        record = self._servers.get(url)
        return record.is_leaving if record is not None else url in self._former

    @property
    def known_urls(self) -> tuple[str, ...]:
        """The members, and the servers that were members."""
        return (*self._servers, *self._former)

    @property
    def servers(self) -> Mapping[str, ServerState]:
        """The record of every server, by URL."""
        return dict(self._servers)

    @property
    def weights(self) -> WeightState:
        """The record of the weights."""
        return self._weights

    @property
    def offloaded_urls(self) -> tuple[str, ...]:
        """The servers that have released GPU memory, or are about to. Until they are done, no process is started."""
        return tuple(url for url, known in dict(self._servers).items() if known.before_offload is not None)

    # ------------------------------------------------------------------ changes

    def _new_process(self, known: ServerState, version: str) -> ServerState:
        return self._put(
            ServerState(
                url=known.url,
                phase=known.phase,
                reason=known.reason,
                version=version,
                weights=weights_under(version),
                restarts=known.restarts + 1,
                is_restarting=known.is_restarting,
                is_leaving=known.is_leaving,
                before_offload=known.before_offload,
                revision=known.revision + 1,
            )
        )

    def _phase_after_update(self, url: str) -> Phase:
        """A server that was out of routing before an update stays out until it is restored."""
        phase = self.server(url).phase
        return "serving" if phase == "updating" else phase

    def _record(self, url: str, **changes: Any) -> None:
        with self._lock:
            self._change(url, **changes)

    def _change(self, url: str, **changes: Any) -> ServerState:
        """Replace a record; the lock is held."""
        known = self.server(url)
        return self._put(replace(known, **changes, revision=known.revision + 1))

    def _put(self, record: ServerState) -> ServerState:
        """Replace a record; that of a former member stays as it is. The lock is held."""
        if record.url not in self._servers:
            return self._former[record.url]
        self._servers[record.url] = record
        return record


def weights_under(version: str) -> ServerWeights:
    """What a server holds that reports this version before an update: mixed weights if it is marked dirty."""
    return "mixed" if WeightVersion.parse(version).dirty else "old"
