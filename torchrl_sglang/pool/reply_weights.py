"""Whether a reply was made with the weights that its server was known to hold when the request was sent."""

from __future__ import annotations

from collections.abc import Iterable

from torchrl_sglang.pool.state import ServerState
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["is_outdated", "outdated_version", "was_rejected"]


def is_outdated(version: str, known: ServerState) -> bool:
    """Whether a server that reports this version must have been replaced by a new process.

    Versions of one trainer only grow, and no update leads back to ``"default"``, the version of a server that has just
    loaded its checkpoint. Another trainer's numbers may be lower.

    Args:
        version: what it reports.
        known: its record from before.

    Examples:
        >>> server = ServerState(url="http://a:30000", version="12@a1b2")
        >>> [is_outdated(version, server) for version in ("12@a1b2", "11@a1b2", "3@c3d4", "default")]
        [False, True, False, True]
    """
    now, before = WeightVersion.parse(version), WeightVersion.parse(known.version)
    if now.dirty:
        return False  # refused elsewhere, and healed by a full sync
    if now.number == 0:
        return max(before.number, known.newest_seen) > 0
    return now.owner is not None and now.owner == before.owner and now.number < before.number


def outdated_version(reply: GenerateReply, known: ServerState) -> str | None:
    """The version in a reply that shows that its server was replaced; ``None`` if there is none.

    Args:
        reply: as the server gave it.
        known: the server's record from before the request was sent.
    """
    return next((version for version in _versions(reply) if is_outdated(version, known)), None)


def was_rejected(reply: GenerateReply, servers: Iterable[ServerState]) -> bool:
    """Whether a reply was made with weights that have failed their verification since.

    Args:
        reply: as the server gave it.
        servers: the records of the servers that may have made it.
    """
    rejected = {server.rejected_version for server in servers} - {""}
    return any(version in rejected for version in _versions(reply))


def _versions(reply: GenerateReply) -> list[str]:
    spans = [span.version for span in reply.weight_spans if span.end > span.start]
    return spans or [reply.weight_version]
