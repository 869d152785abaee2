"""Stop strings that lie across the place where a response was interrupted and continued.

A server looks for stop strings in what it has generated itself, so it sees such a one in neither part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchrl_sglang.config import SamplingParams

__all__ = ["StopStrings"]

_HALF = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class StopStrings:
    """The stop strings and expressions of a response that was continued.

    Attributes:
        strings: the stop strings.
        patterns: the regular expressions of ``stop_regex``.
        decode: the text of tokens, special tokens included.

    Examples:
        >>> stops = StopStrings(("Obs:",), (), lambda ids: "".join(map(chr, ids)))
        >>> stops.tokens_to_watch([ord(letter) for letter in "a cat Ob"])
        2
        >>> stops.find([ord(letter) for letter in "a cat Obs: he"])
        (10, 'Obs:')
    """

    strings: Sequence[str]
    patterns: Sequence[str]
    decode: Callable[[Sequence[int]], str]

    @classmethod
    def of(cls, sampling: SamplingParams, decode: Callable[[Sequence[int]], str]) -> StopStrings:
        """Those of some settings."""
        return cls(sampling.stop, sampling.stop_regex, decode)

    def find(self, ids: Sequence[int]) -> tuple[int, str] | None:
        """The number of tokens that complete the first stop string, and the stop string or expression.

        Of several that one token completes it is the first one given, as a server decides (SGLang 0.5.23), strings
        before expressions. ``min_new_tokens`` doesn't count: servers end at stop strings before so many tokens, too.

        Args:
            ids: all tokens of the response.
        """
        if not (self.strings or self.patterns) or self._match(ids) is None:
            return None
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._match(ids[:middle]) is None else (low, middle)
        found = self._match(ids[:low])
        return None if found is None else (low, found)

    def _match(self, ids: Sequence[int]) -> str | None:
        text = self.decode(ids)
        strings = (stop for stop in self.strings if stop in text)
        return next(strings, None) or next((each for each in self.patterns if re.search(each, text)), None)

    def tokens_to_watch(self, ids: Sequence[int]) -> int:
        """After how many further tokens it is known whether a stop string lies across the end of these.

        Args:
            ids: the tokens of the response so far.

        Returns:
            The number; 0 if no stop string can begin in these tokens and end behind them. Expressions are not watched
            for: which texts one may still match is not known.
        """
        if not self.strings or not ids:
            return 0
        longest = max(map(len, self.strings))
        text = self.decode(ids[-4 * (longest + 1) :])  # a token has a character, or one of its at most four bytes
        whole = text.rstrip(_HALF)
        return max(_rest(stop, whole, is_half=len(whole) < len(text)) for stop in self.strings)


def _rest(stop: str, text: str, *, is_half: bool) -> int:
    """Bytes of a stop string that may follow a text that ends with its beginning; 0 if it doesn't."""
    # The half character at the end may be the stop string's first, and a tokenizer may drop a space that is the first
    # character of what a server generates, so that the server sees a stop string behind the text not whole either.
    if is_half or stop[0] == " ":
        return len(stop.encode())
    for size in range(1, min(len(stop) - 1, len(text)) + 1):
        if text.endswith(stop[:size]):
            return len(stop[size:].encode())
    return 0
