"""Waits until servers that leave have no requests, or ends those that they have."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ServerTimeoutError, SGLangError
from torchrl_sglang.parallel import Task, side_by_side
from torchrl_sglang.protocol.control import build_abort, build_loads, parse_loads

__all__ = ["abort_all", "await_idle"]

_POLL_S = 0.05
_LOADS_POLL_S = 0.5
_ABORT_TIMEOUT_S = 5.0
"""A server that has not answered its aborted requests by then hangs: their connections are broken."""


def await_idle(clients: Sequence[SGLangClient], deadline: float) -> list[SGLangClient]:
    """Wait until servers have no requests; returns those that still have some at the deadline."""
    busy = list(clients)
    ask_at = 0.0
    while busy:
        idle_here = [client for client in busy if client.num_generating == 0]
        if idle_here and time.monotonic() >= ask_at:
            loads = side_by_side({client.url: _Load(client) for client in idle_here})
            busy = [client for client in busy if client.url not in loads or loads[client.url].unwrap()]
            ask_at = time.monotonic() + _LOADS_POLL_S
        if busy and time.monotonic() >= deadline:
            return busy
        if busy:
            time.sleep(_POLL_S)
    return []


def abort_all(clients: Sequence[SGLangClient]) -> None:
    """End the requests of servers; those of this process are generated elsewhere.

    It returns when the servers have answered: an abort that comes later would end requests that they get when they are
    added again.
    """
    if not clients:
        return

    def abort(client: SGLangClient) -> None:
        with contextlib.suppress(SGLangError):
            client.send(build_abort(), timeout_s=_ABORT_TIMEOUT_S)

    aborting = Task(lambda: side_by_side({client.url: partial(abort, client) for client in clients}), name="abort")
    deadline = time.monotonic() + _ABORT_TIMEOUT_S
    while time.monotonic() < deadline and (not aborting.done or any(client.num_generating for client in clients)):
        time.sleep(_POLL_S)


class _Load:
    """Whether a server has requests, of any client. One that is gone has none that could be waited for."""

    def __init__(self, client: SGLangClient) -> None:
        self._client = client

    def __call__(self) -> bool:
        try:
            legacy = not self._client.dialect.weight_session
            return parse_loads(self._client.send(build_loads(legacy=legacy))) > 0
        except ServerTimeoutError:  # it may be in the middle of a weight update
            return True
        except SGLangError:
            return False
