"""Divides a batch over servers by the number of sequences that each has under way."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.protocol.routing import split_batch

__all__ = ["LoadTracker", "Share"]

Share = tuple[SGLangClient, list[int]]
"""A server and the indices of the prompts that go to it in one request."""


class LoadTracker:
    """Counts the sequences that this process has under way on each server. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._load: dict[str, int] = {}

    @contextmanager
    def assign(
        self, clients: Sequence[SGLangClient], ids_B_T: Sequence[Sequence[int]], waiting: Sequence[int], n: int
    ) -> Iterator[list[Share]]:
        """Divide the ``waiting`` prompts over the servers, and count them until the block ends.

        Args:
            clients: the servers.
            ids_B_T: all prompts of the batch.
            waiting: indices of those to send.
            n: sequences per prompt.
        """
        with self._lock:
            load_S = [self._load.get(client.url, 0) for client in clients]
            split = split_batch([ids_B_T[index] for index in waiting], load_S)
            shares = [
                (client, [waiting[i] for i in share]) for client, share in zip(clients, split, strict=True) if share
            ]
            self._add(shares, n)
        try:
            yield shares
        finally:
            with self._lock:
                self._add(shares, -n)

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
    def assign_one(self, clients: Sequence[SGLangClient]) -> Iterator[SGLangClient]:
        """Choose the server with the least load, and count one sequence on it until the block ends."""
        with self._lock:
            client = min(clients, key=lambda each: self._load.get(each.url, 0))
            self._add([(client, [0])], 1)
        try:
            yield client
        finally:
            with self._lock:
                self._add([(client, [0])], -1)

    def _add(self, shares: Sequence[Share], n: int) -> None:
        for client, share in shares:
            self._load[client.url] = self._load.get(client.url, 0) + len(share) * n
