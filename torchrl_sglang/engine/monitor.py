"""Restarts crashed servers: within a second of the crash, and back in routing once their weights are right."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ServerStartError, SGLangError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_pause, build_update_from_disk, check_success
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.server import SGLangRouter, SGLangServer

__all__ = ["CrashMonitor", "restart_server"]

_log = logging.getLogger(__name__)

_POLL_S = 0.5
_MAX_RESTARTS = 3
_WINDOW_S = 600.0
"""A server that crashes a fourth time within this time has a lasting fault: it is not restarted."""
_JOIN_TIMEOUT_S = 30.0


class Watched(Protocol):
    """The engine whose servers are watched. Referenced weakly: an unused engine ends its servers."""

    pool: SGLangPool
    router: SGLangRouter | None

    @property
    def launched(self) -> Sequence[tuple[SGLangClient, SGLangServer]]:
        """The servers it launched, with their clients."""


class CrashMonitor:
    """A thread that restarts crashed servers until the engine ends.

    Args:
        engine: owns the servers. A server that was stopped on purpose is not restarted.
    """

    def __init__(self, engine: Watched) -> None:
        self._ending = threading.Event()
        arguments = (weakref.ref(engine), self._ending)
        self._thread = threading.Thread(target=_watch, args=arguments, name="sglang-monitor", daemon=True)
        self._thread.start()
        # At exit the servers' finalizers, registered earlier, kill the servers: no restart may follow.
        atexit.register(self._ending.set)

    def announce_end(self) -> None:
        """Start nothing from now on; a start under way is abandoned within about a second."""
        self._ending.set()
        atexit.unregister(self._ending.set)

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_TIMEOUT_S)


def restart_server(
    pool: SGLangPool, client: SGLangClient, server: SGLangServer, *, ending: threading.Event | None = None
) -> bool:
    """Start a server that has ended, at its address, with the checkpoint that it was launched from.

    Where synced weights have replaced the checkpoint's, the new process starts with a dirty weight version: replies of
    it are refused, in whatever process they arrive, until it has been updated.

    Returns:
        Whether the checkpoint's weights are the current ones (below an adapter, if there is one).

    Raises:
        ServerStartError: it did not become ready, or ``ending`` was set.
    """

    def abort_when_ending(_line: str) -> None:
        if ending is not None and ending.is_set():
            raise ServerStartError("the engine was shut down while this server was starting", server=client.url)

    current = _current_version(pool, client)
    # An unfinished update counts as one to the next number, see SGLangPool.connect.
    mark = str(WeightVersion(number=current + 1, dirty=True)) if current > 0 else None
    server.start(progress=abort_when_ending, weight_version=mark)
    version = mark or "default"
    try:
        version = client.connect().weight_version
    finally:
        pool.state.restarted(client.url, version)  # also if it does not answer yet: the old process is gone
    return mark is None


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


def _watch(engine_ref: weakref.ref[Watched], ending: threading.Event) -> None:
    crashes: defaultdict[str, list[float]] = defaultdict(list)
    while not ending.wait(_POLL_S):
        engine = engine_ref()
        if engine is None:
            return
        for client, server in engine.launched:
            if server.has_crashed:
                _restart_crashed(engine.pool, client, server, crashes[client.url], ending)
        if engine.router is not None and engine.router.has_crashed and not ending.is_set():
            _restart_router(engine.pool, engine.router, crashes[engine.router.url])
        del engine


def _restart_crashed(
    pool: SGLangPool, client: SGLangClient, server: SGLangServer, crashes: list[float], ending: threading.Event
) -> None:
    with _no_update_under_way(pool, ending) as may_start:
        crash_report = server.reap() if may_start else None
        if crash_report is None:  # an update or the user has restarted it already
            return
        if not _may_restart(crashes):
            reason = f"it crashed {len(crashes)} times in {_WINDOW_S / 60:.0f} minutes and is not restarted"
            _log.error("the server at %s %s\n%s", client.url, crash_report, reason)
            pool.quarantine(client.url, f"{reason}; the next weight update, or restart(), tries once more")
            return
        pool.quarantine(client.url, "it crashed and is being restarted")
        _log.warning("the server at %s %s\nIt is being restarted", client.url, crash_report)
        try:
            is_current = restart_server(pool, client, server, ending=ending) or _load_saved(pool, client)
            if not is_current:
                # Requests from processes that don't know of the crash wait in the paused server for the weights.
                check_success(client.send(build_pause("abort")), server=client.url, what="pausing")
            if is_current and pool.state.weights.adapter is None:
                pool.restore(client.url, based_on=pool.state.server(client.url))
                _log.warning("the server at %s is back, with the weights that the others hold", client.url)
            else:
                pool.quarantine(client.url, "it crashed and was restarted; the next weight update puts it to use")
        except (SGLangError, OSError) as error:
            if not ending.is_set():
                _log.error("the server at %s could not be restarted: %s", client.url, error)
                pool.quarantine(client.url, f"it crashed and could not be restarted ({error})")


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
    """Hold the pool's update lock and yield ``True``, or ``False`` if the engine ends first."""
    held = False
    while not held and not ending.is_set():
        held = pool.update_lock.acquire(timeout=_POLL_S)
    try:
        yield held and not ending.is_set()
    finally:
        if held:
            pool.update_lock.release()
