"""A model's chat template, and messages in the form that it takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang.agents.conversation.forms import Form, join_contents, with_first_system, without_system
from torchrl_sglang.agents.conversation.kept import Kept, value_key
from torchrl_sglang.agents.conversation.messages import Call, Message
from torchrl_sglang.agents.conversation.segment_ids import SegmentIds
from torchrl_sglang.chat.text_deltas import Beginnings
from torchrl_sglang.chat.tool_parsers import template_text
from torchrl_sglang.chat_templates import ChatRenderer
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.fast_tokenizers import decode_plainly
from torchrl_sglang.text_tokens import special_ids

__all__ = ["AgentTemplate"]

_KEPT_RENDERERS = 32
_KEPT_CHARACTERS = 4 * 2**20
_TOOL_ROLE = re.compile(r"""['"]tool['"]""")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_TOOL_PROMPT = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class AgentTemplate:
    """Renders conversations by the model's own chat template.

    A template that doesn't know tools, tool calls or thinking gets them as text: tools in the system message, calls as
    they were written, results in a user's message. One that refuses system messages gets their text at the front of the
    next user's message.

    Args:
        tokenizer: the model's tokenizer.
        chat_template: a Jinja template instead of the tokenizer's own.

    Raises:
        ConfigError: there is no chat template.

    Attributes:
        special: ids of tokens that mark places in a conversation, and of those that end an answer.
        end_texts: texts of the tokens that end an answer.
        mark_beginnings: finds what may be the beginning of a special token's text at the end of a text.
        segments: encodes rendered texts.
        prompts: those of conversations in which nothing was generated yet.
        knows_tools: whether the template writes tools.
        knows_calls: whether it writes calls; DeepSeek's do, and write no tools.
        tells_time: whether it writes today's date, as Llama 3.2's does: tomorrow's prompt is another one.
        takes_several_calls: whether the template takes several calls in one message, which Llama 3's refuses.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._chat_template = chat_template
        plain = ChatRenderer(tokenizer, chat_template=chat_template)
        source = chat_template or template_text(tokenizer)
        # mistral-common's tokenizers have no template, and know all of it
        self.knows_tools = not source or "tools" in source
        self.knows_calls = not source or "tool_calls" in source
        self._knows_results = self.knows_calls and (self.knows_tools or bool(_TOOL_ROLE.search(source)))
        self._knows_reasoning = "reasoning_content" in source
        self._knows_developer = "developer" in source
        self.tells_time = "strftime_now" in source
        self.turn_end_ids = tuple(sorted(plain.turn_end_ids()))
        self.special = special_ids(tokenizer) | frozenset(self.turn_end_ids)
        self.end_texts = tuple(text for text in (self.decode([token]) for token in self.turn_end_ids) if text.strip())
        marks = _marks(tokenizer)
        self.mark_beginnings = Beginnings(marks)
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None
        self._renderers: dict[bytes, ChatRenderer] = {}
        self.segments = SegmentIds(tokenizer)
        self.prompts: Kept[Any, Any] = Kept(_KEPT_CHARACTERS)
        self._takes_system = _renders(plain, [{"role": "system", "content": "?"}, {"role": "user", "content": "?"}])
        # mistral-common's tokenizers raise errors of their own for what they don't take.
        later = [{"role": role, "content": "?"} for role in ("user", "assistant", "system", "user")]
        self._takes_later_system = not source or _renders(plain, later)
        self.takes_several_calls = not source or _renders(plain, _calls(2)) or not _renders(plain, _calls(1))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special tokens included."""
        text = decode_plainly(self.tokenizer, ids)
        if text is None:
            text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def is_byte(self, token: int) -> bool:
        """Whether a token is a single byte, whose text depends on the bytes that follow it."""
        return _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(token))) is not None

    def without_marks(self, text: str) -> str:
        """The text without special tokens."""
        return text if self._marks is None else self._marks.sub("", text)

    def renderer(self, tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> ChatRenderer:
        """The renderer for these tools and variables of the template.

        Raises:
            ConfigError: a variable's name is taken.
        """
        key = value_key([tools, variables])
        known = self._renderers.get(key)
        if known is None:
            given = {"tools": [dict(tool) for tool in tools]} if tools and self.knows_tools else {}
            known = _Renderer(self.tokenizer, chat_template=self._chat_template, variables={**variables, **given})
            known.segment_ids = self.segments
            if len(self._renderers) >= _KEPT_RENDERERS:
                self._renderers.clear()
            self._renderers[key] = known  # not read again: the prompts of long texts are made in other threads
        return known

    def form(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Form:
        """The messages as the template takes them.

        Args:
            messages: the conversation.
            tools: the tools that the model may call.
        """
        made: list[dict[str, Any]] = []
        places: list[int] = []
        if tools and not self.knows_tools:
            made.append({"role": "system", "content": _tool_prompt(tools)})
        for message in messages:
            one = self._one(message)
            if one["role"] == "system" and made and not places:  # before the tools
                one = {**one, "content": f"{one['content']}\n\n{made.pop()['content']}"}
            elif message.role == "tool" != one["role"] and places and messages[len(places) - 1].role == "tool":
                one = {**one, "content": join_contents(made.pop()["content"], "\n", one["content"])}
            made.append(one)
            places.append(len(made) - 1)
        form = Form(messages=made, places=places)
        if not self._takes_system:
            return without_system(form)
        return form if self._takes_later_system else with_first_system(form)

    def _one(self, message: Message) -> dict[str, Any]:
        role = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"
        if role == "tool" and not self._knows_results:
            content = join_contents("<tool_response>\n", _content(message), "\n</tool_response>")
            return {"role": "user", "content": content}
        made: dict[str, Any] = {"role": role, "content": _content(message)}
        if message.name:
            made["name"] = message.name
        if role == "tool" and message.call_id:
            made["tool_call_id"] = message.call_id
        if role == "assistant":
            made.update(self._answer(message))
        return made

    def _answer(self, message: Message) -> dict[str, Any]:
        if message.calls and not self.knows_calls:
            return {"content": message.raw or f"{_inline(message)}{_as_text(message.calls)}".strip()}
        made: dict[str, Any] = {}
        if message.reasoning and self._knows_reasoning:
            made["reasoning_content"] = message.reasoning
        elif message.reasoning:
            made["content"] = _inline(message) if message.calls or not message.raw else message.raw
        if message.calls:
            made["tool_calls"] = [
                {
                    **({"id": call.id} if call.id else {}),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in message.calls
            ]
        return made


class _Renderer(ChatRenderer):
    """Encodes passages that conversations have in common once."""

    segment_ids: SegmentIds

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text."""
        return self.segment_ids.encode(text).tolist()


def _marks(tokenizer: Any) -> list[str]:
    """Texts of the special tokens, the longest first. Byte tokens, which count as special in some, are none."""
    ids = sorted(special_ids(tokenizer))
    tokens = [str(token).strip() for token in tokenizer.convert_ids_to_tokens(ids)]
    texts = [str(tokenizer.decode([token], skip_special_tokens=False)).strip() for token in ids]
    marks = [token for token, text in zip(tokens, texts, strict=True) if token == text and len(token) > 1]
    return sorted(marks, key=len, reverse=True)


def _content(message: Message) -> str | list[dict[str, Any]]:
    """The content as templates take it: images are parts without their URL."""
    return message.parts(lambda _image: {"type": "image"})


def _inline(message: Message) -> str:
    thinking = f"<think>\n{message.reasoning}\n</think>\n\n" if message.reasoning else ""
    return thinking + message.content


def _as_text(calls: Sequence[Call]) -> str:
    written = ({"name": call.name, "arguments": call.arguments} for call in calls)
    return "".join(f"\n<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in written)


def _tool_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    return _TOOL_PROMPT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def _renders(renderer: ChatRenderer, messages: Sequence[Mapping[str, Any]]) -> bool:
    try:
        renderer.render(messages, add_generation_prompt=True)
    except ConfigError:
        return False
    return True


def _calls(count: int) -> list[dict[str, Any]]:
    """A conversation with a message of so many calls, and their results."""
    ids = [f"probe000{index}" for index in range(count)]
    function = {"name": "f", "arguments": {}}
    calls = [{"id": each, "type": "function", "function": function} for each in ids]
    results = [{"role": "tool", "tool_call_id": each, "content": "?"} for each in ids]
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
