"""``Conversation``: messages in one form, with the media that they mention in order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrl_sglang.chat.data_urls import media_url
from torchrl_sglang.chat.media_files import MediaKind
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.protocol.media import Media

__all__ = ["Conversation", "read_conversation"]

_KINDS: tuple[MediaKind, ...] = ("image", "video", "audio")
_PLACEHOLDER = re.compile(r"<(image|video|audio)>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages in the form that chat templates read, and their media.

    Attributes:
        messages: ``role`` and ``content``; the content is a string, or, where media are mentioned, a list of parts
            ``{"type": "text", "text": ...}``, ``{"type": "image"}``, ``{"type": "video"}``, ``{"type": "audio"}``.
        media: the media in the order in which the messages mention them.
    """

    messages: list[dict[str, Any]]
    media: Media

    def without(self, kind: str) -> list[dict[str, Any]]:
        """The messages without the mentions of one kind of media."""
        return [
            {**message, "content": [part for part in message["content"] if part["type"] != kind]}
            if isinstance(message["content"], list)
            else message
            for message in self.messages
        ]


def read_conversation(
    messages: str | Sequence[Mapping[str, Any]],
    *,
    system: str | None = None,
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
    audios: Sequence[Any] | None = None,
    media_roots: Sequence[Path] = (),
) -> Conversation:
    """Read messages in any of the usual forms.

    A message mentions media by a part that holds the item (``{"type": "image", "image": item}``, or OpenAI's
    ``{"type": "image_url", "image_url": {"url": ...}}``), by a bare part ``{"type": "image"}``, or by ``<image>`` in a
    string. Bare mentions take the items of ``images`` in order, and their number must be the same. Where no message
    has a bare mention, ``images`` come before the words of the last user message. Videos and audios likewise.

    Args:
        messages: the conversation, or one user message's text.
        system: a system message, put first.
        images: the images that bare mentions refer to, in order (see :func:`~torchrl_sglang.chat.data_urls.media_url`).
        videos: likewise.
        audios: likewise.
        media_roots: folders, resolved, whose files the parts of messages may name; the items of ``images``, ``videos``
            and ``audios`` may be any files.

    Raises:
        ConfigError: no messages, one in an unknown form, two system messages, or mentions and media that don't match.

    Examples:
        >>> talk = read_conversation("<image>What is it?", images=["http://host/a.png"])
        >>> talk.messages[0]["content"]
        [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]
        >>> talk.media.images
        ('http://host/a.png',)
    """
    given_messages: list[Mapping[str, Any]] = (
        [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]
    )
    if not given_messages:
        raise ConfigError("messages is empty; give at least one user message")
    given: dict[str, list[Any]] = {
        kind: _as_list(kind, items) for kind, items in zip(_KINDS, (images, videos, audios), strict=True)
    }
    read = [_read_message(index, message, given) for index, message in enumerate(given_messages)]
    if system is not None:
        if read[0]["role"] == "system":
            raise ConfigError("a system message is given twice: as system= and as the first message")
        read.insert(0, {"role": "system", "content": system})
    for kind in reversed(_KINDS):
        if given[kind] and not any(part["type"] == kind and "item" not in part for part in _parts(read)):
            _put_first(read, [{"type": kind} for _ in given[kind]], kind)
    urls: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    remaining = {kind: iter(items) for kind, items in given.items()}
    for kind in _KINDS:
        bare = sum(part["type"] == kind and "item" not in part for part in _parts(read))
        if bare != len(given[kind]):
            raise ConfigError(
                f"the messages mention {bare} {kind}(s) without the item, but {kind}s= has {len(given[kind])}"
            )
    for part in _parts(read):
        if part["type"] != "text":
            roots = media_roots if "item" in part else None
            item = part.pop("item") if "item" in part else next(remaining[part["type"]])
            urls[part["type"]].append(media_url(item, part["type"], roots=roots))
    media = Media(images=tuple(urls["image"]), videos=tuple(urls["video"]), audios=tuple(urls["audio"]))
    return Conversation(messages=[_join_text(message) for message in read], media=media)


def _as_list(kind: str, items: Any) -> list[Any]:
    if items is None:
        return []
    if isinstance(items, (str, bytes)) or not isinstance(items, (list, tuple)):
        raise ConfigError(f"{kind}s must be a list, also for one {kind}; got {type(items).__name__}")
    return list(items)


def _read_message(index: int, message: Any, given: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ConfigError(f"message {index} must be a mapping with 'role' and 'content', got {message!r:.100}")
    content = message.get("content")
    if content is None and (message.get("tool_calls") or message["role"] == "assistant"):
        content = ""
    if isinstance(content, str):
        content = list(_split_placeholders(content, given))
    elif isinstance(content, Sequence):
        content = [_read_part(index, part) for part in content]
    else:
        raise ConfigError(f"message {index} has content of type {type(content).__name__}; give a string or parts")
    read = {**message, "content": content}
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, (list, tuple)):
            raise ConfigError(f"message {index} has tool_calls of type {type(calls).__name__}; give a list of calls")
        read["tool_calls"] = [_read_tool_call(index, call) for call in calls]
    return read


def _split_placeholders(text: str, given: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Split at ``<image>``, ``<video>`` and ``<audio>``; a kind of which no media are given stays text."""
    words = ""
    for piece in re.split(r"(<(?:image|video|audio)>)", text):
        match = _PLACEHOLDER.fullmatch(piece)
        if match is None or not given[match[1]]:
            words += piece
            continue
        if words:
            yield {"type": "text", "text": words}
        words = ""
        yield {"type": match[1]}
    if words or not text:
        yield {"type": "text", "text": words}


def _read_part(index: int, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    name = part.get("type") if isinstance(part, Mapping) else None
    if name == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if name == "input_audio":  # OpenAI's form: base64, and the format in a field of its own
        sound = part.get("input_audio")
        if not isinstance(sound, Mapping) or not isinstance(sound.get("data"), str):
            raise ConfigError(f"message {index} has an input_audio part without data: {part!r:.100}")
        return {"type": "audio", "item": f"data:audio/{sound.get('format', '*')};base64,{sound['data']}"}
    kind = name.removesuffix("_url") if isinstance(name, str) else None
    if kind not in _KINDS:
        raise ConfigError(f"message {index} has a part {part!r:.100}; known types are text, image, video and audio")
    for key in (kind, f"{kind}_url", "url", "path"):
        item = part.get(key)
        if item is not None:
            return {"type": kind, "item": item["url"] if isinstance(item, Mapping) and "url" in item else item}
    return {"type": kind}


def _read_tool_call(index: int, call: Any) -> dict[str, Any]:
    """Parse the arguments: chat templates read them as an object, OpenAI's clients send them as JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(f"message {index} has a tool call that is no mapping with the function's name: {call!r:.100}")
    function = dict(function)
    if function.get("arguments") in ("", None):  # of a function that takes none
        function["arguments"] = {}
    if isinstance(function["arguments"], str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError as error:
            raise ConfigError(f"message {index} has a tool call whose arguments are not JSON: {error}") from error
    return {**{k: v for k, v in call.items() if k in ("id", "type")}, "type": "function", "function": function}


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        if isinstance(message["content"], list):
            yield from message["content"]


def _put_first(messages: list[dict[str, Any]], parts: list[dict[str, Any]], kind: str) -> None:
    for message in reversed(messages):
        if message["role"] == "user":
            message["content"] = [*parts, *message["content"]]
            return
    raise ConfigError(f"{kind}s are given, but there is no user message to add them to")


def _join_text(message: dict[str, Any]) -> dict[str, Any]:
    """Join text parts to a string, since templates of text-only models do not read parts."""
    content = message["content"]
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        return {**message, "content": "".join(part["text"] for part in content)}
    return message
