"""Finds servers whose process was replaced while this pool sent them nothing: another model may be there now.

Once weights were synced, the version in a reply shows it. Before, only the server's own information does.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import SGLangError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool.checks import process_mark
from torchrl_sglang.pool.state import PoolState
from torchrl_sglang.protocol.dialect import SERVER_INFO

__all__ = ["ReplacedServers"]

_QUIET_S = 5.0
"""A server takes longer to start, and a request during the start would have found it dead."""
_TIMEOUT_S = 2.0
"""A server that is busy for longer was there before."""


class ReplacedServers:
    """Asks servers that were not heard of for a while whether they are the same processes.

    Args:
        state: the pool's records.
        look: called with replaced servers, which are recorded as dead; puts those to use that fit.
    """

    def __init__(self, state: PoolState, look: Callable[[Sequence[SGLangClient]], None]) -> None:
        self._state = state
        self._look = look
        self._lock = threading.Lock()
        self._asked_at: dict[str, float] = {}

    def find(self, clients: Sequence[SGLangClient]) -> None:
        """Look for replaced servers, if a reply would not show them; waits for a look of another thread.

        Args:
            clients: all servers of the pool.
        """
        if self._state.weights.newest_seen.number > 0 or not any(map(self._is_quiet, clients)):
            return
        with self._lock:
            quiet = {client.url: client for client in clients if self._is_quiet(client)}
            outcomes = side_by_side({url: partial(_is_replaced, client) for url, client in quiet.items()})
            # Also of those that have not answered: else each waiting thread would ask them again, one after the other.
            self._asked_at.update(dict.fromkeys(quiet, time.monotonic()))
            replaced = [quiet[url] for url, outcome in outcomes.items() if outcome.value]
            for client in replaced:
                self._state.died(client.url, "its process was replaced while nothing was sent to it")
            if replaced:
                self._look(replaced)

    def _is_quiet(self, client: SGLangClient) -> bool:
        latest = max(client.heard_at, self._asked_at.get(client.url, -math.inf))
        is_due = time.monotonic() - latest > _QUIET_S and client.num_generating == 0
        return is_due and client.known_info is not None and self._state.server(client.url).is_routed


def _is_replaced(client: SGLangClient) -> bool:
    """Whether another process answers now. One that does not answer is left to the next request."""
    known = client.known_info
    try:
        now = client.send(SERVER_INFO, timeout_s=min(_TIMEOUT_S, client.config.probe_timeout_s))
    except SGLangError:
        return False
    return known is not None and isinstance(now, dict) and process_mark(now) != process_mark(known.raw)
