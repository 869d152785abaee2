"""TorchRL's ``History`` as the messages that chat templates read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl.data.llm import History

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.message_forms import name_tool_results

__all__ = ["history_messages", "named_template", "refuse_media"]

# TorchRL's bookkeeping, which no template reads: a template that prints or counts a message's fields would see it.
_NOT_FOR_TEMPLATES = ("is_complete",)
_FILLER_ROLE = "<none>"  # TorchRL fills up conversations of one batch with it


def history_messages(conversation: History) -> list[dict[str, Any]]:
    """The messages of one conversation of shape ``(messages,)``.

    Fields without a value are left out, since templates ask whether a message *has* ``tool_calls``. Tool calls, tool
    responses and parts of a content are kept. A ``History`` has no place for a result's ``tool_call_id``: it is that of
    the call, if that has an id.

    Examples:
        >>> history_messages(History.from_chats([{"role": "user", "content": "Hi"}]))
        [{'role': 'user', 'content': 'Hi'}]
    """
    messages = []
    # tolist_first: without it, the fields of several messages are merged
    for entry in conversation.view(-1).tolist(tolist_first=True):
        if entry["role"] == _FILLER_ROLE:
            continue
        message: dict[str, Any] = {"role": entry["role"], "content": _plain(entry.get("content"))}
        if isinstance(message["content"], dict):
            message["content"] = [message["content"]]
        for name, value in entry.items():
            plain = _plain(value)
            if name not in message and name not in _NOT_FOR_TEMPLATES and plain is not None and plain != []:
                message[name] = plain
        messages.append(message)
    return name_tool_results(messages)


def refuse_media(messages: Sequence[Mapping[str, Any]]) -> None:
    """Require that all parts of the messages are text: for an image a template writes a placeholder, and none is sent.

    Raises:
        ConfigError: a message holds an image, a video or a sound.

    Examples:
        >>> refuse_media([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    """
    for number, message in enumerate(messages):
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            kind = str(part.get("type", "text")) if isinstance(part, Mapping) else "text"
            if kind != "text":
                raise ConfigError(
                    f"message {number} holds a part of type {kind!r}, and SGLangWrapper sends token ids alone. "
                    "SGLangChat takes images, videos and sounds; rollouts with them are made with "
                    "servers.pool.generate(ids, sampling, media=...)"
                )


def _plain(value: Any) -> Any:
    """Lists and dictionaries of Python's own types: tensordict's kinds of lists don't pass a template's tests."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


class _TemplateCatcher:
    """Stands in for a tokenizer, to get a template of TorchRL's by its name."""

    def __init__(self) -> None:
        self.template = ""

    def apply_chat_template(self, *, chat_template: str, **_: Any) -> str:
        self.template = chat_template
        return ""


def named_template(name: str, tokenizer: Any) -> str:
    """A chat template by its name: one of the tokenizer's own, else one of TorchRL's.

    Raises:
        ConfigError: nobody has a template of this name.

    Examples:
        >>> "im_start" in named_template("chatml_format", None)
        True
    """
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping) and name in own:
        return str(own[name])
    catcher = _TemplateCatcher()
    try:
        History.from_chats([{"role": "user", "content": ""}]).apply_chat_template(
            tokenizer=catcher, chat_template_name=name
        )
    except KeyError:
        theirs = f"; the tokenizer's are {sorted(own)}" if isinstance(own, Mapping) else ""
        raise ConfigError(
            f"chat_template_name={name!r} is no template of TorchRL's (such as 'chatml_format' or 'qwen'){theirs}. "
            "Leave it out to use the tokenizer's own template"
        ) from None
    return catcher.template
