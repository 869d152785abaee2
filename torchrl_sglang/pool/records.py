"""Immutable records: one of a server, one of the weights that the servers share. :mod:`.state` replaces them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torchrl_sglang.errors import ServerWeights
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["Adapter", "Phase", "SavedWeights", "ServerState", "WeightState"]

_CHECKPOINT = WeightVersion(number=0)

Phase = Literal["serving", "updating", "quarantined", "dead", "dirty", "offloaded", "joining"]
"""What a server does for this pool.

``serving``: it gets requests; ``updating``: it gets requests, which wait while it is paused for a weight update;
``quarantined``: it gets none until a weight update or :meth:`SGLangPool.restore`; ``dead``: a request found that it is
gone, and later requests poll it; ``dirty``: it was in the middle of an update when this pool connected, and is polled
until that has ended; ``offloaded``: its GPU memory is released; ``joining``: it is new in the pool, and gets none until
it holds the weights that the others hold.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter that stands for the trainer's weights.

    Attributes:
        name: its name on the servers.
        version: the weight version it stands for, as a server's version string.
    """

    name: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedWeights:
    """A whole checkpoint of synced weights that servers can load by themselves.

    Attributes:
        version: the weight version it holds.
        path: its folder, as the servers see it.
    """

    version: WeightVersion
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """What the pool knows of one server.

    Attributes:
        url: its base URL.
        phase: what it does for this pool.
        reason: why it gets no requests; empty while it gets some.
        version: version string that this pool gave it, or that it held when the pool connected.
        weights: what it holds, compared with the last update that it took part in: ``old``, ``new`` or ``mixed``;
            ``stuck`` if it does not answer.
        session_open: an update session of ours is open on it.
        version_before: version string that it held before this update marked it dirty; empty when it is not marked.
        complete_from: owner id of the trainer that has sent it every tensor; empty when it holds others.
        is_verified: whether the verification of its last update is over, one way or the other.
        rejected_version: version string of an update of ours that failed its verification here; empty if none did.
        newest_seen: highest version number among its replies, for pools whose weights another process updates.
        restarts: how often its process was replaced. A new process is in no process group and has no adapter loaded.
        is_restarting: its process has ended and is being started again.
        offloaded_tags: what of its GPU memory is released.
        before_offload: phase and reason from before its memory was released; ``None`` while it is not.
        is_leaving: it gets no new requests, and is removed from the pool when it has answered those that it has.
        revision: number of changes to this record.
    """

    url: str
    phase: Phase = "serving"
    reason: str = ""
    version: str = "default"
    weights: ServerWeights = "old"
    session_open: bool = False
    version_before: str = ""
    complete_from: str = ""
    is_verified: bool = True
    rejected_version: str = ""
    newest_seen: int = 0
    restarts: int = 0
    is_restarting: bool = False
    offloaded_tags: frozenset[str] = frozenset()
    before_offload: tuple[Phase, str] | None = None
    is_leaving: bool = False
    revision: int = 0

    @property
    def is_routed(self) -> bool:
        """Whether requests go to it."""
        return self.phase in ("serving", "updating") and not self.is_leaving

    @property
    def why_not_routed(self) -> str:
        """Why it gets no requests; empty while it gets some."""
        return "it is leaving the pool" if self.is_leaving else self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightState:
    """What the pool knows of the weights that its servers share.

    Attributes:
        version: number of the weights that the last finished update put on the servers; before the first one the
            highest number found on them.
        highest_version: highest number that this pool has given to any server; later weights get a higher one.
        newest_seen: the version that was seen first the latest, on servers or in replies: for pools whose weights
            another process updates.
        highest_seen: highest number seen so far, by trainer. Another trainer's numbers may be lower.
        cache_salt: name space of the prefix caches that new requests use; ``None`` after an update that flushed them.
        adapter: the trainer's LoRA adapter, for requests that name no other.
        saved: the last weights that were synced through a shared folder.
    """

    version: int = 0
    highest_version: int = 0
    newest_seen: WeightVersion = _CHECKPOINT
    highest_seen: Mapping[str | None, int] = field(default_factory=dict)
    cache_salt: str | None = None
    adapter: Adapter | None = None
    saved: SavedWeights | None = None

    @property
    def next_version(self) -> int:
        """The number of the next update: no server is known to hold weights under it, or under a higher one.

        Also not after a failed update, and not where another trainer has updated the servers meanwhile.
        """
        return max(self.version, self.highest_version, self.newest_seen.number) + 1

    def having_seen(self, version: WeightVersion) -> WeightState:
        """The record after a server was seen to hold a version, as a reply or the server itself says.

        Only a number that is new of its trainer shows newer weights: late replies were made with earlier ones.

        Examples:
            >>> weights = WeightState()
            >>> for text in ("500@a", "3@b", "500@a", "default"):
            ...     weights = weights.having_seen(WeightVersion.parse(text))
            >>> str(weights.newest_seen)  # a trainer that has begun anew, from an earlier checkpoint
            '3@b'
            >>> [weights.is_as_new(WeightVersion.parse(text)) for text in ("3@b", "2@b", "500@a", "501@a", "default")]
            [True, False, False, True, False]
        """
        if version.dirty or version.number <= self.highest_seen.get(version.owner, 0):
            return self
        return replace(self, newest_seen=version, highest_seen={**self.highest_seen, version.owner: version.number})

    def is_as_new(self, version: WeightVersion) -> bool:
        """Whether a version is the newest one seen, or newer."""
        known, number = self.highest_seen.get(version.owner, 0), max(0, version.number)
        return not version.dirty and (number > known or (number == known and version.owner == self.newest_seen.owner))
