"""Which servers answer before an update; those of ours that don't are started again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import RequestRejectedError, ServerError, WeightSyncError, WeightUpdateError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_destroy_group, build_ready
from torchrl_sglang.protocol.dialect import SERVER_INFO
from torchrl_sglang.weights.group.rendezvous import group_name

__all__ = ["LivenessCheck"]

_STUCK_TIMEOUT_S = 5.0
"""How long a server that was stuck gets to show that somebody freed or restarted it."""


class LivenessCheck:
    """Finds the servers an update can go to.

    Args:
        pool: the servers; those that don't answer are quarantined.
        restart: restarts the server at a URL and returns whether it is ours to restart.

    Attributes:
        stuck: servers that an update left waiting in a collective.
        restarted: servers started again since the call before: they hold the checkpoint's weights.
    """

    def __init__(self, pool: SGLangPool, restart: Callable[[str], bool] | None) -> None:
        self.stuck: set[str] = set()
        self.restarted: set[str] = set()
        self._pool = pool
        self._restart = restart
        self._restarts_seen = dict(pool.restarts)

    def reachable(self) -> list[SGLangClient]:
        """The servers that answer. One that is gone is left out with a warning; it has to be synced when it is back.

        Raises:
            WeightUpdateError: none answers.
        """
        self.restarted = set()
        self.free_left_behind([client for client in self._pool.clients if client.url in self._pool.quarantined])
        outcomes = side_by_side({client.url: self._finding(client) for client in self._pool.clients})
        for client in self._pool.clients:
            error = outcomes[client.url].error
            if error is not None:
                self._pool.quarantine(client.url, f"it could not be reached for a weight update ({error})")
        seen, self._restarts_seen = self._restarts_seen, dict(self._pool.restarts)
        self.restarted |= {url for url, count in self._restarts_seen.items() if count != seen.get(url, 0)}
        alive = [client for client in self._pool.clients if outcomes[client.url].error is None]
        self.stuck -= {client.url for client in alive}
        if not alive:
            raise WeightUpdateError(
                f"no server can be reached: {outcomes[self._pool.clients[0].url].error}",
                server_weights={client.url: "stuck" for client in self._pool.clients},
            )
        return alive

    def remember_stuck(self, error: WeightSyncError) -> None:
        """Servers that hang are out of routing, and looked at more closely (or restarted) by the next update."""
        stuck = {url for url, state in error.server_weights.items() if state == "stuck"}
        self.stuck |= stuck
        for url in stuck - self._pool.quarantined.keys():
            self._pool.quarantine(url, f"it hangs after a failed update ({error})")

    def describe_the_others(self, error: WeightSyncError) -> None:
        """No weights were sent: add to ``error`` what the servers hold that it says nothing of."""
        for client in self._pool.clients:
            in_service = client.url not in self._pool.quarantined
            error.server_weights.setdefault(client.url, "old" if in_service else "mixed")

    def free_left_behind(self, asked: Sequence[SGLangClient]) -> bool:
        """Have all servers leave the groups of trainers that died in an update.

        Not for a bystander: only who is about to send everything anew need not ask whether that trainer is dead.

        gloo's broadcast is a tree: a server may be waiting there for another server, which has long seen that the
        trainer is gone. When that one leaves, its connections close, and the waiting one is free too.

        Args:
            asked: servers that may carry the mark of such an update.

        Returns:
            Whether any does.
        """
        clients = [client for client in self._pool.clients if client.url not in self.stuck]
        answers = side_by_side({c.url: c.held_version for c in asked if c.url not in self.stuck}).values()
        versions = [answer.value for answer in answers if answer.value is not None]
        marks = {version.owner for version in versions if version.dirty and version.owner}
        for mark in marks:
            request = build_destroy_group(group_name(mark))
            side_by_side({c.url: partial(c.send, request, timeout_s=_STUCK_TIMEOUT_S) for c in clients})
        return bool(marks)

    def _finding(self, client: SGLangClient) -> Callable[[], None]:
        def find() -> None:
            try:
                with suppress(RequestRejectedError):  # a paused server says 503: it is there, and only that is asked
                    client.send(build_ready())
                if client.url in self.stuck or client.url in self._pool.quarantined:
                    _await_scheduler(client)
            except ServerError:
                if self._restart is None or not self._restart(client.url):
                    raise
                client.connect()
                self.restarted.add(client.url)

        return find


def _await_scheduler(client: SGLangClient) -> None:
    """Ask something only the scheduler can answer: a server stuck in a collective still answers ``/ready``.

    Raises:
        ServerTimeoutError: it is stuck.
    """
    client.send(SERVER_INFO, timeout_s=min(_STUCK_TIMEOUT_S, client.config.probe_timeout_s))
