"""A client's messages in one form, so that they can be compared with what the session produced.

Clients differ in how they write the same message: a content as a string, as parts or ``null``, arguments as JSON with
other spaces or another order of keys, missing ids, fields of their own, thinking left out or put into the content.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchrl_sglang.agents.conversation.same_calls import SameCalls, call_key
from torchrl_sglang.chat.quoted_text import THINKING, Thinking
from torchrl_sglang.chat.response import ToolCall
from torchrl_sglang.chat.tool_json import plain
from torchrl_sglang.errors import ConfigError

__all__ = ["Call", "Image", "Message", "read_messages", "results_with_ids", "same_answer", "split_thinking"]

_PLAIN_FIELDS, _PLAIN_ROLES = {"role", "content", "tool_call_id"}, {"system", "developer", "user", "assistant", "tool"}
_ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_LEFT_OUT_PARTS = ("thinking", "redacted_thinking", "reasoning", "tool_use", "tool_call", "function_call")
"""What some clients write into an assistant's content besides its text; calls are in ``tool_calls``, too."""
_IMAGE_PARTS = ("image_url", "image", "input_image")
_OTHER_MEDIA_PARTS = ("input_audio", "audio", "video", "video_url", "file")
_PLAINLY = SameCalls()
_IMAGE_ROLES = ("user", "tool", "function")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A tool call.

    Attributes:
        name: the tool's name.
        arguments: the arguments by name; the text as it came where it is no JSON object.
        id: names the call in the conversation; empty if the client dropped it.
    """

    name: str
    arguments: Mapping[str, Any] | str
    id: str = ""
    _key: tuple[str, str] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, call: ToolCall) -> Call:
        """A call that was found in an answer."""
        return cls(name=call.name, arguments=plain(dict(call.arguments)), id=call.id)

    @property
    def key(self) -> tuple[str, str]:
        """Equal for calls that are the same, whatever their ids and the spelling of their arguments."""
        if self._key is None:  # a recorded call is compared in each later turn
            object.__setattr__(self, "_key", call_key(self.name, self.arguments))
        assert self._key is not None
        return self._key


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image in a message.

    Attributes:
        url: ``http(s)://``, which the server fetches, or ``data:image/...;base64,...``.
        at: number of characters of the message's text before it.
    """

    url: str
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message.

    Attributes:
        role: ``system``, ``developer``, ``user``, ``assistant`` or ``tool``.
        content: its text; parts of a content are joined.
        images: its images, in their order.
        calls: the assistant's tool calls.
        reasoning: the assistant's thinking; ``None`` if the client did not send any.
        call_id: of a tool's result, the id of its call.
        name: the name of whoever speaks.
        raw: of an answer that was sampled here, all its text, with thinking and calls as they were written.
    """

    role: str
    content: str
    calls: tuple[Call, ...] = ()
    reasoning: str | None = None
    call_id: str = ""
    name: str = ""
    raw: str = ""
    images: tuple[Image, ...] = ()

    def parts(self, of_image: Callable[[Image], dict[str, Any]]) -> str | list[dict[str, Any]]:
        """The content: its text, or a list of parts if there are images."""
        if not self.images:
            return self.content
        made: list[dict[str, Any]] = []
        start = 0
        for image in (*self.images, None):
            end = len(self.content) if image is None else image.at
            if end > start:
                made.append({"type": "text", "text": self.content[start:end]})
            if image is not None:
                made.append(of_image(image))
            start = end
        return made

    def as_openai(self) -> dict[str, Any]:
        """The message in OpenAI's form."""
        content = self.parts(lambda image: {"type": "image_url", "image_url": {"url": image.url}})
        made: dict[str, Any] = {"role": self.role, "content": content}
        if self.name:
            made["name"] = self.name
        if self.reasoning:
            made["reasoning_content"] = self.reasoning
        if self.calls:
            made["content"] = self.content or None
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.arguments
                        if isinstance(call.arguments, str)
                        else json.dumps(call.arguments, ensure_ascii=False),
                    },
                }
                for call in self.calls
            ]
        if self.role == "tool" and self.call_id:
            made["tool_call_id"] = self.call_id
        return made


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Read the messages of a request.

    A tool's result without an id gets that of the call that it answers, in the order of the calls.

    Raises:
        ConfigError: a message in another form; says which.

    Examples:
        >>> call = {"id": "c1", "function": {"name": "add", "arguments": '{"b": 2,  "a": 1}'}}
        >>> talk = read_messages([
        ...     {"role": "assistant", "content": None, "tool_calls": [call]},
        ...     {"role": "tool", "content": [{"type": "text", "text": "3"}]},
        ... ])
        >>> talk[0].calls[0].key, talk[1].content, talk[1].call_id
        (('add', '{"a": 1, "b": 2}'), '3', 'c1')
    """
    if not messages:
        raise ConfigError("messages is empty: give at least one message")
    read = [_read_message(index, message) for index, message in enumerate(messages)]
    return list(_with_call_ids(read))


def _read_message(index: int, message: Any) -> Message:
    if type(message) is dict and message.keys() <= _PLAIN_FIELDS and message.get("role") in _PLAIN_ROLES:
        role, content, call_id = message["role"], message.get("content"), message.get("tool_call_id")
        if isinstance(content, str) and (call_id is None or isinstance(call_id, str)):
            return Message(role=role, content=content, call_id=call_id or "" if role == "tool" else "")
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ConfigError(f"{where} must be an object with 'role' and 'content', got {message!r:.100}")
    role = message["role"]
    if role not in _ROLES:
        raise ConfigError(f"{where} has the role {role!r}; known roles are {', '.join(sorted(_ROLES))}")
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, (list, tuple)):
        raise ConfigError(f"{where}.tool_calls must be a list, got {type(calls).__name__}")
    if calls and role != "assistant":
        raise ConfigError(f"{where} has tool_calls, but the role {role!r}: only the assistant calls tools")
    content, images = _content(where, role, message.get("content"), bool(calls))
    reasoning = message.get("reasoning_content")
    reasoning = message.get("reasoning") if reasoning is None else reasoning
    name = message.get("name")
    return Message(
        role="tool" if role == "function" else role,
        content=content,
        images=images,
        calls=tuple(_read_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)),
        reasoning=reasoning if isinstance(reasoning, str) and role == "assistant" else None,
        call_id=str(message.get("tool_call_id") or "") if role == "tool" else "",
        name=name if isinstance(name, str) else "",
    )


def _content(where: str, role: str, content: Any, has_calls: bool) -> tuple[str, tuple[Image, ...]]:
    """The text of a content, and its images."""
    if isinstance(content, str):
        return content, ()
    if content is None:
        if role in ("assistant", "tool", "function") or has_calls:
            return "", ()
        raise ConfigError(f"{where} has no content: a message of the role {role!r} needs a string or a list of parts")
    if not isinstance(content, (list, tuple)):
        raise ConfigError(f"{where}.content must be a string or a list of parts, got {type(content).__name__}")
    if role == "assistant":
        content = [p for p in content if not (isinstance(p, Mapping) and p.get("type") in _LEFT_OUT_PARTS)]
    text = ""
    images: list[Image] = []
    for index, part in enumerate(content):
        place = f"{where}.content[{index}]"
        if isinstance(part, Mapping) and part.get("type") in _IMAGE_PARTS:
            if role not in _IMAGE_ROLES:
                raise ConfigError(
                    f"{place} is an image in a message of the role {role!r}: only users and tools send them"
                )
            images.append(Image(url=_image_url(place, part), at=len(text)))
        else:
            text += _part(place, part)
    return text, tuple(images)


def _image_url(where: str, part: Mapping[str, Any]) -> str:
    for name in (part["type"], "image_url", "image", "url"):
        value = part.get(name)
        value = value.get("url") if isinstance(value, Mapping) else value
        if isinstance(value, str) and value:
            return value
    raise ConfigError(f"{where} is an image without a URL: send {{'type': 'image_url', 'image_url': {{'url': ...}}}}")


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _OTHER_MEDIA_PARTS:
        raise ConfigError(f"{where} is of type {kind!r}: the gateway takes text and images alone")
    text = part.get(_TEXT_PARTS[kind]) if isinstance(part, Mapping) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise ConfigError(f"{where} must be a part {{'type': 'text', 'text': ...}}, got {part!r:.100}")
    return text


def _read_call(where: str, call: Any) -> Call:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(f"{where} must be {{'function': {{'name': ..., 'arguments': ...}}}}, got {call!r:.100}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            read = json.loads(arguments, strict=False)
        except ValueError:
            read = arguments
        arguments = read if isinstance(read, Mapping) else arguments
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, (str, Mapping)):
        raise ConfigError(f"{where}.function.arguments must be JSON text, got {type(arguments).__name__}")
    call_id = call.get("id")
    return Call(name=function["name"], arguments=arguments, id=call_id if isinstance(call_id, str) else "")


def _with_call_ids(messages: Sequence[Message]) -> Iterator[Message]:
    waiting: list[str] = []
    for message in messages:
        if message.calls:
            waiting = [call.id for call in message.calls]
        elif message.role == "tool" and waiting:
            if message.call_id in waiting:
                waiting.remove(message.call_id)
            elif not message.call_id:
                message = replace(message, call_id=waiting.pop(0))
        yield message


def results_with_ids(answer: Message, following: Sequence[Message]) -> tuple[Message, ...]:
    """The messages behind an answer; results without an id, as that of a call that came back without, have its id.

    Examples:
        >>> answer = Message(role="assistant", content="", calls=(Call(name="now", arguments={}, id="c1"),))
        >>> results_with_ids(answer, [Message(role="tool", content="12:00")])[0].call_id
        'c1'
    """
    return tuple(_with_call_ids([answer, *following]))[1:]


def split_thinking(text: str, *, opened: Thinking | None = None) -> tuple[str, str, str]:
    r"""Divide an answer into its thinking and the rest.

    Args:
        text: the answer.
        opened: the tags of the thinking that the prompt has opened, so that the answer begins inside it; no others
            count then.

    Returns:
        The thinking without its tags, what follows it, and the thinking as it was written, with its tags.

    Examples:
        >>> split_thinking("<think>\nHm.\n</think>\n\nYes.")
        ('Hm.', 'Yes.', '<think>\nHm.\n</think>\n\n')
        >>> split_thinking("Hm.</think>Yes.", opened=("<think>", "</think>"))
        ('Hm.', 'Yes.', 'Hm.</think>')
        >>> split_thinking("Yes.")
        ('', 'Yes.', '')
    """
    begin = len(text) - len(text.lstrip())
    for opening, closing in THINKING if opened is None else (opened,):
        if text.startswith(opening, begin):
            start = begin + len(opening)
        elif opened is not None and closing in text:
            start = begin
        else:
            continue
        end = text.find(closing, start)
        if end < 0:
            return text[start:].strip(), "", text
        rest = text[end + len(closing) :].lstrip()
        return text[start:end].strip(), rest, text[: len(text) - len(rest)]
    return ("", text, "") if opened is None else (text.strip(), "", text)


def same_answer(client: Message, recorded: Message, calls: SameCalls = _PLAINLY) -> bool:
    """Whether a client's message is the answer that it got.

    White space at the ends of the content and of its lines doesn't count, nor do ids, nor thinking that the client left
    out, nor how Unicode composes characters, nor arguments that have their defaults. Thinking may also be in the
    content. Thinking that was changed makes another message of it. Some clients keep calls without the text
    before them: the calls' ids say whose they are.

    Args:
        client: the client's message.
        recorded: the answer.
        calls: how calls are compared.

    Examples:
        >>> ours = Message(role="assistant", content="Yes.", reasoning="Hm.")
        >>> same_answer(Message(role="assistant", content="Yes. "), ours)
        True
        >>> same_answer(Message(role="assistant", content="<think>Hm.</think>Yes."), ours)
        True
        >>> same_answer(Message(role="assistant", content="Yes.", reasoning="No."), ours)
        False
    """
    if client.role != "assistant" or len(client.calls) != len(recorded.calls):
        return False
    if not all(calls.same(*pair) for pair in zip(client.calls, recorded.calls, strict=True)):
        return False
    content, reasoning = client.content, client.reasoning or ""
    if not content and client.calls and [call.id for call in client.calls] == [call.id for call in recorded.calls]:
        content = recorded.content
    if not _same_text(content, recorded.content):
        inside, content, _ = split_thinking(client.content)
        reasoning = reasoning or inside
        if not _same_text(content, recorded.content):
            return False
    return not reasoning.strip() or _same_text(reasoning, recorded.reasoning or "")


def _same_text(one: str, other: str) -> bool:
    one, other = one.strip(), other.strip()
    return one == other or _normal(one) == _normal(other)


def _normal(text: str) -> str:
    """A text without what clients change when they store it: ends of lines, and composed characters."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return unicodedata.normalize("NFC", "\n".join(line.rstrip() for line in lines)).strip()
