"""Servers that join and leave a pool while it generates.

A newcomer gets no requests until it holds the weights that the others hold. A server that leaves gets no new requests;
it finishes those that it has, or they are generated elsewhere. Copies of the pool learn of both from a file
(:mod:`.copied_members`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.config.checking import require, require_number
from torchrl_sglang.errors import ConfigError, ServerError, SGLangError
from torchrl_sglang.parallel import failure_of, side_by_side
from torchrl_sglang.pool.balanced_addresses import refuse_balanced_addresses
from torchrl_sglang.pool.checks import refuse_newcomers, refuse_same_server
from torchrl_sglang.pool.draining import abort_all, await_idle
from torchrl_sglang.pool.member_file import MemberFile
from torchrl_sglang.pool.router_client import RouterClient
from torchrl_sglang.pool.state import PoolState, ServerState
from torchrl_sglang.pool.update_lock import UpdateLock
from torchrl_sglang.protocol.messages import ServerInfo
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["Membership"]

_log = logging.getLogger(__name__)

_POLL_S = 0.05
_MAX_ASKED = 8
"""That many servers are asked which weights they hold; more know nothing else."""
_WAITS = "it has joined, and does not hold the current weights yet; the next weight update brings them"


class Members(Protocol):
    """What this module needs of the pool."""

    state: PoolState
    update_lock: UpdateLock
    weight_sync: Any
    router: RouterClient | None

    @property
    def healthy(self) -> tuple[SGLangClient, ...]:
        """The servers that requests are routed to."""

    @property
    def known_infos(self) -> Sequence[ServerInfo]:
        """What the members have reported of themselves."""

    def connect(self) -> None:
        """Connect the members."""

    def restore(
        self, url: str, *, based_on: ServerState, new_process_with: str | None = None, updated_to: str | None = None
    ) -> bool:
        """Put a server into routing."""

    def leave_router(self, url: str) -> None:
        """Tell the router that a server gets nothing more."""

    def join_router(self, url: str) -> None:
        """Tell the router that a server gets requests."""

    def refuse_while_offloaded(self) -> None:
        """Raise if GPU memory is released."""


class Membership:
    """The members of one pool, and their changes.

    Args:
        pool: whose members they are.
        clients: the members.
        copied_from: the file of the pool that this one is a copy of; ``None`` for an original.

    Attributes:
        clients: the members; replaced as a whole.
    """

    def __init__(self, pool: Members, clients: Sequence[SGLangClient], copied_from: MemberFile | None = None) -> None:
        self.clients = tuple(clients)
        self._pool = pool
        self._file = copied_from or MemberFile(common=clients[0].config)
        self._is_copy = copied_from is not None
        self._served = {client.url for client in clients}
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._joins: dict[str, int] = {}

    def file_of_copies(self) -> MemberFile:
        """What a copy of the pool reads."""
        return MemberFile(self._file.path, self._file.common)

    # ------------------------------------------------------------------ joining

    def add(self, urls: Sequence[str], config: ClientConfig | None = None) -> tuple[str, ...]:
        """See :meth:`SGLangPool.add`."""
        self.refuse_in_copy()
        if not urls:
            raise ConfigError("name at least one server to add")
        pool, common = self._pool, self.clients[0].config
        config = common if config is None else config
        require(isinstance(config, ClientConfig), f"client must be a ClientConfig, got a {type(config).__name__}")
        require(
            pool.router is None or config.api_key == common.api_key,
            "a router sends one key to all its servers: start the new ones with the key of the others",
        )
        new = [SGLangClient(url, config) for url in urls]
        self._refuse_members(new)
        pool.refuse_while_offloaded()
        pool.connect()
        outcomes = side_by_side({client.url: client.connect for client in new})
        infos = [outcomes[client.url].unwrap() for client in new]
        refuse_balanced_addresses(new)
        refuse_same_server(infos, pool.known_infos)
        sync = pool.weight_sync
        heals = sync is not None and pool.state.weights.adapter is None
        refuse_newcomers(
            infos,
            pool.known_infos,
            updates=sync is not None,
            is_left_behind=lambda version: heals and sync.is_left_behind(version),
        )
        with contextlib.ExitStack() as on_failure:
            with pool.update_lock:
                with self._lock:
                    self._refuse_members(new)
                    refuse_same_server(infos, pool.known_infos)
                    pool.refuse_while_offloaded()
                    for info in infos:
                        pool.state.joined(info.url, info.weight_version, _WAITS)
                        self._joins[info.url] = self._joins.get(info.url, 0) + 1
                    self.clients = (*self.clients, *new)
                on_failure.callback(self.forget, new)
                self._bring_up_to_date(new)
            on_failure.pop_all()
        self.publish()
        return tuple(client.url for client in new)

    def _refuse_members(self, new: Sequence[SGLangClient]) -> None:
        """Require that no server is named that is a member already.

        Raises:
            ConfigError: one is.
        """
        known = {client.url for client in self.clients}
        for client in new:
            if client.url in known:
                raise ConfigError(f"{client.url} is a server of this pool already")
            known.add(client.url)

    def _bring_up_to_date(self, new: Sequence[SGLangClient]) -> None:
        """Route requests to the newcomers that hold the current weights, or can get them now."""
        pool = self._pool
        sync = pool.weight_sync
        waiting = list(new)
        if pool.state.weights.adapter is None:
            current = self.current_versions()
            for client in new:
                held = client.weight_version()
                if held in current and pool.restore(
                    client.url, based_on=pool.state.server(client.url), updated_to=held
                ):
                    waiting.remove(client)
        healed_later = [each for each in waiting if pool.state.server(each.url).weights == "mixed"]
        waiting = [each for each in waiting if each not in healed_later]
        if waiting and sync is not None:
            waiting = sync.bring_up_to_date(waiting)
        waiting += healed_later
        for client in waiting:
            _log.warning("%s has joined; it gets requests after the next weight update", client.url)

    def current_versions(self) -> set[str]:
        """The version strings under which routed servers hold the current weights."""
        state = self._pool.state
        asked = self._pool.healthy[:_MAX_ASKED]
        outcomes = side_by_side({client.url: client.weight_version for client in asked}) if asked else {}
        held = {outcome.value for outcome in outcomes.values() if outcome.value is not None}
        if not held:  # nobody answers: what is known of them
            weights = state.weights
            held = {each.version for each in state.servers.values() if each.phase != "joining"}
            return {version for version in held if weights.is_as_new(WeightVersion.parse(version))}
        newest = max(WeightVersion.parse(version).number for version in held)
        return {version for version in held if _is_version(version, newest)}

    def forget(self, clients: Sequence[SGLangClient]) -> None:
        """Take servers off the list."""
        urls = {client.url for client in clients}
        with self._lock:
            self.clients = tuple(client for client in self.clients if client.url not in urls)
            for url in urls:
                self._pool.state.left(url)
            self._served -= urls
        for client in clients:
            self._pool.leave_router(client.url)
            client.close()

    def take_in(self, client: SGLangClient, version: str) -> ServerState | None:
        """In a copy, put a server on the list that holds this version; ``None`` if it is there already."""
        with self._lock:
            if any(each.url == client.url for each in self.clients):
                return None
            known = self._pool.state.joined(client.url, version, _WAITS)
            self.clients = (*self.clients, client)
            return known

    def came_again(self, servers: Mapping[str, ClientConfig | None]) -> None:
        """In a copy, servers have left the original and joined it again, perhaps with other keys."""
        common = self.clients[0].config
        with self._lock:
            new = {url: SGLangClient(url, config or common) for url, config in servers.items()}
            self.clients = tuple(new.get(client.url, client) for client in self.clients)
            for url in new:
                self._pool.state.came_again(url)

    # ------------------------------------------------------------------ leaving

    def remove(
        self,
        urls: Sequence[str],
        *,
        drain: bool = True,
        timeout_s: float | None = None,
        on_left: Callable[[str], None] = lambda url: None,
    ) -> None:
        """See :meth:`SGLangPool.remove`; ``on_left`` is called for each server after its last request."""
        self.refuse_in_copy()
        self._pool.refuse_while_offloaded()  # one that leaves paused would stay so
        require_number("timeout_s", timeout_s, optional=True, at_least=0)
        leaving = self._start_leaving(urls)
        limits = [client.config.generate_limit_s() for client in leaving]
        deadline = time.monotonic() + (max(limits) if timeout_s is None else timeout_s)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._stay, leaving)
            self.publish()
            for client in leaving:
                self._pool.leave_router(client.url)
            busy = await_idle(leaving, deadline) if drain else list(leaving)
            with self._lock_while_memory_is_there():
                pass
            on_failure.pop_all()
        with contextlib.ExitStack() as at_any_rate:  # from here on there is no way back, also on Ctrl-C
            at_any_rate.callback(self._end, leaving, on_left)
            abort_all(busy)

    def _start_leaving(self, urls: Sequence[str]) -> list[SGLangClient]:
        state = self._pool.state
        with self._lock:
            members = {client.url: client for client in self.clients}
            wanted = {SGLangClient(url).url for url in urls}
            if not wanted:
                raise ConfigError("name at least one server to remove")
            for url in wanted:
                if url not in members:
                    raise ConfigError(f"{url} is no server of this pool; its servers are {', '.join(members)}")
                if state.server(url).is_leaving:
                    raise ConfigError(f"{url} is being removed already")
            stay = [state.server(url) for url in members if url not in wanted and not state.has_left(url)]
            if not stay:
                raise ConfigError("a pool needs at least one server: add another one before you remove the last")
            serves = any(state.server(url).is_routed for url in wanted)
            if serves and not any(server.is_routed for server in stay):
                reasons = "; ".join(f"{server.url}: {server.why_not_routed}" for server in stay)
                raise ConfigError(
                    f"{', '.join(sorted(wanted))} can't be removed: no other server takes requests ({reasons})"
                )
            for url in wanted:
                state.leaving(url)
            return [members[url] for url in members if url in wanted]

    def _stay(self, clients: Sequence[SGLangClient]) -> None:
        """The removal was interrupted before anything was lost: the servers stay."""
        for client in clients:
            if self._pool.state.leaving(client.url, is_leaving=False).is_routed:
                with contextlib.suppress(SGLangError):
                    self._pool.join_router(client.url)
        self.publish()

    @contextlib.contextmanager
    def _lock_while_memory_is_there(self) -> Iterator[None]:
        """Hold the update lock, not while GPU memory is offloaded: what was paused for it continues first."""
        while True:
            with self._pool.update_lock:
                if not self._pool.state.offloaded_urls:
                    yield
                    return
            time.sleep(_POLL_S)

    def _end(self, clients: Sequence[SGLangClient], on_left: Callable[[str], None]) -> None:
        """Take servers out, all of them, whatever fails on the way.

        Raises:
            ServerError: ``on_left`` has failed for several servers; names each. The error of a single one is raised
                as it is.
        """
        for client in clients:
            client.cut()  # what is still under way there is generated elsewhere
        with self._lock_while_memory_is_there():  # also, an update under way still counts on them
            sync = self._pool.weight_sync
            unclean = None if sync is None else failure_of(sync.servers_leave)
            self.forget(clients)
        failures = {client.url: failure_of(partial(on_left, client.url)) for client in clients}
        self.publish()
        failed = {url: error for url, error in failures.items() if error is not None}
        if len(failed) > 1 and all(isinstance(error, Exception) for error in failed.values()):
            listed = "; ".join(f"{url}: {error}" for url, error in failed.items())
            raise ServerError(
                f"all {len(clients)} servers have left the pool, but {len(failed)} could not be ended: {listed}"
            ) from next(iter(failed.values()))
        errors = [error for error in (*failed.values(), unclean) if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Exception)):  # Ctrl-C first
            raise error

    # ------------------------------------------------------------------ copies

    def refuse_in_copy(self) -> None:
        """Raise if this pool is a copy, whose members are those of the original."""
        if self._is_copy:
            raise ConfigError(
                "this pool is a copy, in another process or of a copied object: servers join and leave through the "
                "original, and its copies on the same machine follow"
            )

    def served(self, url: str) -> None:
        """A server gets requests: copies may use it from now on."""
        if url not in self._served:
            self._served.add(url)
            self.publish()

    def for_copies(self) -> tuple[SGLangClient, ...]:
        """The members that a copy may use: not those that wait for the weights of the others, and that leave."""
        usable = self._served if self._pool.weight_sync is not None else {client.url for client in self.clients}
        has_left = self._pool.state.has_left
        return tuple(client for client in self.clients if client.url in usable and not has_left(client.url))

    def publish(self) -> None:
        """Write down for copies which servers there are."""
        if self._is_copy:
            return
        with self._publishing:  # the last one to write has read the members last
            settings = {each.url: each.config for each in self.for_copies()}
            try:
                self._file.write(settings, self._joins)
            except OSError as error:
                _log.warning(
                    "copies of this pool don't learn of its servers: %s can't be written (%s)", self._file.path, error
                )


def _is_version(version: str, number: int) -> bool:
    parsed = WeightVersion.parse(version)
    return not parsed.dirty and parsed.number == number
