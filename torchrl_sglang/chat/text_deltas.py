"""``TextDeltas``: the new part of a growing text; the parts joined are exactly the final text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["TextDeltas"]


class TextDeltas:
    """Splits a growing text into pieces that will not change any more.

    The end of the text is held back while it may change: the beginning of a stop string (the server trims the string
    when it is complete), or an incomplete character.

    Args:
        stops: stop strings.

    Examples:
        >>> deltas = TextDeltas(["END"])
        >>> deltas.push("The E"), deltas.push("The Elk"), deltas.push("The Elk. EN"), deltas.finish("The Elk. ")
        ('The ', 'Elk', '. ', '')
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._sent = ""

    def push(self, text: str) -> str:
        """The new part of the text so far that will not change."""
        settled = text.rstrip("\N{REPLACEMENT CHARACTER}")
        settled = settled[: len(settled) - self._unsettled(settled)]
        return self._advance(settled) if len(settled) > len(self._sent) else ""

    def finish(self, text: str) -> str:
        """The rest of the complete text."""
        return self._advance(text)

    def _unsettled(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stops), default=0)
        return next((n for n in range(min(longest, len(text)), 0, -1) if self._may_be_stop(text[-n:])), 0)

    def _may_be_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)

    def _advance(self, text: str) -> str:
        new = text[len(self._sent) :]
        self._sent = text
        return new
