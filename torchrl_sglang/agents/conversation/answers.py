"""A sampled answer as a message: thinking, content and tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.agents.conversation.messages import Call, Message, split_thinking
from torchrl_sglang.agents.conversation.template import AgentTemplate
from torchrl_sglang.agents.types import FinishReason
from torchrl_sglang.chat.quoted_text import open_thinking
from torchrl_sglang.chat.tool_call_reader import call_ids
from torchrl_sglang.chat.tool_calls import FoundCalls, read_tool_calls

__all__ = ["Written", "decode_answer", "find_calls", "finish_reason", "read_answer"]

_PROMPT_END = 64  # characters of a prompt's end that can hold the tag that opens the thinking


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The text of sampled tokens.

    Attributes:
        text: the answer, without the token or string that ended it; special tokens are part of it.
        beyond: the rest of the sampled text: the stop string, and what its last token has behind it.
    """

    text: str
    beyond: str = ""


def decode_answer(
    output_ids: Sequence[int], *, finish_reason: str, matched: int | str | None, template: AgentTemplate
) -> Written:
    """The text of an answer.

    Args:
        output_ids: the sampled tokens.
        finish_reason: as the server reported it.
        matched: the stop token or string that ended it.
        template: whose tokenizer decodes.
    """
    ids = list(output_ids)
    is_end = isinstance(matched, int) or (matched is None and finish_reason == "stop")
    if is_end and ids and (ids[-1] == matched or ids[-1] in template.special):
        return Written(text=template.decode(ids[:-1]))
    if isinstance(matched, str) and ids and ids[-1] in template.special:
        # SGLang (0.5.23) looks for stop strings in the text of special tokens too: the stop "i" is in <|im_end|>.
        is_asked = template.decode(ids[-1:]) == matched and ids[-1] not in template.turn_end_ids
        if not is_asked:
            return Written(text=template.decode(ids[:-1]))
    text = template.decode(ids)
    if isinstance(matched, str):
        # The token that completes the stop string ends the generation, so it lies at the end.
        earliest = max(0, len(template.decode(ids[:-1])) - len(matched) + 1)
        at = text.find(matched, earliest)
        at = text.rfind(matched) if at < 0 else at
        if at >= 0:
            return Written(text=text[:at], beyond=text[at:])
    return Written(text=text)


def find_calls(text: str, tools: Sequence[Any], *, prompt_text: str, is_cut: bool) -> FoundCalls:
    """The calls of an answer, in one of the formats that this package reads.

    Args:
        text: the answer.
        tools: JSON schemas of the tools.
        prompt_text: the text before it.
        is_cut: it was cut off.
    """
    return read_tool_calls(text, tools, thinks=open_thinking(prompt_text[-_PROMPT_END:]), is_cut=is_cut)


def read_answer(
    written: Written,
    found: FoundCalls | None,
    *,
    prompt_text: str,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    template: AgentTemplate,
    parser: str | None = None,
    earlier_calls: int = 0,
    most_calls: int | None = None,
) -> Message:
    """The answer as a message.

    Args:
        written: its text.
        found: its calls; ``None`` if the request has no tools.
        prompt_text: the text before it.
        prompt_ids: the tokens before it, or what stands for them, which calls without an id get theirs from.
        output_ids: its tokens, likewise.
        template: the chat template.
        parser: SGLang's name of the parser for the model's calls.
        earlier_calls: number of calls in the conversation before it.
        most_calls: how many calls the message may have.
    """
    opened = open_thinking(prompt_text[-_PROMPT_END:])
    source = written.text
    calls: tuple[Call, ...] = ()
    if found is not None and found.calls:
        named = call_ids(
            found.calls, parser=parser, ids_T=prompt_ids, output_ids=output_ids, earlier_calls=earlier_calls
        )
        calls = tuple(Call.of(call) for call in named[:most_calls])
        source = found.content
    reasoning, content, _ = split_thinking(source, opened=opened)
    content = template.without_marks(content)
    return Message(
        role="assistant",
        content=content if found is None else content.strip(),
        calls=calls,
        reasoning=template.without_marks(reasoning).strip() or None,
        raw=_opening(prompt_text, opened) + written.text,
    )


def _opening(prompt_text: str, opened: tuple[str, str] | None) -> str:
    """What the end of the prompt has of the answer: the tag that opens its thinking."""
    return "" if opened is None else prompt_text[prompt_text.rindex(opened[0]) :]


def finish_reason(reported: str, message: Message) -> FinishReason:
    """Why an answer ended, in OpenAI's words."""
    if reported == "length":
        return "length"
    return "tool_calls" if message.calls else "stop"
