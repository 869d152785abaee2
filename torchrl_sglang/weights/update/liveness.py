"""Finds the servers that a weight update can go to, and restarts those of this engine that do not answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import RequestRejectedError, ServerError, WeightSyncError, WeightUpdateError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.reply_weights import is_outdated
from torchrl_sglang.protocol.control import build_ready
from torchrl_sglang.protocol.dialect import SERVER_INFO

__all__ = ["LivenessCheck"]

_STUCK_TIMEOUT_S = 5.0
"""How long a server that was stuck has to show that it is free again or was restarted."""


class LivenessCheck:
    """Checks which servers answer before an update, whose thread holds the pool's update lock.

    Args:
        pool: the servers; those that don't answer are quarantined.
        restart: restarts the server at a URL and returns whether its engine launched it.
    """

    def __init__(self, pool: SGLangPool, restart: Callable[[str], bool] | None) -> None:
        self._pool = pool
        self.restart = restart

    def reachable(self) -> list[SGLangClient]:
        """The servers that answer. A server that does not is left out with a warning, and needs a sync when it is back.

        Raises:
            WeightUpdateError: none answers.
        """
        outcomes = side_by_side({client.url: partial(self._check, client) for client in self._pool.clients})
        for client in self._pool.clients:
            error = outcomes[client.url].error
            if error is not None:
                self._pool.quarantine(client.url, f"it could not be reached for a weight update ({error})")
        alive = [client for client in self._pool.clients if outcomes[client.url].error is None]
        if not alive:
            raise WeightUpdateError(
                f"no server can be reached: {outcomes[self._pool.clients[0].url].error}",
                server_weights={client.url: "stuck" for client in self._pool.clients},
            )
        for client in alive:
            if self._is_stuck(client):
                self._pool.state.weights_changed(client.url, "mixed")
        return alive

    def record_failure(self, error: WeightSyncError) -> None:
        """An update failed before it reached the servers.

        Those that hang in a collective are quarantined, and the next update checks them more closely or restarts them.
        What the other servers hold is added to ``error``.
        """
        for url, weights in error.server_weights.items():
            if weights == "stuck":
                self._pool.state.weights_changed(url, "stuck")
                if url not in self._pool.quarantined:
                    self._pool.quarantine(url, f"it hangs after a failed update ({error})")
        for client in self._pool.clients:
            error.server_weights.setdefault(client.url, "old" if self._is_routed(client) else "mixed")

    def _is_routed(self, client: SGLangClient) -> bool:
        return self._pool.state.server(client.url).is_routed

    def _is_stuck(self, client: SGLangClient) -> bool:
        return self._pool.state.server(client.url).weights == "stuck"

    def _check(self, client: SGLangClient) -> None:
        try:
            with suppress(RequestRejectedError):  # a paused server answers 503, which is an answer
                client.send(build_ready())
            if self._is_stuck(client) or not self._is_routed(client):
                _require_scheduler(client)
            held = client.weight_version()
            if is_outdated(held, self._pool.state.server(client.url)):
                self._pool.state.replaced_elsewhere(client.url, held)
        except ServerError:
            restarts = self._pool.state.server(client.url).restarts
            with self._pool.update_lock.as_helper():
                if self.restart is None or not self.restart(client.url):
                    raise
            info = client.connect()
            if self._pool.state.server(client.url).restarts == restarts:
                self._pool.state.restarted(client.url, info.weight_version)


def _require_scheduler(client: SGLangClient) -> None:
    """Send a request that only the scheduler can answer: a server stuck in a collective still answers ``/ready``.

    Raises:
        ServerTimeoutError: it is stuck.
    """
    client.send(SERVER_INFO, timeout_s=min(_STUCK_TIMEOUT_S, client.config.probe_timeout_s))
