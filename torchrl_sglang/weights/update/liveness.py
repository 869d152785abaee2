"""Finds the servers that a weight update can go to, and restarts those of this engine that do not answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import (
    ConfigError,
    RequestRejectedError,
    ServerError,
    ServerStartError,
    ServerTimeoutError,
    SGLangError,
    WeightSyncError,
    WeightUpdateError,
)
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.reply_weights import is_outdated
from torchrl_sglang.protocol.control import build_ready
from torchrl_sglang.protocol.dialect import SERVER_INFO

__all__ = ["LivenessCheck"]

_STUCK_TIMEOUT_S = 5.0
"""How long a scheduler may take to answer; it answers between two steps, unless it is stuck in a collective."""
_POLL_S = 0.2


class LivenessCheck:
    """Checks which servers answer before an update, whose thread holds the pool's update lock.

    Args:
        pool: the servers; those that don't answer are quarantined.
        restart: restarts the server at a URL and returns whether its engine launched it.
        patience_s: how long a server that hangs has to show that it is free again; see :meth:`reachable`.
    """

    def __init__(self, pool: SGLangPool, restart: Callable[[str], bool] | None, *, patience_s: float) -> None:
        self._pool = pool
        self.restart = restart
        self._patience_s = patience_s
        self._waited_for: set[tuple[str, int]] = set()

    @property
    def answering(self) -> list[SGLangClient]:
        """The servers that are not known to hang; nothing is asked."""
        return [client for client in self._pool.clients if not self._is_stuck(client)]

    def reachable(self) -> list[SGLangClient]:
        """The servers that answer. A server that does not is left out with a warning, and needs a sync when it is back.

        A server that hangs may be waiting in a collective for another server, which is just leaving it: it is asked
        again until it answers, or ``patience_s`` is over. A process that was waited for in vain is waited for once.
        A server that is being restarted is waited for only if no other one is left.

        Raises:
            WeightUpdateError: none answers, or those that do serve another model by now.
        """
        deadline = time.monotonic() + self._patience_s
        errors = self._errors(self._pool.clients)
        while hanging := [client for client in self._pool.clients if self._may_recover(client, errors, deadline)]:
            time.sleep(_POLL_S)
            errors = {**errors, **self._errors(hanging)}
        for client in self._pool.clients:
            if isinstance(errors[client.url], ServerTimeoutError):
                self._waited_for.add(self._process(client))
        self._leave_out({url: error for url, error in errors.items() if error is not None})
        alive = [client for client in self._pool.clients if errors[client.url] is None]
        if not alive:
            unreached = [url for url, error in errors.items() if not isinstance(error, ConfigError)]
            what = "no server can be reached" if unreached else "no server takes weight updates"
            raise WeightUpdateError(
                f"{what}: {errors[self._pool.clients[0].url]}", server_weights=dict.fromkeys(unreached, "stuck")
            )
        for client in alive:
            self._waited_for.discard(self._process(client))
            if self._is_stuck(client):
                self._pool.state.weights_changed(client.url, "mixed")
        return alive

    def _leave_out(self, errors: Mapping[str, SGLangError]) -> None:
        reasons = {
            url: f"it takes no weight updates: {error}"
            if isinstance(error, ConfigError)
            else f"it could not be reached for a weight update ({error})"
            for url, error in errors.items()
            if not isinstance(error, _BeingRestarted)
        }
        calls = {url: partial(self._pool.quarantine, url, reason) for url, reason in reasons.items()}
        for outcome in side_by_side(calls).values():  # a router is told of all of them at the same time
            outcome.unwrap()

    def _errors(self, clients: Sequence[SGLangClient]) -> dict[str, SGLangError | None]:
        outcomes = side_by_side({client.url: partial(self._check, client) for client in clients})
        return {url: outcome.error for url, outcome in outcomes.items()}

    def _may_recover(self, client: SGLangClient, errors: dict[str, SGLangError | None], deadline: float) -> bool:
        """Whether to ask a server again."""
        error = errors[client.url]
        if isinstance(error, _BeingRestarted):
            return all(errors.values())  # the start has a time-out of its own
        if not isinstance(error, ServerTimeoutError) or self._process(client) in self._waited_for:
            return False
        is_marked = self._is_stuck(client) or not self._is_routed(client)
        return is_marked and time.monotonic() < deadline

    def _process(self, client: SGLangClient) -> tuple[str, int]:
        return client.url, self._pool.state.server(client.url).restarts

    def _is_restarting(self, client: SGLangClient) -> bool:
        return self._pool.state.server(client.url).is_restarting

    def record_failure(self, error: WeightSyncError) -> None:
        """An update failed before it reached the servers.

        Those that hang in a collective are quarantined, and the next update checks them more closely or restarts them.
        """
        for url, weights in error.server_weights.items():
            if weights == "stuck":
                self._pool.state.weights_changed(url, "stuck")
                if url not in self._pool.quarantined:
                    self._pool.quarantine(url, f"it hangs after a failed update ({error})")

    def name_all_servers(self, error: WeightSyncError) -> None:
        """Add to an error what the servers hold that it does not name: they were not reached."""
        for client in self._pool.clients:
            error.server_weights.setdefault(client.url, "old" if self._is_routed(client) else "mixed")

    def _is_routed(self, client: SGLangClient) -> bool:
        return self._pool.state.server(client.url).is_routed

    def _is_stuck(self, client: SGLangClient) -> bool:
        return self._pool.state.server(client.url).weights == "stuck"

    def _check(self, client: SGLangClient) -> None:
        if self._is_restarting(client):
            raise _BeingRestarted(f"{client.url} is being restarted", server=client.url)
        try:
            with suppress(RequestRejectedError):  # a paused server answers 503, which is an answer
                client.send(build_ready())
            if self._is_stuck(client) or not self._is_routed(client):
                _require_scheduler(client)
            held = client.weight_version()
            if is_outdated(held, self._pool.state.server(client.url)):
                self._pool.state.replaced_elsewhere(client.url, held)
            if not self._is_routed(client):  # it may be a new process
                self._pool.reconnect(client)
        except ServerError:
            restarts = self._pool.state.server(client.url).restarts
            if not self._restarted(client):
                raise
            info = client.connect()
            if self._pool.state.server(client.url).restarts == restarts:
                self._pool.state.restarted(client.url, info.weight_version)

    def _restarted(self, client: SGLangClient) -> bool:
        try:
            with self._pool.update_lock.as_helper():
                return self.restart is not None and self.restart(client.url)
        except ServerStartError as error:
            if self._is_restarting(client):
                raise _BeingRestarted(str(error), server=client.url) from error
            raise


class _BeingRestarted(ServerStartError):
    """Somebody else restarts the server: this update goes to the others."""


def _require_scheduler(client: SGLangClient) -> None:
    """Send a request that only the scheduler can answer: a server stuck in a collective still answers ``/ready``.

    Raises:
        ServerTimeoutError: it is stuck.
    """
    client.send(SERVER_INFO, timeout_s=min(_STUCK_TIMEOUT_S, client.config.probe_timeout_s))
