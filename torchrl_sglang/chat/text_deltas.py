"""A response's text in pieces, while it is written; the pieces together are the final text to the last character."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["TextDeltas"]


class TextDeltas:
    """Cuts a growing text into pieces that can be shown at once.

    Held back is what may still change: the beginning of a stop string (which the server trims when the string is
    complete), and an unfinished character.

    Args:
        stops: stop strings.

    Examples:
        >>> deltas = TextDeltas(["END"])
        >>> deltas.push("The E"), deltas.push("The Elk"), deltas.push("The Elk. EN"), deltas.finish("The Elk. ")
        ('The ', 'Elk', '. ', '')
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._shown = ""

    def push(self, text: str) -> str:
        """What is new and settled in the text so far."""
        settled = text.rstrip("\N{REPLACEMENT CHARACTER}")
        settled = settled[: len(settled) - self._unsettled(settled)]
        return self._show(settled) if len(settled) > len(self._shown) else ""

    def finish(self, text: str) -> str:
        """The rest, when the text is complete."""
        return self._show(text)

    def _unsettled(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stops), default=0)
        return next((n for n in range(min(longest, len(text)), 0, -1) if self._may_be_stop(text[-n:])), 0)

    def _may_be_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown = text
        return new
