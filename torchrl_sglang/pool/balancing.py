"""Divides work over servers by what this process has under way on each, and by where conversations began."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool.affinity import Affinity
from torchrl_sglang.protocol.routing import split_batch

__all__ = ["LoadTracker", "Share"]

Share = tuple[SGLangClient, list[int]]
"""A server and the indices of the prompts that go to it in one request."""

_MOST_OF_EVEN = 1.25
_ALWAYS_ACCEPTED = 4
"""A conversation stays with its server unless that has a quarter more than an even share under way, and more than four
sequences: then another server computes the prefix once more, which costs less than waiting."""


class LoadTracker:
    """Counts the sequences that this process has under way on each server, and chooses servers. Thread-safe.

    Args:
        servers: returns the servers that can be chosen by :meth:`pick`; raises if there is none.

    Attributes:
        affinity: where conversations began.
    """

    def __init__(self, servers: Callable[[], Sequence[SGLangClient]]) -> None:
        self.affinity = Affinity()
        self._servers = servers
        self._lock = threading.Lock()
        self._load: dict[str, int] = {}

    def pick(self, *, key: Hashable | None = None, ids_T: Sequence[int] = ()) -> SGLangClient:
        """Choose a server for a request that the caller sends by itself.

        Turns of one conversation go to the server that has its prefix in its cache, and to the server with the least
        load when that one is gone or has too much to do.

        Args:
            key: names the conversation: equal keys are turns of one.
            ids_T: the prompt's tokens; without a key, a prompt that continues an earlier one goes where that went.

        Returns:
            The server. It is remembered for the next turn.

        Raises:
            ServerError: no server is left.
        """
        clients = self._servers()
        wanted = self.affinity.find(ids_T, key=key) if len(clients) > 1 else None
        with self._lock:
            client = self._choose(clients, wanted)
        self.affinity.note(client.url, ids_T, key=key)
        return client

    @contextmanager
    def assign(
        self,
        clients: Sequence[SGLangClient],
        ids_B_T: Sequence[Sequence[int]],
        waiting: Sequence[int],
        n: int,
        keys_B: Sequence[Hashable] | None = None,
    ) -> Iterator[list[Share]]:
        """Divide the ``waiting`` prompts over the servers, and count them until the block ends.

        Args:
            clients: the servers.
            ids_B_T: all prompts of the batch.
            waiting: indices of those to send.
            n: sequences per prompt.
            keys_B: names of the prompts' conversations.
        """
        wanted_W = self._wanted(clients, ids_B_T, waiting, keys_B)
        with self._lock:
            shares = self._divide(clients, ids_B_T, waiting, wanted_W, n)
            self._add(shares, n)
        if len(clients) > 1:
            for client, share in shares:
                for index in share:
                    self.affinity.note(client.url, ids_B_T[index], key=None if keys_B is None else keys_B[index])
        try:
            yield shares
        finally:
            with self._lock:
                self._add(shares, -n)

    def _wanted(
        self,
        clients: Sequence[SGLangClient],
        ids_B_T: Sequence[Sequence[int]],
        waiting: Sequence[int],
        keys_B: Sequence[Hashable] | None,
    ) -> list[str | None]:
        if len({client.url for client in clients}) < 2:  # one server, or a router
            return [None] * len(waiting)
        return [self.affinity.find(ids_B_T[i], key=None if keys_B is None else keys_B[i]) for i in waiting]

    def _divide(
        self,
        clients: Sequence[SGLangClient],
        ids_B_T: Sequence[Sequence[int]],
        waiting: Sequence[int],
        wanted_W: Sequence[str | None],
        n: int,
    ) -> list[Share]:
        """Conversations go to their servers as long as these have room, all others where there is least to do."""
        load_S = [self._load.get(client.url, 0) for client in clients]
        position = {client.url: index for index, client in enumerate(clients)}
        room = self._room(load_S, len(waiting) * n)
        shares: list[list[int]] = [[] for _ in clients]
        rest = []
        for index, url in zip(waiting, wanted_W, strict=True):
            server = None if url is None else position.get(url)
            if server is not None and load_S[server] + n <= max(room, n):
                shares[server].append(index)
                load_S[server] += n
            else:
                rest.append(index)
        split = split_batch([ids_B_T[index] for index in rest], load_S) if rest else [[]] * len(clients)
        for share, more in zip(shares, split, strict=True):
            share.extend(rest[i] for i in more)
        return [(client, sorted(share)) for client, share in zip(clients, shares, strict=True) if share]

    @staticmethod
    def _room(load_S: Sequence[int], num_new: int) -> int:
        """How many sequences a server may have under way and still gets those of its conversations."""
        return max(_ALWAYS_ACCEPTED, math.ceil(_MOST_OF_EVEN * (sum(load_S) + num_new) / len(load_S)))

    def _choose(self, clients: Sequence[SGLangClient], wanted: str | None) -> SGLangClient:
        """The wanted server if it has room, else that with the least load. The lock is held."""
        load_S = [self._load.get(client.url, 0) for client in clients]
        client = next((each for each in clients if each.url == wanted), None)
        if client is not None and self._load.get(client.url, 0) + 1 <= self._room(load_S, 1):
            return client
        return clients[load_S.index(min(load_S))]

    @contextmanager
    def count(self, shares: Sequence[Share], n: int) -> Iterator[None]:
        """Count shares that were divided otherwise until the block ends."""
        with self._lock:
            self._add(shares, n)
        try:
            yield
        finally:
            with self._lock:
                self._add(shares, -n)

    @contextmanager
    def assign_one(
        self, clients: Sequence[SGLangClient], *, key: Hashable | None = None, ids_T: Sequence[int] = ()
    ) -> Iterator[SGLangClient]:
        """Choose a server as :meth:`pick` does, and count one sequence on it until the block ends."""
        wanted = self.affinity.find(ids_T, key=key) if len(clients) > 1 else None
        with self._lock:
            client = self._choose(clients, wanted)
            self._add([(client, [0])], 1)
        self.affinity.note(client.url, ids_T, key=key)
        try:
            yield client
        finally:
            with self._lock:
                self._add([(client, [0])], -1)

    def _add(self, shares: Sequence[Share], n: int) -> None:
        for client, share in shares:
            self._load[client.url] = self._load.get(client.url, 0) + len(share) * n
