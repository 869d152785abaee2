"""Blocking calls and iterators for ``async`` callers, in daemon threads that never hold up the end of a program."""

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
    """Run a blocking call and wait for it; when the waiting is cancelled, the call itself runs on to its end."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: Task[Result]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            loop.call_soon_threadsafe(done.set)

    task = Task(call, name="sglang-chat", on_done=wake)
    await done.wait()
    return task.outcome().unwrap()


async def iterate_in_thread(make: Callable[[], Generator[Item, None, None]]) -> AsyncGenerator[Item, None]:
    """Run a blocking generator. When the iteration is left early, the generator is closed after its next item."""
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[Any] = asyncio.Queue()
    left = threading.Event()
    end = object()

    def put(item: Any) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(items.put_nowait, item)

    def run() -> None:
        with contextlib.closing(make()) as source:
            for item in source:
                if left.is_set():
                    return
                put(item)

    task = Task(run, name="sglang-chat-stream", on_done=lambda _: put(end))
    try:
        while (item := await items.get()) is not end:
            yield item
        task.outcome().unwrap()
    finally:
        left.set()
