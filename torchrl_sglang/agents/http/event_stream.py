"""Answers in pieces, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from torchrl_sglang.agents.http.api_errors import ApiError
from torchrl_sglang.agents.http.json_reply import json_bytes
from torchrl_sglang.agents.http.running_turn import RunningTurn, until_disconnect
from torchrl_sglang.agents.http.translation import api_error
from torchrl_sglang.agents.types import Progress, Turn
from torchrl_sglang.errors import SGLangError

__all__ = ["EventWriter", "data_event", "event_stream", "named_event"]

_SILENCE_S = 15.0
"""A comment is sent after this long without an event: proxies close connections that are silent for a minute."""


class EventWriter(Protocol):
    """Writes a turn as the events of one API."""

    def progress(self, progress: Progress) -> Iterator[bytes]:
        """Events for what a choice has gained."""

    def finish(self, turn: Turn) -> Iterator[bytes]:
        """Events for the rest of the turn, and for its end."""

    def failure(self, error: ApiError) -> Iterator[bytes]:
        """Events that tell the client of a failure in the middle."""


def data_event(data: Any) -> bytes:
    """An event without a name."""
    return b"data: %b\n\n" % (data.encode() if isinstance(data, str) else json_bytes(data))


def named_event(name: str, data: Any) -> bytes:
    """An event with a name."""
    return f"event: {name}\n".encode() + data_event(data)


async def event_stream(
    request: Request, turn: RunningTurn, writer: EventWriter, *, undelivered: Callable[[Turn], None]
) -> StreamingResponse:
    """The answer to a request in pieces, once the first token is there.

    Args:
        request: the request.
        turn: the turn, which has begun.
        writer: writes its events.
        undelivered: called with the turn if it was generated, but the client left before its end.

    Raises:
        SGLangError: nothing was generated; the answer is one with an error status.
        ClientDisconnect: the client is gone.
    """
    try:
        await until_disconnect(request, turn.begun())
    except BaseException:
        await turn.cancel()
        if turn.finished is not None:
            undelivered(turn.finished)
        raise
    return _TurnStream(turn, writer, undelivered)


class _TurnStream(StreamingResponse):
    """The pieces of a turn, which ends when the client closes the connection."""

    def __init__(self, turn: RunningTurn, writer: EventWriter, undelivered: Callable[[Turn], None]) -> None:
        super().__init__(self._events(writer), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._turn = turn
        self._undelivered = undelivered
        self._is_delivered = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._turn.cancel()
            finished = self._turn.finished
            if finished is not None and not self._is_delivered:
                self._undelivered(finished)

    async def _events(self, writer: EventWriter) -> AsyncIterator[bytes]:
        try:
            async for progress in self._turn.reports(at_least_every_s=_SILENCE_S):
                if progress is None:
                    yield b": the answer is not finished\n\n"
                    continue
                for event in writer.progress(progress):
                    yield event
            for event in writer.finish(await self._turn.result()):
                yield event
            self._is_delivered = True
        except SGLangError as error:
            for event in writer.failure(api_error(error)):
                yield event
