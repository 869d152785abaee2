"""Blocking calls and generators for ``asyncio``, run in daemon threads, which do not delay the program's exit."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, TypeVar

from torchrl_sglang.parallel import Task

__all__ = ["call_in_thread", "iterate_in_thread"]

Result = TypeVar("Result")
Item = TypeVar("Item")


async def call_in_thread(call: Callable[[], Result]) -> Result:
    """Run a blocking call and await its result. Cancelling the await does not end the call."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: Task[Result]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing awaits the result
            loop.call_soon_threadsafe(done.set)

    task = Task(call, name="sglang-chat", on_done=wake)
    await done.wait()
    return task.outcome().unwrap()


async def iterate_in_thread(make: Callable[[], Generator[Item, None, None]]) -> AsyncGenerator[Item, None]:
    """Run a blocking generator as an async one. If the iteration ends early, it is closed after its next item."""
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[Any] = asyncio.Queue()
    abandoned = threading.Event()
    end = object()

    def put(item: Any) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(items.put_nowait, item)

    def run() -> None:
        with contextlib.closing(make()) as source:
            for item in source:
                if abandoned.is_set():
                    return
                put(item)

    task = Task(run, name="sglang-chat-stream", on_done=lambda _: put(end))
    try:
        while (item := await items.get()) is not end:
            yield item
        task.outcome().unwrap()
    finally:
        abandoned.set()
