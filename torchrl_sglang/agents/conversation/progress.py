"""What a growing answer gains of text that will not change any more; each token costs the same, in any answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torchrl_sglang.agents.conversation.template import AgentTemplate
from torchrl_sglang.chat.quoted_text import THINKING, Thinking
from torchrl_sglang.chat.text_deltas import Beginnings

__all__ = ["Gained", "ProgressText"]

_CALL_MARKS = (
    *("<tool_call>", "<|tool_call|>", "<TOOLCALL>", "<function=", "[TOOL_CALLS]"),
    *("<|python_tag|>", "<|python_start|>"),
)
_HALF = "\N{REPLACEMENT CHARACTER}"
_CHARACTER = 64
"""Tokens behind which a character has ended, with room. More of them without an end are bytes that are no text."""

_OPENINGS = Beginnings(opening for opening, _ in THINKING)
_CLOSINGS = {closing: Beginnings([closing]) for _, closing in THINKING}
_CALLS = Beginnings(_CALL_MARKS)


class Gained(NamedTuple):
    """What an answer has gained.

    Attributes:
        text: certain text, special tokens left out.
        content: the part of it that belongs to the message's content.
        reasoning: the part of it that belongs to its thinking.
    """

    text: str = ""
    content: str = ""
    reasoning: str = ""


_NOTHING = Gained()


class ProgressText:
    """Decodes a growing answer, and divides it into thinking and content as the finished answer will be.

    Args:
        template: whose tokenizer decodes.
        stops: stop strings, which are trimmed.
        has_tools: the answer may have tool calls: from the first passage on that may be one, the content is held back.
        reads_here: the format of the calls is known; otherwise all content is held back.
        thinks: the tags of the thinking that the prompt has opened.
        is_chat: whether thinking is separated.
        holds_all: any of the text may be trimmed until the answer ends.

    Attributes:
        is_stopped: it has a stop string.
    """

    def __init__(
        self,
        template: AgentTemplate,
        *,
        stops: Sequence[str] = (),
        has_tools: bool = False,
        reads_here: bool = True,
        thinks: Thinking | None = None,
        is_chat: bool = True,
        holds_all: bool = False,
    ) -> None:
        self.is_stopped = False
        self._template = template
        self._stops, self._beginnings = tuple(stops), Beginnings(stops, or_whole=True)
        self._holds_all = holds_all
        self._uncertain = ""  # the beginning of a stop string
        self._start = self._read = self._next = 0
        self._text = _Cleaned(template)
        content = _Cleaned(template, strips=has_tools)
        self._content: _Content = (_BeforeCalls if has_tools else _Content)(content, holds_all=not reads_here)
        self._thinking = _Thinking(template, thinks) if is_chat else None

    @property
    def num_read(self) -> int:
        """Number of tokens whose text was looked at: no stop string is complete in them, unless it is stopped."""
        return self._read

    def push(self, output_ids: Sequence[int]) -> Gained:
        """What new tokens add.

        Args:
            output_ids: all tokens so far, of which those that are known already are not read again.
        """
        end = len(output_ids)
        if end and output_ids[-1] in self._template.special:  # it may be the token that ends the answer
            end -= 1
        if self.is_stopped or self._holds_all or end <= self._read or end < self._next:
            return _NOTHING
        if self._template.is_byte(output_ids[end - 1]):
            return _NOTHING
        # A window of tokens, as some tokenizers decode a token in another way at the beginning of a text.
        before = self._template.decode(output_ids[self._start : self._read]) if self._read else ""
        window = self._template.decode(output_ids[self._start : end])
        if window.endswith(_HALF):
            unread = end - self._read
            self._next = end + unread // 2 if unread > _CHARACTER else 0
            return _NOTHING
        self._start, self._read = self._read, end
        return self._divided(self._certain(window[len(before) :]))

    def _certain(self, piece: str) -> str:
        """What new text makes certain: no stop string begins in it."""
        text = self._uncertain + piece
        end = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=len(text))
        self.is_stopped = end < len(text)
        settled = text[:end].rstrip(_HALF)
        settled = settled[: len(settled) - self._beginnings.at_end(settled)]
        self._uncertain = text[len(settled) :]
        return settled

    def _divided(self, piece: str) -> Gained:
        if not piece:
            return _NOTHING
        reasoning, rest = ("", piece) if self._thinking is None else self._thinking.add(piece)
        if self._thinking is None:
            content = self._content.cleaned.add(rest)
        else:
            content = self._content.add(rest)
        return Gained(text=self._text.add(piece), content=content, reasoning=reasoning)


class _Cleaned:
    """A text without special tokens. Its end is held back as long as it may be the beginning of one.

    Args:
        template: whose special tokens are left out.
        strips: white space at both ends is left out, too.
    """

    def __init__(self, template: AgentTemplate, *, strips: bool = False) -> None:
        self._template = template
        self._strips = strips
        self._held = self._space = ""
        self.is_begun = False

    def add(self, piece: str) -> str:
        """The new part of the text."""
        text = self._held + piece
        end = len(text) - self._template.mark_beginnings.at_end(text)
        self._held = text[end:]
        text = self._template.without_marks(text[:end])
        if self._strips:
            text = self._space + text if self.is_begun else text.lstrip()
            settled = text.rstrip()
            self._space = text[len(settled) :]
            text = settled
        self.is_begun = self.is_begun or bool(text)
        return text


class _Thinking:
    """Divides a text into thinking and the rest, without what may still be a part of a tag."""

    def __init__(self, template: AgentTemplate, opened: Thinking | None) -> None:
        self._opened = opened
        self._cleaned = _Cleaned(template, strips=True)
        self._held = ""
        self._state = "before"

    def add(self, piece: str) -> tuple[str, str]:
        """The new part of the thinking, and that of the rest."""
        if self._state == "rest":
            return "", piece
        self._held += piece
        if self._state == "before":
            self._begin()
        thinking = self._think() if self._state == "thinking" else ""
        if self._state == "after":
            self._held = self._held.lstrip()
            self._state = "rest" if self._held else "after"
        rest = ""
        if self._state == "rest":
            rest, self._held = self._held, ""
        return thinking, rest

    def _begin(self) -> None:
        body = self._held.lstrip()
        if self._opened is None:
            self._opened = next((pair for pair in THINKING if body.startswith(pair[0])), None)
            if self._opened is None:
                if not any(opening.startswith(body) for opening, _ in THINKING):
                    self._state = "rest"
                return
        elif self._opened[0].startswith(body) and body != self._opened[0]:
            return
        self._held = body.removeprefix(self._opened[0])
        self._state = "thinking"

    def _think(self) -> str:
        assert self._opened is not None
        closing = self._opened[1]
        thinking, found, rest = self._held.partition(closing)
        if found:
            self._state = "after"
        else:
            end = len(thinking) - _CLOSINGS[closing].at_end(thinking)
            thinking, rest = thinking[:end], thinking[end:]
        self._held = rest
        return self._cleaned.add(thinking)


class _Content:
    """The content of an answer without tools."""

    def __init__(self, cleaned: _Cleaned, *, holds_all: bool) -> None:
        self.cleaned = cleaned
        self._is_closed = holds_all
        self._held = ""

    def add(self, piece: str) -> str:
        """The new part of the content."""
        text = self._held + piece
        end = len(text) if self.cleaned.is_begun else len(text) - _OPENINGS.at_end(text)
        self._held = text[end:]
        return self.cleaned.add(text[:end])


class _BeforeCalls(_Content):
    """The content of an answer that may have tool calls: what is certain to stand before all of them."""

    _is_plain = False

    def add(self, piece: str) -> str:
        """The new part of the content."""
        if self._is_closed:
            return ""
        text = self._held + piece
        if not self._is_plain:
            self._is_plain = bool(text.strip())
            self._is_closed = text.lstrip()[:1] in ("{", "[")
        if self._is_closed or not self._is_plain:
            self._held = text
            return ""
        end = min((at for mark in _CALL_MARKS if (at := text.find(mark)) >= 0), default=-1)
        self._is_closed = end >= 0
        end = end if self._is_closed else len(text) - _CALLS.at_end(text)
        self._held = text[end:]
        return self.cleaned.add(text[:end])
