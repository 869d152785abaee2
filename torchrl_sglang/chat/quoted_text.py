"""Where a response thinks, and where it quotes: calls written there are not made."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["THINKING", "Searches", "Thinking", "next_quote", "open_thinking"]

Thinking = tuple[str, str]

THINKING: Sequence[Thinking] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<ifm|think>", "</ifm|think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
)
"""The tags of families, before and after the thinking."""

_OPENINGS = tuple(opening for opening, _ in THINKING)
_TAGS = re.compile("|".join(re.escape(tag) for pair in THINKING for tag in pair))
_FENCE = re.compile(r"^[ ]{0,3}(`{3,}|~{3,})", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`[^`\n]+`(?!`)")


def open_thinking(prompt: str) -> Thinking | None:
    r"""The thinking that the end of a prompt has opened, and that the response therefore begins with.

    Examples:
        >>> open_thinking("<|im_start|>assistant\n<think>\n")
        ('<think>', '</think>')
        >>> open_thinking("What does <think> mean?<|im_end|>") is None
        True
    """
    end = prompt.rstrip()
    if not end.endswith(_OPENINGS):
        return None
    return next(pair for pair in THINKING if end.endswith(pair[0]))


class Searches:
    """Searches one text from left to right; a pattern's match is kept until the search has passed it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._kept: dict[re.Pattern[str], re.Match[str] | None] = {}

    def find(self, pattern: re.Pattern[str], start: int) -> re.Match[str] | None:
        """The next match from ``start`` on, which never decreases."""
        kept = self._kept.get(pattern)
        if pattern not in self._kept or (kept is not None and kept.start() < start):
            self._kept[pattern] = kept = pattern.search(self.text, start)
        return kept


def next_quote(searches: Searches, start: int) -> tuple[int, int, str] | None:
    """The next thinking, stray end of thinking, or code, from ``start`` on.

    Returns:
        Where it begins and ends, and what it is: ``"thinking"``, ``"end"`` (an end without a beginning) or ``"code"``.
    """
    text, found = searches.text, []
    tag = searches.find(_TAGS, start)
    if tag is not None:
        close = dict(THINKING).get(tag[0])
        end = tag.end() if close is None else _after(text, close, tag.end())
        found.append((tag.start(), end, "end" if close is None else "thinking"))
    fence = searches.find(_FENCE, start)
    if fence is not None:
        closing = re.compile(rf"^[ ]{{0,3}}{re.escape(fence[1][0])}{{{len(fence[1])},}}[ \t]*$", re.MULTILINE)
        ending = closing.search(text, fence.end())
        found.append((fence.start(), ending.end() if ending else len(text), "code"))
    inline = searches.find(_INLINE, start)
    if inline is not None:
        found.append((inline.start(), inline.end(), "code"))
    return min(found, default=None)


def _after(text: str, tag: str, start: int) -> int:
    at = text.find(tag, start)
    return len(text) if at < 0 else at + len(tag)
