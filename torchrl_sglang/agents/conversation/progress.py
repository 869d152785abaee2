"""The text of a growing answer: the parts of it that will not change any more."""

from __future__ import annotations

from collections.abc import Sequence

from torchrl_sglang.agents.conversation.template import AgentTemplate
from torchrl_sglang.chat.quoted_text import THINKING, Thinking
from torchrl_sglang.chat.text_deltas import TextDeltas

__all__ = ["ProgressText"]

_CALL_MARKS = (
    *("<tool_call>", "<|tool_call|>", "<TOOLCALL>", "<function=", "[TOOL_CALLS]"),
    *("<|python_tag|>", "<|python_start|>"),
)


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
        text: all certain text, special tokens left out.
        content: the part of it that belongs to the message's content.
        reasoning: the part of it that belongs to its thinking.
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
        self.text = self.content = self.reasoning = ""
        self.is_stopped = False
        self._template = template
        self._stops = tuple(stops)
        self._deltas = TextDeltas(stops)
        self._has_tools, self._reads_here, self._thinks = has_tools, reads_here, thinks
        self._is_chat, self._holds_all = is_chat, holds_all
        self._ids: list[int] = []
        self._decoded = self._certain = ""
        self._start = self._read = 0

    def push(self, output_ids: Sequence[int]) -> None:
        """Add what is new.

        Args:
            output_ids: all tokens so far.
        """
        ids = list(output_ids)
        if ids and ids[-1] in self._template.special:  # it may be the token that ends the answer
            ids.pop()
        if self.is_stopped or len(ids) <= self._read or self._holds_all or self._template.is_byte(ids[-1]):
            return
        # A window of tokens, as some tokenizers decode a token in another way at the beginning of a text.
        before = self._template.decode(ids[self._start : self._read]) if self._read else ""
        window = self._template.decode(ids[self._start :])
        if window.endswith("\N{REPLACEMENT CHARACTER}"):
            return
        earlier = len(self._decoded)
        self._decoded += window[len(before) :]
        self._start, self._read = self._read, len(ids)
        end = self._stopped_at(earlier)
        self.is_stopped = end < len(self._decoded)
        self._certain += self._deltas.push(self._decoded[:end])
        self._divide()

    def _stopped_at(self, earlier: int) -> int:
        """Where the stop string begins that the new text has completed; else the end of the text."""
        found = [self._decoded.find(stop, max(0, earlier - len(stop) + 1)) for stop in self._stops]
        return min((at for at in found if at >= 0), default=len(self._decoded))

    def _divide(self) -> None:
        certain = self._certain
        thinking, rest = self._split(certain) if self._is_chat else ("", certain)
        self.reasoning = _longer(self.reasoning, self._template.without_marks(thinking))
        if self._has_tools:
            rest = self._template.without_marks(self._before_calls(rest)).strip()
        elif self._is_chat:
            rest = _without_beginning(rest, [opening for opening, _ in THINKING] if not self.content else [])
        self.content = _longer(self.content, self._template.without_marks(rest))
        self.text = _longer(self.text, self._template.without_marks(certain))

    def _split(self, text: str) -> tuple[str, str]:
        """The thinking and the content, without what may still be a part of a tag."""
        body = text.lstrip()
        opened = self._thinks
        if opened is None:
            opened = next((pair for pair in THINKING if body.startswith(pair[0])), None)
            if opened is None:
                return "", "" if any(opening.startswith(body) for opening, _ in THINKING) else text
            body = body[len(opened[0]) :]
        elif body.startswith(opened[0]):
            body = body[len(opened[0]) :]
        thinking, closing, rest = body.partition(opened[1])
        if not closing:
            return _without_beginning(thinking, [opened[1]]).strip(), ""
        return thinking.strip(), rest.lstrip()

    def _before_calls(self, rest: str) -> str:
        if not self._reads_here or rest.lstrip()[:1] in ("", "{", "["):
            return ""
        starts = [at for mark in _CALL_MARKS if (at := rest.find(mark)) >= 0]
        return rest[: min(starts)] if starts else _without_beginning(rest, _CALL_MARKS)


def _without_beginning(text: str, marks: Sequence[str]) -> str:
    """The text without an end that may be the beginning of a mark."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-count:]) for mark in marks):
            return text[:-count]
    return text


def _longer(before: str, now: str) -> str:
    """What was reported stays: a part that is held back again is not taken back."""
    return now if now.startswith(before) else before
