"""Whether a reply was made with the weights that its server was known to hold when the request was sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from torchrl_sglang.pool.state import PoolState, ServerState
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["ReplyChecks", "is_outdated"]

_POLL_S = 0.005


def is_outdated(version: str, known: ServerState) -> bool:
    """Whether a server that reports this version must have been replaced by a new process.

    Versions of one trainer only grow, and no update leads back to ``"default"``, the version of a server that has just
    loaded its checkpoint. Another trainer's numbers may be lower.

    Args:
        version: what it reports.
        known: its record from before.

    Examples:
        >>> server = ServerState(url="http://a:30000", version="12@a1b2")
        >>> [is_outdated(version, server) for version in ("12@a1b2", "11@a1b2", "0@c3d4", "default")]
        [False, True, False, True]
    """
    now, before = WeightVersion.parse(version), WeightVersion.parse(known.version)
    if now.dirty:
        return False  # refused elsewhere, and healed by a full sync
    if now.number == 0 and now.owner is None:
        return max(before.number, known.newest_seen) > 0
    return now.owner is not None and now.owner == before.owner and now.number < before.number


class ReplyChecks:
    """Checks replies against the servers' records.

    Args:
        state: the pool's records.
        on_replaced: called with the URL of a server that turns out to be a new process.
        timeout_s: longest time to wait for a verification.
    """

    def __init__(self, state: PoolState, on_replaced: Callable[[str], None], *, timeout_s: float) -> None:
        self._state = state
        self._on_replaced = on_replaced
        self._timeout_s = timeout_s

    def await_verification(self, replies: Sequence[GenerateReply]) -> None:
        """Wait until it is known whether servers that have just been updated hold what was sent."""
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline and self.is_unverified(replies):
            time.sleep(_POLL_S)

    def is_unverified(self, replies: Sequence[GenerateReply]) -> bool:
        """Whether the verification of weights that made these replies is still under way."""
        versions = {reply.weight_version for reply in replies}
        return any(not server.is_verified and server.version in versions for server in self._state.servers.values())

    def is_wrong(self, reply: GenerateReply, before: Mapping[str, ServerState]) -> bool:
        """Whether a reply must be made again.

        It was made with weights of a new process, or with some that have failed their verification since, or its server
        was leaving the pool and had to break it off.

        Args:
            reply: as the server gave it. A server that turns out to be a new process gets no more requests.
            before: the servers' records from before the request was sent.
        """
        if reply.finish_reason == "abort" and self._was_cut_short(reply, before):
            return True
        versions = _versions(reply)
        known = before.get(reply.server)
        if known is None:  # the router's, which does not say which server it was
            return self._is_rejected(versions, self._state.servers.values())
        outdated = next((version for version in versions if is_outdated(version, known)), None)
        if outdated is not None and self._state.server(known.url).restarts == known.restarts:
            self._state.replaced_elsewhere(known.url, outdated)
            self._on_replaced(known.url)
        return outdated is not None or self._is_rejected(versions, [self._state.server(known.url)])

    def _was_cut_short(self, reply: GenerateReply, before: Mapping[str, ServerState]) -> bool:
        """Whether a response was aborted because its server leaves, or has left and come back since.

        A router does not say which server it was.
        """
        suspects = [reply.server] if reply.server in self._state.known_urls else before
        return any(self._state.has_left(url) or self._is_another_process(url, before) for url in suspects)

    def _is_another_process(self, url: str, before: Mapping[str, ServerState]) -> bool:
        """Whether a server's process was replaced since; a server that was added again counts as one."""
        return url in before and self._state.server(url).restarts != before[url].restarts

    @staticmethod
    def _is_rejected(versions: Iterable[str], servers: Iterable[ServerState]) -> bool:
        return bool({server.rejected_version for server in servers} & set(versions))


def _versions(reply: GenerateReply) -> list[str]:
    spans = [span.version for span in reply.weight_spans if span.end > span.start]
    return spans or [reply.weight_version]
