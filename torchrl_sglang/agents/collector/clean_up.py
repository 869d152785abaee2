"""``until_done``: waits for what must not be given up in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

__all__ = ["until_done"]


async def until_done(work: Iterable[asyncio.Future[Any]]) -> None:
    """Wait until all have ended, whatever their results.

    Raises:
        asyncio.CancelledError: the waiting task was cancelled, perhaps several times. Raised when all have ended, none
            of which is cancelled by it.
    """
    work = list(work)
    waiting = set(work)
    cancelled: asyncio.CancelledError | None = None
    while waiting:
        try:
            _, waiting = await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
            waiting = {each for each in waiting if not each.done()}
    for each in work:
        if not each.cancelled():
            each.exception()  # marks it as seen
    if cancelled is not None:
        raise cancelled
