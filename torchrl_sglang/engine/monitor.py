"""Restarts crashed servers: within a second of the crash, and back in routing once their weights are right.

Servers start in parallel and beside weight updates. Only the last step, which decides what a new process holds and puts
it back into routing, holds the pool's update lock.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ServerStartError, SGLangError
from torchrl_sglang.parallel import Task, failure_of, side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_pause, build_set_version, build_update_from_disk, check_success
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.server import SGLangRouter, SGLangServer

__all__ = ["CrashMonitor", "admit", "restart_server"]

_log = logging.getLogger(__name__)

_POLL_S = 0.5
_MAX_RESTARTS = 3
_WINDOW_S = 600.0
"""A server that crashes a fourth time within this time has a lasting fault: it is not restarted."""
_JOIN_TIMEOUT_S = 30.0
_OFFLOADED = "it crashed while GPU memory is offloaded, and is started again after resume_memory()"


@dataclass(frozen=True, slots=True)
class _Restarts:
    """What the monitor's threads share.

    Attributes:
        ending: nothing is started any more.
        crashes: per URL when its process crashed (``time.monotonic()``).
        tasks: restarts under way, and some that have ended.
    """

    ending: threading.Event = field(default_factory=threading.Event)
    crashes: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tasks: list[Task[None]] = field(default_factory=list)


class Watched(Protocol):
    """The engine whose servers are watched. Referenced weakly: an unused engine ends its servers."""

    pool: SGLangPool
    router: SGLangRouter | None

    @property
    def launched(self) -> Sequence[tuple[SGLangClient, SGLangServer]]:
        """The servers it launched, with their clients."""


class CrashMonitor:
    """A thread that restarts crashed servers until the engine ends. No error ends it.

    Args:
        engine: owns the servers. A server that was stopped on purpose is not restarted.
    """

    def __init__(self, engine: Watched) -> None:
        self._restarts = _Restarts()
        arguments = (weakref.ref(engine), self._restarts)
        self._thread = threading.Thread(target=_watch, args=arguments, name="sglang-monitor", daemon=True)
        self._thread.start()
        # At exit the servers' finalizers, registered earlier, kill the servers: no restart may follow.
        atexit.register(self._restarts.ending.set)

    def look(self, engine: Watched) -> None:
        """Begin to restart what has crashed now, instead of within a second."""
        _begin_restarts(engine, self._restarts)

    def announce_end(self) -> None:
        """Start nothing from now on; a start under way is abandoned within about a second."""
        self._restarts.ending.set()
        atexit.unregister(self._restarts.ending.set)

    def join(self) -> None:
        """Wait until its threads have ended."""
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_TIMEOUT_S)
        for task in self._restarts.tasks:
            task.wait(max(0.0, deadline - time.monotonic()))


def restart_server(
    pool: SGLangPool, client: SGLangClient, server: SGLangServer, *, ending: threading.Event | None = None
) -> bool:
    """Kill a server if it runs, and start it at its address, with the checkpoint that it was launched from.

    It ends the restart that :meth:`PoolState.restart_begun` has announced. Where synced weights have replaced the
    checkpoint's, the new process starts with a dirty weight version: replies of it are refused, in whatever process
    they arrive, until it has been updated.

    Returns:
        Whether the checkpoint's weights were the current ones when it was started (below an adapter, if there is one).

    Raises:
        ServerStartError: it did not become ready, ``ending`` was set, or it was removed from the pool; it does not run.
    """

    def require_use(_line: str = "") -> None:
        if ending is not None and ending.is_set():
            raise ServerStartError("the engine was shut down while this server was starting", server=client.url)
        if pool.state.has_left(client.url):
            raise ServerStartError("it was removed from the pool while it was being restarted", server=client.url)

    try:
        server.kill()
        mark = _mark_of_outdated(pool, client)
        require_use()
        try:
            server.start(progress=require_use, weight_version=mark)
        finally:
            if pool.state.has_left(client.url):  # whoever has removed it may have ended the process before the start
                server.stop(kill=True)
        require_use()
        version = mark or "default"
        try:
            version = client.connect().weight_version
        finally:
            pool.state.restarted(client.url, version)  # also if it does not answer yet: the old process is gone
    finally:
        pool.state.restart_ended(client.url)
    return mark is None


def admit(pool: SGLangPool, client: SGLangClient, *, is_current: bool, update: bool) -> bool:
    """Put a server that was restarted back into routing, if it holds the current weights. The update lock is held.

    Args:
        pool: the servers.
        client: the restarted one.
        is_current: whether the checkpoint's weights were the current ones when it was started.
        update: bring it up to date, if the current weights or the adapter can be had without the next update.

    Returns:
        Whether it gets requests now. Otherwise it waits for the next weight update, paused and marked dirty.

    Raises:
        ServerError: it does not answer.
    """
    mark = _mark_of_outdated(pool, client)
    holds_current = (is_current and mark is None) or (update and _load_saved(pool, client))
    if not holds_current:
        # Requests from processes that don't know of the restart wait in the paused server for the weights.
        check_success(client.send(build_pause("abort")), server=client.url, what="pausing")
        if is_current and mark is not None:  # weights were synced while it was starting
            check_success(client.send(build_set_version(mark)), server=client.url, what="marking its weights dirty")
    if holds_current and pool.state.weights.adapter is None:
        return pool.restore(client.url, based_on=pool.state.server(client.url))
    pool.quarantine(client.url, "it was restarted; the next weight update puts it to use")
    return update and _updated(pool, client)


def _updated(pool: SGLangPool, client: SGLangClient) -> bool:
    """Send the last push's weights, or the adapter, to a restarted server, as to one that joins; whether it is routed.

    What fails is logged: the next weight update does it.
    """
    sync = pool.weight_sync
    if sync is None:
        return False
    try:
        return not sync.bring_up_to_date([client])
    except (SGLangError, OSError) as error:
        _log.warning("the restarted server at %s waits for the next weight update: %s", client.url, error)
        return False


def _mark_of_outdated(pool: SGLangPool, client: SGLangClient) -> str | None:
    """The dirty version for a server that holds the checkpoint's weights; ``None`` if these are the current ones."""
    current = _current_version(pool, client)
    # An unfinished update counts as one to the next number, see SGLangPool.connect.
    return str(WeightVersion(number=current + 1, dirty=True)) if current > 0 else None


def _current_version(pool: SGLangPool, but: SGLangClient) -> int:
    """The version that this pool last synced, or a later one that another trainer put on the servers.

    An adapter's version does not count: below it are the weights that the servers were started with.
    """
    ours = pool.weight_version if pool.state.weights.adapter is None else 0
    others = [client for client in pool.healthy if client is not but]
    answers = side_by_side({client.url: client.held_version for client in others}).values()
    held = [answer.value for answer in answers if answer.value is not None]
    return max([ours, *(version.number - version.dirty for version in held)])


# ---------------------------------------------------------------------------------------------------- in the thread


def _watch(engine_ref: weakref.ref[Watched], restarts: _Restarts) -> None:
    failure: str | None = None
    while not restarts.ending.wait(_POLL_S):
        engine = engine_ref()
        if engine is None:
            return
        error = failure_of(partial(_begin_restarts, engine, restarts))
        if error is not None and repr(error) != failure:  # once, not twice a second
            _log.error("watching the servers failed, and goes on: %r", error, exc_info=error)
        failure = None if error is None else repr(error)
        del engine


def _begin_restarts(engine: Watched, restarts: _Restarts) -> None:
    """Restart what has crashed, each in a thread of its own, and return at once."""
    pool, ending, crashes = engine.pool, restarts.ending, restarts.crashes
    restarts.tasks[:] = [task for task in restarts.tasks if not task.done]
    for client, server in engine.launched:
        if not server.has_crashed or ending.is_set():
            continue
        if pool.state.offloaded_urls:  # its GPU memory is in use by now
            if pool.state.server(client.url).reason != _OFFLOADED:
                pool.quarantine(client.url, _OFFLOADED)
        elif pool.state.restart_begun(client.url):
            call = partial(_restart_crashed, pool, client, server, crashes[client.url], ending)
            recorded = partial(_log_failure, pool, client.url, call, ending)
            restarts.tasks.append(Task(recorded, name=f"restart-{client.url}"))
    if engine.router is not None and engine.router.has_crashed and not ending.is_set():
        _restart_router(pool, engine.router, crashes[engine.router.url])


def _log_failure(pool: SGLangPool, url: str, restart: Callable[[], None], ending: threading.Event) -> None:
    error = failure_of(restart)
    if error is not None and not ending.is_set() and not pool.state.has_left(url):
        is_ours = isinstance(error, (SGLangError, OSError))
        _log.error("the server at %s could not be restarted: %s", url, error, exc_info=None if is_ours else error)
        pool.quarantine(url, f"it crashed and could not be restarted ({error})")


def _restart_crashed(
    pool: SGLangPool, client: SGLangClient, server: SGLangServer, crashes: list[float], ending: threading.Event
) -> None:
    try:
        is_current = _start_crashed(pool, client, server, crashes, ending)
    finally:
        pool.state.restart_ended(client.url)
    if is_current is None:
        return
    started = pool.state.server(client.url).restarts
    with _no_update_under_way(pool, ending) as may_admit:
        known = pool.state.server(client.url)
        is_same = known.restarts == started and not known.is_restarting
        if not may_admit or not is_same or known.weights == "new":  # an update has reached it meanwhile
            return
        if admit(pool, client, is_current=is_current, update=True):
            _log.warning("the server at %s is back, with the weights that the others hold", client.url)


def _start_crashed(
    pool: SGLangPool, client: SGLangClient, server: SGLangServer, crashes: list[float], ending: threading.Event
) -> bool | None:
    """Start a crashed server as :func:`restart_server` does; ``None`` if it is not to be started."""
    crash_report = server.reap()
    if crash_report is None:  # the user has restarted it already
        return None
    if not _may_restart(crashes):
        reason = f"it crashed {len(crashes)} times in {_WINDOW_S / 60:.0f} minutes and is not restarted"
        _log.error("the server at %s %s\n%s", client.url, crash_report, reason)
        pool.quarantine(client.url, f"{reason}; the next weight update, or restart(), tries once more")
        return None
    pool.quarantine(client.url, "it crashed and is being restarted")
    _log.warning("the server at %s %s\nIt is being restarted", client.url, crash_report)
    return restart_server(pool, client, server, ending=ending)


def _restart_router(pool: SGLangPool, router: SGLangRouter, crashes: list[float]) -> None:
    if not _may_restart(crashes):
        router.stop()
        _log.error("the router at %s crashed %d times and is not restarted", router.url, len(crashes))
        return
    _log.warning("the router at %s crashed and is being restarted. Its log ends:\n%s", router.url, router.log_tail(15))
    try:
        router.start()
        if pool.router is not None:
            pool.router.join([client.url for client in pool.healthy])
    except (SGLangError, OSError) as error:
        _log.error("the router at %s could not be restarted: %s", router.url, error)


def _may_restart(crashes: list[float]) -> bool:
    """Count one more crash, and decide whether to restart after it."""
    now = time.monotonic()
    crashes[:] = [*(at for at in crashes if now - at < _WINDOW_S), now]
    return len(crashes) <= _MAX_RESTARTS


def _load_saved(pool: SGLangPool, client: SGLangClient) -> bool:
    """Make a restarted server load the current weights from a shared folder; ``False`` if no folder has them."""
    weights = pool.state.weights
    saved = weights.saved
    if saved is None or saved.version.number != weights.version or weights.adapter is not None:
        return False
    request = build_update_from_disk(saved.path, version=str(saved.version))
    check_success(client.send(request), server=client.url, what="loading the current weights")
    pool.state.saved_weights_loaded(client.url, str(saved.version))
    return True


@contextmanager
def _no_update_under_way(pool: SGLangPool, ending: threading.Event) -> Iterator[bool]:
    """Hold the pool's update lock and yield ``True``, or ``False`` if the engine ends first.

    A server that was started while others released their GPU memory has released its own, and is paused until then.
    """
    held = False
    while not held and not ending.is_set():
        held = pool.update_lock.acquire(timeout=_POLL_S, purpose="a restarted server's return into routing")
        if held and pool.state.offloaded_urls:
            pool.update_lock.release()
            held = False
            ending.wait(_POLL_S)
    try:
        yield held and not ending.is_set()
    finally:
        if held:
            pool.update_lock.release()
