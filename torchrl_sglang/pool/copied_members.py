"""The members of a copied pool: those of the original, which writes down in a file which servers there are."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import SGLangError
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool.member_file import MemberFile
from torchrl_sglang.pool.membership import Membership
from torchrl_sglang.pool.state import ServerState
from torchrl_sglang.pool.update_lock import UpdateLock

__all__ = ["CopiedMembers"]

_log = logging.getLogger(__name__)

_RETRY_S = 10.0


class Copy(Protocol):
    """What this module needs of the copied pool."""

    update_lock: UpdateLock

    def restore(
        self, url: str, *, based_on: ServerState, new_process_with: str | None = None, updated_to: str | None = None
    ) -> bool:
        """Put a server into routing."""


class CopiedMembers:
    """Adopts what has changed in the original.

    Args:
        pool: the copy.
        members: its members.
        file: what the original writes.
    """

    def __init__(self, pool: Copy, members: Membership, file: MemberFile) -> None:
        self._pool = pool
        self._members = members
        self._file = file
        self._read_again_at = math.inf
        self._joins: dict[str, int] = {}
        self._has_looked = False

    def refresh(self, patience_s: float = 0) -> None:
        """Adopt what has changed. A newcomer is asked which weights it holds first.

        Args:
            patience_s: how long to wait for an update of this copy, or for a server that is just joining it.
        """
        if not self._pool.update_lock.acquire(timeout=patience_s):
            return  # an update of this copy counts on its members: the next batch looks again
        try:
            if time.monotonic() >= self._read_again_at:
                self._read_again_at = math.inf
                self._file.read_again()
            wanted = self._file.read_if_new()
            joins, has_looked, self._has_looked = self._file.joins, self._has_looked, True
            if wanted is None:
                return
            known = {client.url for client in self._members.clients}
            again = [url for url in known & wanted.keys() if has_looked and joins[url] != self._joins.get(url, 0)]
            self._members.came_again({url: wanted[url] for url in again})
            self._joins = joins
            gone = [client for client in self._members.clients if client.url not in wanted]
            new = {url: config for url, config in wanted.items() if url not in known}
            if len(gone) < len(known):
                self._members.forget(gone)
                gone = []
        finally:
            self._pool.update_lock.release()
        if not new and not gone:
            return
        joining = Task(lambda: self._join(new, gone), name="sglang-new-servers")
        if gone:  # none of the known servers is left
            joining.wait()

    def _join(self, new: Mapping[str, ClientConfig | None], gone: Sequence[SGLangClient]) -> None:
        members = self._members
        for url, config in new.items():
            client = SGLangClient(url, config or members.clients[0].config)
            try:
                info = client.connect()
            except SGLangError as error:
                _log.warning("%s has joined the pool, and can't be used here yet: %s", url, error)
                self._read_again_at = time.monotonic() + _RETRY_S
                continue
            with self._pool.update_lock:
                known = members.take_in(client, info.weight_version)
            if known is None:
                continue
            self._read_again_at = min(self._read_again_at, time.monotonic())  # it may have left meanwhile
            if gone or info.weight_version in members.current_versions():
                self._pool.restore(url, based_on=known, updated_to=info.weight_version)
        if gone and len(members.clients) > len(gone):
            with self._pool.update_lock:
                members.forget(gone)
