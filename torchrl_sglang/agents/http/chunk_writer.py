"""``ChunkWriter``: a turn as OpenAI's chunks, those of ``/chat/completions`` and of ``/completions``."""

from __future__ import annotations

from collections.abc import Iterator

from torchrl_sglang.agents.http.api_errors import ApiError
from torchrl_sglang.agents.http.chat_reply import ChatReply
from torchrl_sglang.agents.http.event_stream import data_event
from torchrl_sglang.agents.http.reply_deltas import ReplyDeltas
from torchrl_sglang.agents.http.text_reply import TextReply
from torchrl_sglang.agents.types import Progress, Turn

__all__ = ["ChunkWriter"]


class ChunkWriter:
    """Writes chunks.

    Args:
        reply: the form of the chunks.
        include_usage: end with the numbers of tokens.
    """

    def __init__(self, reply: ChatReply | TextReply, *, include_usage: bool) -> None:
        self._reply = reply
        self._include_usage = include_usage
        self._deltas = ReplyDeltas()

    def progress(self, progress: Progress) -> Iterator[bytes]:
        """See :class:`EventWriter`."""
        yield from self._begin(progress.index)
        yield from map(data_event, self._reply.piece(self._deltas.of(progress)))

    def finish(self, turn: Turn) -> Iterator[bytes]:
        """See :class:`EventWriter`."""
        for choice in turn.choices:
            yield from self._begin(choice.index)
            yield from map(data_event, self._reply.piece(self._deltas.rest(choice)))
            yield from map(data_event, self._reply.end(choice, turn))
        if self._include_usage:
            yield data_event(self._reply.usage_piece(turn))
        yield data_event("[DONE]")

    def failure(self, error: ApiError) -> Iterator[bytes]:
        """See :class:`EventWriter`."""
        yield data_event(error.openai())

    def _begin(self, index: int) -> Iterator[bytes]:
        first = self._reply.begin(index) if self._deltas.is_new(index) else None
        if first is not None:
            yield data_event(first)
