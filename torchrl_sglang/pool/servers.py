"""The servers of a pool: who they are, which of them take requests, and who joins and leaves."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.config.checking import require
from torchrl_sglang.errors import ConfigError, ServerError, SGLangError
from torchrl_sglang.forks import renew_in_forked_children
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool.balanced_addresses import refuse_balanced_addresses
from torchrl_sglang.pool.checks import refuse_different_models, refuse_same_server
from torchrl_sglang.pool.copied_members import CopiedMembers
from torchrl_sglang.pool.dead_servers import DeadServerTracker
from torchrl_sglang.pool.member_file import MemberFile
from torchrl_sglang.pool.membership import Membership
from torchrl_sglang.pool.replaced_servers import ReplacedServers
from torchrl_sglang.pool.returned_servers import ReturnedServers
from torchrl_sglang.pool.router_client import RouterClient
from torchrl_sglang.pool.state import PoolState, ServerState
from torchrl_sglang.pool.update_lock import UpdateLock
from torchrl_sglang.protocol.messages import ServerInfo
from torchrl_sglang.server_url import url_list

__all__ = ["PoolServers"]

_POLL_S = 0.2
_CLOSE_PATIENCE_S = 2.0


class PoolServers:
    """What :class:`SGLangPool` is without generation; see there."""

    def __init__(self, clients: Sequence[SGLangClient], *, router: RouterClient | None = None) -> None:
        if not clients:
            raise ConfigError("a pool needs at least one server")
        urls = [client.url for client in clients]
        if len(set(urls)) != len(urls):
            raise ConfigError(f"the same server is named twice: {urls}")
        self.router = router
        self._init_runtime(clients)

    def _init_runtime(self, clients: Sequence[SGLangClient], copied_from: MemberFile | None = None) -> None:
        self.state = PoolState(client.url for client in clients)
        self._membership = Membership(self, clients, copied_from)
        self._copied = None if copied_from is None else CopiedMembers(self, self._membership, copied_from)
        self.update_lock = UpdateLock()
        self._weight_sync: weakref.ref[Any] | None = None
        self._connected = False
        self._returned = ReturnedServers(self)
        self._dead_servers = DeadServerTracker(self.state, self._returned.use, self._membership.current_versions)
        self._replaced = ReplacedServers(self.state, self._look_at_replaced)
        renew_in_forked_children(self)

    def renew_after_fork(self) -> None:
        """Start with a state and locks of its own, as a pickled copy does; called in a forked child."""
        self._init_runtime(self.clients, self._membership.file_of_copies())

    def __getstate__(self) -> dict[str, Any]:
        clients = self._membership.for_copies() or self.clients
        file = self._membership.file_of_copies()
        return {"clients": clients, "router": self.router, "members": file.path, "common": file.common}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.router = state["router"]
        self._init_runtime(state["clients"], MemberFile(state["members"], state["common"]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({[client.url for client in self.clients]})"

    # ------------------------------------------------------------------ the servers

    @property
    def clients(self) -> tuple[SGLangClient, ...]:
        """All servers, also quarantined ones, and those that are about to leave."""
        return self._membership.clients

    def add(self, urls: str | Iterable[str], *, client: ClientConfig | None = None) -> tuple[str, ...]:
        """Take running servers into the pool, while the others generate.

        A newcomer gets requests when it holds the weights that the others hold: at once if it holds them already, or
        if they can be sent to it now (see :meth:`WeightSync.bring_up_to_date`); otherwise after the next weight update,
        which it takes part in. Only the newcomer is paused for it. A weight update under way is waited for.

        Args:
            urls: base URL, or several.
            client: how to talk to them: their keys, certificate and time-outs. ``None`` is as with the first server.

        Returns:
            Their base URLs.

        Raises:
            ConfigError: a server is a member already, serves another model, or was started with other settings that
                matter here; or the others' GPU memory is offloaded; or there is a router, and the key is another one.
                The pool is as before.
            ServerError: a server can't be reached, or ended while it was brought up to date. The pool is as before.
        """
        return self._membership.add(url_list(urls), client)

    def remove(self, urls: str | Iterable[str], *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take servers out of the pool, while the others generate. The processes go on running.

        They get no new requests. Those that they have are finished, or generated again by the other servers: each
        prompt gets its answer once.

        Args:
            urls: base URL, or several.
            drain: wait until they have finished the requests that they have, also those of other clients. With
                ``False`` their requests are aborted now.
            timeout_s: longest wait, in seconds; what is unfinished then is aborted. ``None`` is the longest time that a
                request may take.

        Raises:
            ConfigError: a server is no member, no other one would be left that takes requests, or GPU memory is
                offloaded. Nothing was changed.
        """
        self.take_out(url_list(urls), drain=drain, timeout_s=timeout_s)

    def take_out(
        self,
        urls: Sequence[str],
        *,
        drain: bool,
        timeout_s: float | None,
        on_left: Callable[[str], None] = lambda url: None,
    ) -> None:
        """:meth:`remove`, for the owner of the processes.

        Args:
            urls: base URLs.
            drain: as there.
            timeout_s: as there.
            on_left: called for each server when nothing is sent to it any more.
        """
        require(isinstance(drain, bool), f"drain must be True or False, got {drain!r}")
        self._membership.remove(urls, drain=drain, timeout_s=timeout_s, on_left=on_left)

    def _follow_original(self, patience_s: float = 0) -> None:
        """In a copy, adopt which servers have joined and left the original."""
        if self._copied is not None:
            self._copied.refresh(patience_s)

    def refuse_in_copy(self) -> None:
        """Raise if this pool is a copy: servers join and leave through the original.

        Raises:
            ConfigError: it is one.
        """
        self._membership.refuse_in_copy()

    def connect(self) -> None:
        """Ask every server what it serves, once.

        A server whose weights are half-updated (its version is marked dirty) gets no requests until the update that
        another process has begun is over, or until a full sync. A copy of a pool, whose servers have answered before,
        does with those that answer now.

        Raises:
            ServerUnreachableError: a server (or the router) does not listen.
            ConfigError: the servers serve different models, or one that does not generate, or two URLs lead to one
                server, or one URL to several.
            ServerTimeoutError: the router does not admit a server.
        """
        if self._connected:
            return
        self._follow_original()
        clients = self.clients  # of a copy, more may join meanwhile
        outcomes = side_by_side({client.url: client.connect for client in clients})
        errors = {url: outcome.error for url, outcome in outcomes.items()}
        if self._copied is not None and None in errors.values():
            for url in [url for url, error in errors.items() if isinstance(error, ServerError)]:
                del outcomes[url]
                self.state.died(url, f"it did not answer when this copy of the pool connected ({errors[url]})")
        clients = tuple(client for client in clients if client.url in outcomes)
        infos = [outcomes[client.url].unwrap() for client in clients]
        refuse_balanced_addresses(clients)
        refuse_different_models(infos)
        refuse_same_server(infos)
        for info in infos:
            if info.weight_version.startswith("dirty-"):
                held = info.weight_version
                self.state.found_dirty(
                    info.url,
                    f"it holds half-updated or unverified weights ({held}): another process is updating it, or died in "
                    "an update, or the update failed its verification; then servers.update_weights(model) heals it",
                )
        self.state.connected({info.url: info.weight_version for info in infos})
        if self.router is not None:
            self.router.join([client.url for client in self.healthy])
        self._connected = True

    @property
    def info(self) -> ServerInfo:
        """What the first server reports of itself; connects on first use."""
        self.connect()
        return self.known_infos[0]

    @property
    def known_infos(self) -> Sequence[ServerInfo]:
        """What the servers have reported of themselves when they were last asked, without those that never answered."""
        infos = [client.known_info for client in self.clients]
        return [info for info in infos if info is not None]

    @property
    def vocab_size(self) -> int | None:
        """Number of valid token ids: the smallest over the servers."""
        return self._smallest("vocab_size")

    @property
    def max_prompt_tokens(self) -> int | None:
        """Longest prompt that every server takes."""
        return self._smallest("max_prompt_tokens")

    @property
    def context_length(self) -> int | None:
        """Prompt plus response limit that holds on every server."""
        return self._smallest("context_length")

    def _smallest(self, name: str) -> int | None:
        self.connect()
        values = [getattr(info, name) for info in self.known_infos]
        return min((value for value in values if value is not None), default=None)

    @property
    def weight_version(self) -> int:
        """Version number of the weights that the last finished sync put on the servers (:class:`WeightState`)."""
        return self.state.weights.version

    @property
    def weight_sync(self) -> Any:
        """The :class:`~torchrl_sglang.WeightSync` through which weights are sent to these servers, or ``None``.

        The pool keeps a weak reference: the object lives as long as its users.
        """
        return None if self._weight_sync is None else self._weight_sync()

    @weight_sync.setter
    def weight_sync(self, sync: Any) -> None:
        self._weight_sync = None if sync is None else weakref.ref(sync)

    # ------------------------------------------------------------------ routing

    @property
    def healthy(self) -> tuple[SGLangClient, ...]:
        """The servers that requests are routed to."""
        return tuple(client for client in self.clients if self.state.server(client.url).is_routed)

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Servers that get no requests, with the reason."""
        return {url: server.why_not_routed for url, server in self.state.servers.items() if not server.is_routed}

    def quarantine(self, url: str, reason: str) -> ServerState:
        """Take a server out of routing until a weight update or :meth:`restore`.

        Returns:
            Its new state, for a later :meth:`restore`.
        """
        known = self.state.quarantined(url, reason)
        self.leave_router(url)
        return known

    def restore(
        self, url: str, *, based_on: ServerState, new_process_with: str | None = None, updated_to: str | None = None
    ) -> bool:
        """Put a server back into routing.

        Args:
            url: the server.
            based_on: its state when the caller found it fit to serve. If its state has changed since (for example
                because an update has quarantined it), the finding is out of date and the server stays as it is.
            new_process_with: the version it holds, if it was found to be a new process.
            updated_to: the version it holds, if another process was found to have updated it.

        Returns:
            Whether the finding was up to date: the server is routed now.

        Raises:
            ServerTimeoutError: the router does not admit it.
        """
        if self.router is not None and self.state.server(url).revision == based_on.revision:
            self.router.join([url])
        restored = self.state.restored(url, based_on=based_on, new_process_with=new_process_with, updated_to=updated_to)
        if not restored and not self.state.server(url).is_routed:
            self.leave_router(url)
        if restored:
            self._membership.served(url)
        return restored

    def join_router(self, url: str) -> None:
        """Tell the router, if there is one, that a server gets requests."""
        if self.router is not None:
            self.router.join([url])

    def leave_router(self, url: str) -> None:
        """Tell the router, if there is one, that a server gets no requests."""
        if self.router is not None:
            self.router.leave(url)

    def record_death(self, url: str, error: SGLangError) -> None:
        """Take a server that a request found gone out of routing; later requests look whether it is back."""
        self.state.died(url, f"it died while generating ({error})")
        self._dead_servers.postpone(url)
        self.leave_router(url)

    def poll_dead_servers(self) -> None:
        """Poll dead and dirty servers, at most every few seconds, and restore those that hold the current weights.

        Servers that were not heard of for a while are asked whether they are the same processes, where no reply shows
        it. If no server is left and another process is updating some, wait for it: as long as one step of an update may
        take (``ClientConfig.update_timeout_s``).
        """
        self._follow_original()
        self._replaced.find(self.clients)
        self._dead_servers.poll(self.clients)
        deadline = time.monotonic() + max(client.config.update_timeout_s for client in self.clients)
        while not self.healthy and self._is_updated_elsewhere and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            self._dead_servers.poll(self.clients)

    def _look_at_replaced(self, clients: Sequence[SGLangClient]) -> None:
        for client in clients:
            self.leave_router(client.url)
        self._dead_servers.ask(clients)

    @property
    def _is_updated_elsewhere(self) -> bool:
        return any(server.phase == "dirty" for server in self.state.servers.values())

    def reconnect(self, client: SGLangClient) -> ServerInfo:
        """Ask a member whose process was replaced what it serves now, and how.

        Raises:
            ConfigError: another model than before, or with settings that don't fit the other servers. What is known
                of it stays as it was.
            ServerError: it does not answer.
        """
        return self._returned.reconnect(client)

    def offload(self, url: str, tags: Iterable[str] = ()) -> None:
        """Take a server out of routing because it is about to release GPU memory, or has released ``tags`` of it."""
        self.state.memory_released(url, tags, "its GPU memory is offloaded: resume_memory() takes it back")
        self.leave_router(url)

    def refuse_while_offloaded(self) -> None:
        """Weights can't be sent to memory that is released, and no server joins, leaves or is started meanwhile.

        Raises:
            ConfigError: a server's memory is offloaded.
        """
        if offloaded := self.state.offloaded_urls:
            raise ConfigError(f"the GPU memory of {', '.join(offloaded)} is offloaded: resume_memory() first")

    def require_healthy(self, consequence: str) -> Sequence[SGLangClient]:
        """The servers to send to.

        Args:
            consequence: what it means that none is left, for the error.

        Raises:
            ServerError: none is left; says why for each one.
        """
        clients = self.healthy
        if not clients:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self.quarantined.items())
            raise ServerError(f"no server is left, {consequence}. {reasons}")
        return clients

    def close(self) -> None:
        """Close all idle connections. A look at dead servers that is under way is waited for, for a moment."""
        self._dead_servers.join(_CLOSE_PATIENCE_S)
        for client in self.clients:
            client.close()
        if self.router is not None:
            self.router.close()
