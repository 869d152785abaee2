"""Servers that were seen to die are looked at retry: somebody may have started them anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import SGLangError
from torchrl_sglang.parallel import Task
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["DeadServerTracker"]

_LOOK_EVERY_S = 5.0


class DeadServerTracker:
    """Who died while generating for this pool, and which weights it has seen since.

    A process that restarts servers has other ways to know of them (:class:`CrashMonitor`, a weight update); the pools
    of its workers, and those attached to servers that a cluster restarts, have only this.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._died: set[str] = set()
        self._newest = 0
        self._looked_at = 0.0
        self._look: Task[None] | None = None

    def note(self, url: str) -> None:
        """A request failed with the death of this server."""
        with self._lock:
            self._died.add(url)
            self._looked_at = time.monotonic()

    def forget(self, url: str) -> None:
        """Somebody else decides about this server now."""
        with self._lock:
            self._died.discard(url)

    def record_versions(self, replies: Sequence[GenerateReply]) -> None:
        """Take note of the newest weights that answer."""
        self._newest = max([self._newest, *(WeightVersion.parse(reply.weight_version).number for reply in replies)])

    def poll(self, clients: Sequence[SGLangClient], version: int, restore: Callable[[str], None]) -> None:
        """Every few seconds, in the background, ask those that died whether they are back; at once if all have died.

        Args:
            clients: all servers of the pool.
            version: the version this pool has synced.
            restore: called for a server that holds weights as new as any this pool has seen.
        """
        with self._lock:
            died = [client for client in clients if client.url in self._died]
            none_left = len(died) == len(clients)
            due = time.monotonic() - self._looked_at > _LOOK_EVERY_S and (self._look is None or self._look.done)
            if not died or not (due or none_left):
                return
            self._looked_at = time.monotonic()
            self._look = Task(lambda: _ask(died, max(version, self._newest), restore), name="sglang-look")
            look = self._look
        if none_left:
            look.wait()


def _ask(died: Sequence[SGLangClient], wanted: int, restore: Callable[[str], None]) -> None:
    for client in died:
        try:
            version = client.held_version()
            if not version.dirty and version.number >= wanted:
                restore(client.url)
        except SGLangError:  # still dead
            continue
