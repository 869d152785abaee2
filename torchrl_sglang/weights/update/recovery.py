"""What becomes of the servers when an update or its verification fails: each gets the best state it can still reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import RequestRejectedError, ServerWeights, SGLangError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol import control
from torchrl_sglang.protocol.dialect import MODEL_INFO
from torchrl_sglang.weights.group.process_group import WeightGroup

__all__ = ["Recovery"]

_CLEANUP_TIMEOUT_S = 5.0
"""For control calls after a failure: a server that needs longer is waiting inside a collective."""


class Recovery:
    """Cleans up after one update, and records what each server holds then in the pool's state.

    Args:
        pool: the servers.
        clients: those that the update goes to.
        dirty: the dirty version that it marks them with.
        groups: process groups that it goes over.
    """

    def __init__(
        self, pool: SGLangPool, clients: Sequence[SGLangClient], *, dirty: str, groups: Sequence[WeightGroup]
    ) -> None:
        self._pool = pool
        self._state = pool.state
        self._clients = tuple(clients)
        self._dirty = dirty
        self._groups = tuple(groups)
        self._processes = {client.url: pool.state.server(client.url).restarts for client in clients}

    @property
    def _server_weights(self) -> dict[str, ServerWeights]:
        return {client.url: self._state.server(client.url).weights for client in self._clients}

    def withdraw(self, clients: Sequence[SGLangClient], reason: str) -> None:
        """Pause servers that failed the verification, and mark them dirty again."""
        self._take_out({client.url: reason for client in clients})
        side_by_side({client.url: partial(self._withdraw, client) for client in clients})

    def clean_up(self, error: BaseException) -> None:
        """Bring every server into the best state that it can still reach, and record that state."""
        for group in self._groups:
            group.drop()  # closes the trainer's connections: servers that wait for its bytes are freed
        # Quarantined before their requests are aborted: a request that is answered as aborted is routed again.
        self._quarantine("mixed", error=error)
        side_by_side({client.url: self._leaving(client) for client in self._clients})
        self._quarantine("mixed", "stuck", error=error)

    def _quarantine(self, *states: ServerWeights, error: BaseException) -> None:
        what = str(error) or type(error).__name__
        reasons = {
            url: f"its weights are {weights} after a failed update ({what})"
            for url, weights in self._server_weights.items()
            if weights in states
        }
        self._take_out({url: reason for url, reason in reasons.items() if self._state.server(url).reason != reason})

    def _take_out(self, reasons: Mapping[str, str]) -> None:
        """Quarantine servers; a router is told of all of them at the same time."""
        calls = {url: partial(self._pool.quarantine, url, reason) for url, reason in reasons.items()}
        for outcome in side_by_side(calls).values():
            outcome.unwrap()

    def is_replaced(self, client: SGLangClient) -> bool:
        """Whether a server's process has ended since this update began: nothing of it may reach the next one."""
        known = self._state.server(client.url)
        return known.is_restarting or known.restarts != self._processes[client.url]

    def _leaving(self, client: SGLangClient) -> Callable[[], None]:
        def leave() -> None:
            known = self._state.server(client.url)
            if known.weights == "new":
                return
            if self.is_replaced(client):
                if known.is_restarting:
                    self._state.weights_changed(client.url, "stuck")
                return
            timeout_s = min(_CLEANUP_TIMEOUT_S, client.config.control_timeout_s)
            try:
                for group in self._groups:
                    # First: a healthy server may be waiting for this one in a broadcast.
                    if client in group.clients:
                        with suppress(RequestRejectedError):
                            group.leave(client, timeout_s)
                if known.session_open:
                    client.send(control.build_end_update(), timeout_s=timeout_s)
                    self._state.session_closed(client.url)
                if known.weights == "old":
                    if known.version_before and not self._unmark(client, known.version_before, timeout_s):
                        return
                    client.send(control.build_continue(), timeout_s=timeout_s)
                    self._state.update_abandoned(client.url)
                else:
                    # Its requests answer with the tokens they have instead of waiting for weights that don't come.
                    client.send(control.build_abort(), timeout_s=timeout_s)
            except RequestRejectedError:
                self._state.weights_changed(client.url, "mixed")
            except SGLangError:
                self._state.weights_changed(client.url, "stuck")

        return leave

    def _unmark(self, client: SGLangClient, version_before: str, timeout_s: float) -> bool:
        """Give a server its version back. ``False`` if it is a new process by now, with its checkpoint's weights."""
        held = str(client.send(MODEL_INFO, timeout_s=timeout_s)["weight_version"])
        if held == self._dirty:
            client.send(control.build_set_version(version_before), timeout_s=timeout_s)
        elif held != version_before:
            self._state.replaced_elsewhere(client.url, held)
            self._state.weights_changed(client.url, "mixed")
            return False
        return True

    def _withdraw(self, client: SGLangClient) -> None:
        self._state.weights_changed(client.url, self._mark_dirty(client))

    def _mark_dirty(self, client: SGLangClient) -> ServerWeights:
        timeout_s = min(_CLEANUP_TIMEOUT_S, client.config.control_timeout_s)
        try:
            client.send(control.build_pause("abort"), timeout_s=timeout_s)
            client.send(control.build_set_version(self._dirty), timeout_s=timeout_s)
        except SGLangError:
            return "stuck"
        return "mixed"
