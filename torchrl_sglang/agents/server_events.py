"""The events of a server's stream, as bytes: those that are worth reading."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

import aiohttp

__all__ = ["END", "Growth", "event_data", "event_lines"]

END = b"[DONE]"
"""The data of the event that ends a stream."""
_ABORT = b'"abort"'
_UNFINISHED = b'"finish_reason":null'
_LONG_EVENT = 64 * 2**10
"""Bytes of an event with some two thousand tokens and their log-probs."""


def event_data(lines: Sequence[bytes], *, latest_only: bool) -> list[bytes]:
    """The data of server-sent events.

    Args:
        lines: lines that came together.
        latest_only: only the last one's, and the end of the stream, if that is among them. The event of an
            abort is kept with the one before it: some versions of SGLang write the last token alone into it.

    Examples:
        >>> lines = [b"data: 1", b"", b"data: 2", b"", b"data: [DONE]", b""]
        >>> event_data(lines, latest_only=False), event_data(lines, latest_only=True)
        ([b'1', b'2', b'[DONE]'], [b'2', b'[DONE]'])
    """
    found = [line[5:].strip() for line in lines if line.startswith(b"data:")]
    if not latest_only or len(found) < 2:
        return found
    ends = found[-1] == END
    is_abort = _ABORT in found[-2 if ends else -1]
    return found[-1 - ends - is_abort :]


class Growth:
    """Of a long answer's events, each of which has all tokens so far, those that have enough that is new.

    To read an event takes as long as it is. So that an answer of a million tokens does not take a million times a
    million steps, events above 64 KiB are read when they are longer by a 256th than the last one that was read.

    Examples:
        >>> growth = Growth()
        >>> events = [b'{"finish_reason":null,"text":"%b"}' % (b"a" * count) for count in (66000, 66100, 66400)]
        >>> [len(data) - 32 for data in growth.worth_reading(events)]
        [66000, 66400]
    """

    def __init__(self) -> None:
        self._least = 0
        self._left_out: bytes | None = None

    def worth_reading(self, events: Sequence[bytes]) -> Iterator[bytes]:
        """Those of the next events that are to be read; the last one of an answer always is.

        An abort needs the event before it: some versions of SGLang write the last token alone into it.
        """
        for data in events:
            if len(data) < self._least and _UNFINISHED in data:
                self._left_out = data
                continue
            if self._left_out is not None and _ABORT in data:
                yield self._left_out
            self._left_out = None
            self._least = len(data) + len(data) // 256 if len(data) > _LONG_EVENT else 0
            yield data


async def event_lines(content: aiohttp.StreamReader) -> AsyncIterator[list[bytes]]:
    """The lines of an answer that came together, of any length: aiohttp's own iterator limits them."""
    waiting: list[bytes] = []
    async for chunk in content.iter_any():
        waiting.append(chunk)
        if b"\n" in chunk:
            *lines, rest = b"".join(waiting).split(b"\n")
            waiting = [rest]
            yield lines
    if rest := b"".join(waiting):
        yield [rest]
