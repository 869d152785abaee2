"""Tool calls, found in the text that a model wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.chat.quoted_text import Searches, Thinking, next_quote
from torchrl_sglang.chat.response import RejectedCall, ToolCall
from torchrl_sglang.chat.tool_arguments import fit_arguments
from torchrl_sglang.chat.tool_formats import FORMATS, Passage, WrittenCall, read_bare, without_end

__all__ = ["FoundCalls", "find_tool_calls", "fit_call", "read_tool_calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCalls:
    """What a response says, and what it calls.

    Attributes:
        content: the text without the calls; the thinking is part of it.
        calls: the calls, in order, with the types of the tools' schemas.
        written: the same calls as they were written.
        rejected: passages that are written like calls, but can't be taken as such.
        thinking: the part of the text up to the end of the last thinking.
        answer: the rest of the text, with the calls.
    """

    content: str
    calls: tuple[ToolCall, ...] = ()
    written: tuple[WrittenCall, ...] = ()
    rejected: tuple[RejectedCall, ...] = ()
    thinking: str = ""
    answer: str = ""


def find_tool_calls(text: str, names: Sequence[str]) -> tuple[str, tuple[ToolCall, ...]]:
    """Find the calls in a response; see :func:`read_tool_calls`.

    Args:
        text: the response, special tokens included.
        names: names of the tools; a bare object counts only when it names one of them.

    Returns:
        The text without the calls, and the calls in order.

    Examples:
        >>> find_tool_calls('Hm. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', ["add"])
        ('Hm.', (ToolCall(name='add', arguments={'a': 1}),))
        >>> find_tool_calls('{"name": "eve", "arguments": {}}', ["add"])
        ('{"name": "eve", "arguments": {}}', ())
    """
    found = read_tool_calls(text, [{"type": "function", "function": {"name": name}} for name in names])
    return found.content, found.calls


def read_tool_calls(
    text: str, tools: Sequence[Mapping[str, Any]], *, thinks: Thinking | None = None, is_cut: bool = False
) -> FoundCalls:
    r"""Find the calls in a response, written in one of the common formats.

    The formats are ``<tool_call>{...}</tool_call>`` (Hermes, Qwen), ``<function=name>`` with a JSON object or with
    ``<parameter=key>`` tags in it (Llama 3, Qwen3-Coder), ``[TOOL_CALLS]`` (Mistral), and bare JSON objects (Llama 3)
    or ``[name(key=value)]`` (Llama 4), after ``<|python_tag|>`` or as the whole response. Strings may hold line breaks
    and closing tags. A call counts only where it is made: not inside the thinking, and not inside Markdown code.

    Args:
        text: the response, special tokens included.
        tools: the tools' JSON schemas in OpenAI's form, which give the arguments their types.
        thinks: the tags of the thinking that the prompt has opened.
        is_cut: the response was cut off.

    Examples:
        >>> found = read_tool_calls('<think>Shall I? <tool_call>{"name": "f"}</tool_call></think>No.', [])
        >>> found.content, found.calls
        ('<think>Shall I? <tool_call>{"name": "f"}</tool_call></think>No.', ())
        >>> read_tool_calls('<tool_call>{"name": "f", "arguments": {"a": 1,', [], is_cut=True).rejected[0].reason
        'the response was cut off in the middle of the call'
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    start = 0
    if thinks is not None:
        close = text.find(thinks[1])
        start = len(text) if close < 0 else close + len(thinks[1])
    found = _Search(text=text, is_cut=is_cut, names=set(schemas)).run(start)
    content, at = "", 0
    for begin, passage in found.passages:
        content += text[at:begin]
        at = passage.end
    written = tuple(call for _, passage in found.passages for call in passage.calls)
    return FoundCalls(
        content=without_end(content + text[at:]).strip() if written else text,
        calls=tuple(fit_call(call, schemas) for call in written),
        written=written,
        rejected=tuple(found.rejected),
        thinking=text[: found.thinking_end],
        answer=text[found.thinking_end :],
    )


def fit_call(call: WrittenCall, schemas: Mapping[str, Any]) -> ToolCall:
    """The call with the arguments' types of its tool's schema."""
    arguments, problems = fit_arguments(call.arguments, schemas.get(call.name))
    if call.name not in schemas and schemas:
        problems = (f"there is no tool {call.name!r}",)
    return ToolCall(name=call.name, arguments=arguments, id=call.id, problems=problems)


class _Search:
    """Goes through a text once: thinking, code and calls in the order in which they begin."""

    def __init__(self, *, text: str, is_cut: bool, names: set[str]) -> None:
        self.text = text
        self.names = names
        self.is_cut = is_cut
        self.passages: list[tuple[int, Passage]] = []
        self.rejected: list[RejectedCall] = []
        self.thinking_end = 0
        self._passages = _Passages(text)

    def run(self, start: int) -> _Search:
        self.thinking_end = at = start
        quotes = Searches(self.text)
        while True:
            if at == self.thinking_end and (bare := self._bare_calls()):
                self.passages.append((at, Passage(end=len(self.text), calls=bare)))
                return self
            quote = next_quote(quotes, at)
            opening = self._passages.find(at)
            if opening is not None and _comes_first(*opening, quote):
                begin, passage = opening
                self._take(begin, passage)
                at = passage.end
            elif quote is not None:
                self._quote(*quote)
                at = quote[1]
            else:
                if not self.passages and not self.rejected:
                    self._reject_bare()
                return self

    def _bare_calls(self) -> tuple[WrittenCall, ...]:
        """The calls, if the whole answer is calls of the given tools and nothing else."""
        try:
            calls = read_bare(self.text[self.thinking_end :]) if self._may_be_bare() else ()
        except ValueError:
            return ()
        return calls if all(call.name in self.names for call in calls) else ()

    def _reject_bare(self) -> None:
        """Report an answer that looks like a call of a given tool and nothing else, but is none."""
        if self._may_be_bare():
            try:
                read_bare(self.text[self.thinking_end :])
            except ValueError as error:
                self._take(self.thinking_end, Passage(end=len(self.text), fault=str(error), is_cut=True))

    def _may_be_bare(self) -> bool:
        answer = self.text[self.thinking_end :]
        is_json = answer.lstrip().startswith(("{", "[")) and '"name"' in answer
        is_python = answer.lstrip().startswith("[")
        return any(
            (is_json and json.dumps(name) in answer) or (is_python and f"{name}(" in answer) for name in self.names
        )

    def _take(self, begin: int, passage: Passage) -> None:
        if not passage.fault:
            self.passages.append((begin, passage))
            return
        reason = passage.fault
        if passage.is_cut and self.is_cut:
            reason = "the response was cut off in the middle of the call"
        self.rejected.append(RejectedCall(text=self.text[begin : passage.end], reason=reason))

    def _quote(self, begin: int, end: int, kind: str) -> None:
        if kind == "code":
            self.rejected += [
                RejectedCall(text=self.text[at : passage.end], reason="it is written inside Markdown code")
                for at, passage in _passages_within(self.text, begin, end)
                if passage.calls
            ]
            return
        if kind == "end":  # the prompt or the model began to think without a tag
            self.passages.clear()
            self.rejected.clear()
        self.thinking_end = end


def _comes_first(begin: int, passage: Passage, quote: tuple[int, int, str] | None) -> bool:
    """Whether the passage is reached before the quote; code that ends in the middle of a call is none."""
    if quote is None or begin < quote[0]:
        return True
    return quote[2] == "code" and bool(passage.calls) and begin < quote[1] < passage.end


def _passages_within(text: str, start: int, end: int) -> Iterator[tuple[int, Passage]]:
    passages = _Passages(text[:end])
    while (found := passages.find(start)) is not None:
        yield found
        start = max(found[1].end, found[0] + 1)


class _Passages:
    """The passages of a text that are written as calls, each read once."""

    def __init__(self, text: str) -> None:
        self._searches = Searches(text)
        self._last: tuple[int, Passage] | None = None

    def find(self, start: int) -> tuple[int, Passage] | None:
        """Where the next passage begins, and the passage."""
        matches = [(match, read) for pattern, read in FORMATS if (match := self._searches.find(pattern, start))]
        if not matches:
            return None
        match, read = min(matches, key=lambda found: found[0].start())
        if self._last is None or self._last[0] != match.start():
            self._last = match.start(), read(self._searches.text, match)
        return self._last
