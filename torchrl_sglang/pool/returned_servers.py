"""Puts servers to use again that were gone and answer now: their processes are new, and may differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ConfigError, ServerError, SGLangError
from torchrl_sglang.pool.checks import refuse_unlike
from torchrl_sglang.pool.state import PoolState, ServerState
from torchrl_sglang.pool.update_lock import UpdateLock
from torchrl_sglang.protocol.messages import ServerInfo

__all__ = ["ReturnedServers"]


class Members(Protocol):
    """What this module needs of the pool."""

    state: PoolState
    update_lock: UpdateLock
    weight_sync: Any

    @property
    def clients(self) -> tuple[SGLangClient, ...]:
        """The servers."""

    @property
    def known_infos(self) -> Sequence[ServerInfo]:
        """What the members have reported of themselves."""

    def restore(
        self, url: str, *, based_on: ServerState, new_process_with: str | None = None, updated_to: str | None = None
    ) -> bool:
        """Put a server into routing."""


class ReturnedServers:
    """Decides about servers of one pool that answer again.

    Args:
        pool: whose servers they are.
    """

    def __init__(self, pool: Members) -> None:
        self._pool = pool

    def use(self, before: ServerState, version: str) -> None:
        """Use a server again that answers and holds current weights.

        Args:
            before: its record from before it was asked.
            version: version string that it reports.

        Raises:
            SGLangError: it can't be used, which its record says now.
        """
        pool = self._pool
        client = next((each for each in pool.clients if each.url == before.url), None)
        if client is None:
            return
        if pool.state.weights.adapter is not None:
            self._give_adapter(client, before, version)
            return
        try:
            if before.phase in ("dirty", "joining"):
                pool.restore(before.url, based_on=before, updated_to=version)
                return
            self.reconnect(client)
            pool.restore(before.url, based_on=before, new_process_with=version)
        except SGLangError as error:
            pool.state.came_back_different(before, str(error))
            raise

    def _give_adapter(self, client: SGLangClient, before: ServerState, version: str) -> None:
        """A new process has no adapter: it gets that of the last push, if this process sends weights.

        An update under way brings it too, or a later look does.
        """
        pool, state = self._pool, self._pool.state
        if not pool.update_lock.acquire(timeout=0):
            return
        try:
            if state.server(before.url).revision != before.revision:
                return
            sync = pool.weight_sync
            if sync is None:
                raise ServerError(_lacks_adapter("what has sent it is closed"), server=client.url)
            self.reconnect(client)
            state.restarted(before.url, version)
            if sync.bring_up_to_date([client]):
                raise ServerError(_lacks_adapter("what was pushed last is no adapter"), server=client.url)
        except SGLangError as error:
            state.came_back_different(state.server(before.url), str(error))
            raise
        finally:
            pool.update_lock.release()

    def reconnect(self, client: SGLangClient) -> ServerInfo:
        """See :meth:`SGLangPool.reconnect`."""
        before, updates = client.known_info, self._pool.weight_sync is not None
        members = self._pool.known_infos

        def check(info: ServerInfo) -> None:
            if members:
                refuse_unlike([info], members, updates=updates)
            if before is None:
                return
            if self._pool.state.weights.version == 0 and not updates and info.model_path != before.model_path:
                raise ConfigError(
                    f"{info.url} has come back with another checkpoint, {info.model_path!r} instead of "
                    f"{before.model_path!r}: start it with the one that it had, or make a new pool"
                )

        return client.connect(check)


def _lacks_adapter(why: str) -> str:
    """Why a server that answers again gets no requests."""
    return f"it answers again, without the adapter that requests use, and {why}: the next weight update puts it to use"
