"""``TextDeltas``: the new part of a growing text; the parts joined are exactly the final text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["Beginnings", "TextDeltas"]


class Beginnings:
    """How much of a text's end may be the beginning of one of some marks.

    Args:
        marks: the marks, such as stop strings or tags.
        or_whole: a whole mark at the end counts, too.

    Examples:
        >>> Beginnings(["END", "</think>"]).at_end("The E"), Beginnings(["END"]).at_end("The END")
        (1, 0)
    """

    def __init__(self, marks: Iterable[str], *, or_whole: bool = False) -> None:
        self._known = frozenset(mark[:size] for mark in marks for size in range(1, len(mark) + or_whole))
        self._firsts = tuple({each[0] for each in self._known})
        self._longest = max(map(len, self._known), default=0)

    def at_end(self, text: str) -> int:
        """Number of the last characters that are the longest beginning of a mark."""
        end = text[-self._longest :] if self._longest else ""
        if not any(first in end for first in self._firsts):
            return 0
        return next((len(end) - start for start in range(len(end)) if end[start:] in self._known), 0)


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
        self._stops = Beginnings(stops, or_whole=True)
        self._sent = ""

    def push(self, text: str) -> str:
        """The new part of the text so far that will not change."""
        settled = text.rstrip("\N{REPLACEMENT CHARACTER}")
        settled = settled[: len(settled) - self._stops.at_end(settled)]
        return self._advance(settled) if len(settled) > len(self._sent) else ""

    def finish(self, text: str) -> str:
        """The rest of the complete text."""
        return self._advance(text)

    def _advance(self, text: str) -> str:
        new = text[len(self._sent) :]
        self._sent = text
        return new
