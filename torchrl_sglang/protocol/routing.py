"""Splits a batch over servers: even shares, with repeated prompts on one server so that they share its prefix cache."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

__all__ = ["split_batch"]


def split_batch(ids_B_T: Sequence[Sequence[int]], load_S: Sequence[int]) -> list[list[int]]:
    """Split a batch over servers.

    Args:
        ids_B_T: prompt token ids.
        load_S: sequences that each server already generates.

    Returns:
        For each server the ascending indices of its prompts; every index is in exactly one share.

    Equal prompts go to one server unless that leaves another one idle: a group larger than an even share is split. Work
    is counted in sequences, because their lengths are unknown beforehand.

    Examples:
        >>> split_batch([[1], [1], [2], [2], [3], [3]], [0, 0])
        [[0, 1, 4, 5], [2, 3]]
        >>> split_batch([[1], [1], [1], [1]], [0, 0])
        [[0, 1], [2, 3]]
    """
    if len(load_S) == 1:
        return [list(range(len(ids_B_T)))]
    even_share = -(-len(ids_B_T) // len(load_S))
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, ids_T in enumerate(ids_B_T):
        groups.setdefault(tuple(ids_T), []).append(index)
    shares: list[list[int]] = [[] for _ in load_S]
    heap = [(load, server) for server, load in enumerate(load_S)]
    heapq.heapify(heap)
    for members in groups.values():
        for start in range(0, len(members), even_share):
            piece = members[start : start + even_share]
            load, server = heapq.heappop(heap)
            shares[server].extend(piece)
            heapq.heappush(heap, (load + len(piece), server))
    return [sorted(share) for share in shares]
