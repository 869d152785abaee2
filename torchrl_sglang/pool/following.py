"""Keeps a pool's members those of a list that something else changes."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

from torchrl_sglang.config.checking import require_number
from torchrl_sglang.errors import ServerError, SGLangError
from torchrl_sglang.parallel import Task, failure_of
from torchrl_sglang.pool.pool import SGLangPool
from torchrl_sglang.pool.server_list import ListSource, reader_of
from torchrl_sglang.server_url import base_url

__all__ = ["ServerListFollower"]

_log = logging.getLogger(__name__)

_DNS_GRACE_S = 30.0
"""A name server leaves out servers that are not ready, as servers that are paused for an update may seem to be."""
_RETRY_S = 10.0
_JOIN_TIMEOUT_S = 5.0


class ServerListFollower:
    """Adds the servers that appear in a list to a pool, and removes those that disappear. A ``with`` block.

    A list that can't be read, or is empty, changes nothing. A server that can't be added is tried again every ten
    seconds; the log says why, once. Removed servers finish their requests.

    Args:
        pool: the servers. Collected when nobody uses it any more, which ends the thread.
        source: the list, see :data:`~torchrl_sglang.pool.server_list.ListSource`.
        poll_s: seconds between two looks.
        grace_s: how long a server must be missing from the list before it is removed, in seconds; ``None`` is 30 for
            DNS names, 0 for others.
        keep: returns URLs of members that the list does not concern: those that an engine has launched.

    Raises:
        ConfigError: ``source`` is no list of servers, or ``pool`` is a copy.
    """

    def __init__(
        self,
        pool: SGLangPool,
        source: ListSource,
        *,
        poll_s: float = 2.0,
        grace_s: float | None = None,
        keep: Callable[[], Collection[str]] = tuple,
    ) -> None:
        pool.refuse_in_copy()
        require_number("poll_s", poll_s, above=0)
        require_number("grace_s", grace_s, optional=True, at_least=0)
        self._read = reader_of(source)
        is_dns = isinstance(source, str) and source.startswith("dns:")
        self._grace_s = (_DNS_GRACE_S if is_dns else 0.0) if grace_s is None else grace_s
        self._pool = weakref.ref(pool)
        self._keep = keep
        self._missing_since: dict[str, float] = {}
        self._retry_at: dict[str, float] = {}
        self._said = ""
        self._said_of: dict[str, str] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(
            target=_follow, args=(weakref.ref(self), self._ending, poll_s), name="sglang-follow-list", daemon=True
        )
        self._thread.start()

    def look(self) -> None:
        """Compare list and members now, and change the members. The thread does this every ``poll_s`` seconds.

        Raises:
            ServerError: the list can't be read, or is empty.
        """
        pool = self._pool()
        if pool is None:
            self._ending.set()
            return
        wanted = self._read()
        if not wanted:
            raise ServerError("the list of servers is empty: the pool keeps those that it has")
        members = [client.url for client in pool.clients]
        self._add_new(pool, [url for url in wanted if url not in members])
        now = time.monotonic()
        missing = {url for url in members if url not in wanted} - {base_url(url) for url in self._keep()}
        self._missing_since = {url: self._missing_since.get(url, now) for url in missing}
        for url, since in list(self._missing_since.items()):
            if now - since >= self._grace_s and not self._ending.is_set() and not pool.state.has_left(url):
                Task(partial(self._remove, pool, url), name="sglang-remove")  # it may have requests for long

    def _add_new(self, pool: SGLangPool, urls: Sequence[str]) -> None:
        """Add servers in one go, or each by itself if one of them can't be added."""
        now = time.monotonic()
        due = [url for url in urls if now >= self._retry_at.get(url, 0.0)]
        if len(due) > 1:
            with suppress(SGLangError):
                pool.add(due)
                return
        for url in due:
            if not self._ending.is_set():
                self._add(pool, url)

    def _add(self, pool: SGLangPool, url: str) -> None:
        try:
            pool.add(url)
            self._retry_at.pop(url, None)
            self._said_of.pop(url, None)
            _log.info("%s was added: it is on the list", url)
        except SGLangError as error:
            self._retry_at[url] = time.monotonic() + _RETRY_S
            self._note_of(url, f"{url} is on the list and can't be added: {error}")

    def _remove(self, pool: SGLangPool, url: str) -> None:
        try:
            pool.remove(url)
            self._missing_since.pop(url, None)
            self._said_of.pop(url, None)
            _log.info("%s was removed: it is no longer on the list", url)
        except SGLangError as error:
            self._note_of(url, f"{url} is no longer on the list and can't be removed: {error}")

    def _note_of(self, url: str, text: str) -> None:
        """Log what lasts of one server once, however often it is tried again."""
        if self._said_of.get(url) != text:
            self._said_of[url] = text
            _log.warning("%s", text)

    def _note(self, text: str) -> None:
        """Log a lasting state once."""
        if text != self._said:
            self._said = text
            _log.warning("%s", text)

    def stop(self) -> None:
        """Follow the list no longer; the members stay. A change under way is finished."""
        self._ending.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_TIMEOUT_S)

    def __enter__(self) -> ServerListFollower:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


def _follow(follower_ref: weakref.ref[Any], ending: threading.Event, poll_s: float) -> None:
    while True:
        follower = follower_ref()
        if follower is None:
            return
        failure = failure_of(follower.look)
        if failure is None:
            follower._said = ""
        else:  # whatever it is, the list is read again
            is_ours = isinstance(failure, SGLangError)
            follower._note(str(failure) if is_ours else f"following the list of servers failed: {failure!r}")
        del follower, failure  # its traceback refers to the follower and the pool
        if ending.wait(poll_s):
            return
