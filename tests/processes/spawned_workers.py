"""What workers in other processes do with a copy of a pool: functions that a spawned process imports."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from torchrl_sglang import SamplingParams
from torchrl_sglang.pool import SGLangPool

PROMPTS = [[index + 3, 7, 8] for index in range(8)]
SHORT = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)


def servers_of(pool: SGLangPool) -> set[str]:
    return {reply.server for reply in pool.generate(PROMPTS, SHORT)}


def wait_for(pool: SGLangPool, urls: Sequence[str]) -> bool:
    """Generate until exactly these servers answer; whether that happens."""
    deadline = time.monotonic() + 60
    while servers_of(pool) != set(urls) and time.monotonic() < deadline:
        time.sleep(0.05)
    return servers_of(pool) == set(urls)


def lengths(pool: SGLangPool, _urls: Sequence[str]) -> list[int]:
    return [len(reply.output_ids) for reply in pool.generate(PROMPTS, LONG)]


def add(pool: SGLangPool, urls: Sequence[str]) -> tuple[str, ...]:
    return pool.add(urls)


def serve(connection: Connection) -> None:
    """Do with the pool that comes first what comes after it: a function and its argument, until ``None``."""
    pool: SGLangPool = connection.recv()
    while (order := connection.recv()) is not None:
        function: Callable[[SGLangPool, Any], Any] = order[0]
        try:
            connection.send(function(pool, order[1]))
        except Exception as error:  # noqa: BLE001  the test looks at it
            connection.send(error)


class Answers:
    """A dataset whose items are answers."""

    def __init__(self, pool: SGLangPool) -> None:
        self._pool = pool

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[int, int]:
        return answer(self._pool, index)


def answer(pool: SGLangPool, index: int) -> tuple[int, int]:
    """The process and the number of tokens."""
    (reply,) = pool.generate([[index + 3, 7, 8]], SHORT)
    return os.getpid(), len(reply.output_ids)
