"""Crashed servers are started again: noticed within a second, and back in routing once their weights are right."""

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

__all__ = ["CrashMonitor", "start_again"]

_log = logging.getLogger(__name__)

_POLL_S = 0.5
_MOST_RESTARTS = 3
_WINDOW_S = 600.0
"""A server that crashes once more within this time after three restarts crashes for a reason: it is left alone."""
_JOIN_TIMEOUT_S = 30.0


class Watched(Protocol):
    """What is watched: an engine. Only weakly held, so that one nobody uses any more still ends its servers."""

    pool: SGLangPool
    router: SGLangRouter | None

    @property
    def servers(self) -> Sequence[SGLangServer]:
        """Its own servers, in the order of the pool's clients."""


class CrashMonitor:
    """A thread that starts crashed servers again, until :meth:`stop` or the end of the engine.

    Args:
        engine: whose servers; those that somebody stopped are left alone.
    """

    def __init__(self, engine: Watched) -> None:
        self._ending = threading.Event()
        arguments = (weakref.ref(engine), self._ending)
        self._thread = threading.Thread(target=_watch, args=arguments, name="sglang-monitor", daemon=True)
        self._thread.start()
        # At exit servers are ended by their finalizers, which were registered before this: no restart may follow.
        atexit.register(self._ending.set)

    def announce_end(self) -> None:
        """From now on nothing is started; a start under way is given up within about a second."""
        self._ending.set()
        atexit.unregister(self._ending.set)

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_TIMEOUT_S)


def start_again(
    pool: SGLangPool, client: SGLangClient, server: SGLangServer, *, ending: threading.Event | None = None
) -> bool:
    """Start an ended server at its address, with the checkpoint it was launched from.

    Where synced weights have replaced those, the new process is marked as holding half-updated ones from its first
    moment on: no reply of it counts, in whatever process it arrives, until it has been updated.

    Returns:
        Whether the checkpoint's weights are the current ones (below an adapter, if there is one).

    Raises:
        ServerStartError: it did not come up, or ``ending`` was set.
    """

    def give_up_when_ending(_line: str) -> None:
        if ending is not None and ending.is_set():
            raise ServerStartError("the engine was shut down while this server was starting", server=client.url)

    current = _current_version(pool, client)
    # An unfinished update counts as one to the next number, see SGLangPool.connect.
    mark = str(WeightVersion(number=current + 1, dirty=True)) if current > 0 else None
    server.start(progress=give_up_when_ending, weight_version=mark)
    pool.note_restart(client.url)
    client.connect()
    return mark is None


def _current_version(pool: SGLangPool, but: SGLangClient) -> int:
    """The version this pool last synced, or a later one that another trainer put on the servers.

    An adapter's version says nothing here: below it are the weights the servers were started with.
    """
    ours = pool.weight_version if pool.adapter is None else 0
    others = [client for client in pool.clients if client is not but and client.url not in pool.quarantined]
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
        for client, server in zip(engine.pool.clients, engine.servers, strict=True):
            if server.has_crashed:
                _bring_back(engine.pool, client, server, crashes[client.url], ending)
        if engine.router is not None and engine.router.has_crashed and not ending.is_set():
            _bring_router_back(engine.pool, engine.router, crashes[engine.router.url])
        del engine


def _bring_back(
    pool: SGLangPool, client: SGLangClient, server: SGLangServer, crashes: list[float], ending: threading.Event
) -> None:
    with _no_update_under_way(pool, ending) as may_start:
        crash_report = server.reap() if may_start else None
        if crash_report is None:  # an update, or its user, was faster
            return
        if not _may_start_again(crashes):
            reason = f"it crashed {len(crashes)} times in {_WINDOW_S / 60:.0f} minutes and is not started again"
            _log.error("the server at %s %s\n%s", client.url, crash_report, reason)
            pool.quarantine(client.url, f"{reason}; the next weight update, or restart(), tries once more")
            return
        pool.quarantine(client.url, "it crashed and is being started again")
        _log.warning("the server at %s %s\nIt is being started again", client.url, crash_report)
        try:
            holds_base = start_again(pool, client, server, ending=ending) or _load_saved(pool, client)
            if not holds_base:
                # Requests from processes that do not know of the crash wait here for the weights.
                check_success(client.send(build_pause("abort")), server=client.url, what="pausing")
            if holds_base and pool.adapter is None:
                pool.restore(client.url)
                _log.warning("the server at %s is back, with the weights the others hold", client.url)
            else:
                pool.quarantine(client.url, "it crashed and was started again; the next weight update puts it to use")
        except (SGLangError, OSError) as error:
            if not ending.is_set():
                _log.error("the server at %s could not be started again: %s", client.url, error)
                pool.quarantine(client.url, f"it crashed and could not be started again ({error})")


def _bring_router_back(pool: SGLangPool, router: SGLangRouter, crashes: list[float]) -> None:
    if not _may_start_again(crashes):
        router.stop()
        _log.error("the router at %s crashed %d times and is not started again", router.url, len(crashes))
        return
    _log.warning(
        "the router at %s crashed and is being started again. Its log ends:\n%s", router.url, router.log_tail(15)
    )
    try:
        router.start()
        if pool.router is not None:
            pool.router.join([client.url for client in pool.healthy])
    except (SGLangError, OSError) as error:
        _log.error("the router at %s could not be started again: %s", router.url, error)


def _may_start_again(crashes: list[float]) -> bool:
    """Note one crash more; whether they are few enough to be accidents."""
    now = time.monotonic()
    crashes[:] = [*(at for at in crashes if now - at < _WINDOW_S), now]
    return len(crashes) <= _MOST_RESTARTS


def _load_saved(pool: SGLangPool, client: SGLangClient) -> bool:
    """Have a restarted server load the current weights from a shared folder; whether that folder has them."""
    saved = pool.saved
    if saved is None or saved.version.number != pool.weight_version or pool.adapter is not None:
        return False
    request = build_update_from_disk(saved.path, version=str(saved.version))
    check_success(client.send(request), server=client.url, what="loading the current weights")
    return True


@contextmanager
def _no_update_under_way(pool: SGLangPool, ending: threading.Event) -> Iterator[bool]:
    """Hold the pool's update lock, unless the end comes first (``False``)."""
    held = False
    while not held and not ending.is_set():
        held = pool.update_lock.acquire(timeout=_POLL_S)
    try:
        yield held and not ending.is_set()
    finally:
        if held:
            pool.update_lock.release()
