"""Turns under way: reports of their progress, and their end when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from torchrl_sglang.agents.types import OnProgress, Progress, Turn

__all__ = ["RunningTurn", "until_disconnect"]

T = TypeVar("T")


class RunningTurn:
    """A turn in a task of its own. Reports that nobody has read are merged, so a slow reader delays nothing.

    Args:
        start: starts the turn, with the function to which it reports.
    """

    def __init__(self, start: Callable[[OnProgress], Coroutine[Any, Any, Turn]]) -> None:
        self._unread: dict[int, list[Progress]] = {}
        self._changed = asyncio.Event()
        self._task = asyncio.ensure_future(start(self._report))
        self._task.add_done_callback(lambda _task: self._changed.set())

    def _report(self, progress: Progress) -> None:
        self._unread.setdefault(progress.index, []).append(progress)
        self._changed.set()

    async def begun(self) -> None:
        """Wait for the first report, or for the end.

        Raises:
            SGLangError: the turn failed before anything was generated.
        """
        await self._changed.wait()
        if self._task.done():
            self._task.result()

    async def reports(self, *, at_least_every_s: float) -> AsyncIterator[Progress | None]:
        """The reports; ``None`` after a time without one. Ends with the turn."""
        loop = asyncio.get_running_loop()
        while True:
            timer = loop.call_later(at_least_every_s, self._changed.set)
            await self._changed.wait()
            timer.cancel()
            self._changed.clear()
            ended = self._task.done()
            unread, self._unread = self._unread, {}
            for reports in unread.values():
                yield Progress.joined(reports)
            if not unread and not ended:
                yield None
            if ended:
                return
            if self._task.done():  # it ended while a report was sent
                self._changed.set()

    @property
    def finished(self) -> Turn | None:
        """The whole turn, if it has been generated."""
        if not self._task.done() or self._task.cancelled() or self._task.exception() is not None:
            return None
        return self._task.result()

    async def result(self) -> Turn:
        """The whole turn.

        Raises:
            SGLangError: the turn failed.
        """
        return await self._task

    async def cancel(self) -> None:
        """End the turn, unless it has ended."""
        await _cancel(self._task)


async def until_disconnect(
    request: Request, work: Coroutine[Any, Any, T], *, undelivered: Callable[[T], None] | None = None
) -> T:
    """The result of ``work``, which is cancelled when the client closes the connection.

    Args:
        request: the request.
        work: what is waited for.
        undelivered: called with the result if the client is gone by then.

    Raises:
        ClientDisconnect: the client is gone.
    """
    watch = _Watch(request)
    try:
        result = await work
        if undelivered is None:
            return result
        try:
            await asyncio.sleep(0)  # a disconnection of this moment is noticed
        except asyncio.CancelledError:
            if watch.is_gone:
                undelivered(result)
            raise
        return result
    except asyncio.CancelledError:
        if watch.is_gone:
            raise ClientDisconnect from None
        raise
    finally:
        watch.end()


class _Watch:
    """Cancels the current task when the client of its request closes the connection.

    Args:
        request: the request, whose body has been read.

    Attributes:
        is_gone: whether the client is gone.
    """

    __slots__ = ("_task", "_watched", "is_gone")

    def __init__(self, request: Request) -> None:
        self.is_gone = False
        self._watched: asyncio.Task[Any] | None = asyncio.current_task()
        self._task = asyncio.get_running_loop().create_task(self._run(request))

    async def _run(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        if self._watched is not None:
            self.is_gone = True
            self._watched.cancel()

    def end(self) -> None:
        """From now on nothing is cancelled."""
        self._watched = None
        self._task.cancel()


async def _cancel(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # marks it as seen: nobody is there to be told
