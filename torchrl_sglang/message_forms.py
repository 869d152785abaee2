"""Messages in the forms that chat templates take."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

__all__ = ["REFUSALS", "as_parts", "drops_texts", "message_forms", "name_tool_results"]

Message = Mapping[str, Any]

REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a chat template, or the code that renders it, raises for a conversation that it does not take."""
_PROBE = "7f3b text"
_SHORT_ID = re.compile("[a-zA-Z0-9]{9}")
_RESULT_ROLES = ("tool", "ipython")


def drops_texts(render: Callable[[list[dict[str, Any]]], Any]) -> bool:
    """Whether a template reads contents that are lists of parts alone: it drops texts, as SmolVLM's does.

    Args:
        render: renders messages.
    """
    texts = []
    for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
        try:
            texts.append(str(render([{"role": "user", "content": content}])))
        except REFUSALS:
            return False
    return _PROBE not in texts[0] and _PROBE in texts[1]


def as_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with every content that is a text as a list of one part.

    Examples:
        >>> as_parts([{"role": "user", "content": "Hi"}])
        [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}]
    """
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]


def message_forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The messages as they are; then, for templates that refuse these, with what they lack.

    Missing ids of tool calls are nine letters and digits, as Mistral's templates want them, and the tools' results get
    the ids of the calls in their order. Then a content of ``None`` becomes an empty text. Then all ids become nine
    letters and digits.

    Examples:
        >>> call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        >>> talk = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "5"}]
        >>> [message["tool_call_id"] for message in list(message_forms(talk))[1][1:]]
        ['call00000']
    """
    form = [dict(message) for message in messages]
    yield form
    named = name_tool_results(form, make_ids=True)
    if named != form:
        yield named
    filled = [{**m, "content": ""} if m.get("content") is None else m for m in named]
    if filled != named:
        yield filled
    short = _with_short_ids(filled)
    if short != filled:
        yield short


def _with_short_ids(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with ids of nine letters and digits, equal for equal ids."""
    made = []
    for given in messages:
        message = dict(given)
        if isinstance(message.get("tool_call_id"), str):
            message["tool_call_id"] = _short_id(message["tool_call_id"])
        if isinstance(calls := message.get("tool_calls"), list) and all(isinstance(call, Mapping) for call in calls):
            message["tool_calls"] = [
                {**call, "id": _short_id(call["id"])} if isinstance(call.get("id"), str) else call for call in calls
            ]
        made.append(message)
    return made


def _short_id(call_id: str) -> str:
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="surrogatepass")).hexdigest()[:9]


def name_tool_results(messages: Sequence[Message], *, make_ids: bool = False) -> list[dict[str, Any]]:
    """The messages with the ids of the calls in the tools' results, in the order of the calls.

    Args:
        messages: the conversation.
        make_ids: also give ids to calls that have none.

    Examples:
        >>> talk = [{"role": "assistant", "tool_calls": [{"id": "x"}]}, {"role": "tool", "content": "5"}]
        >>> name_tool_results(talk)[1]
        {'role': 'tool', 'content': '5', 'tool_call_id': 'x'}
    """
    count, named = 0, []
    waiting: list[Any] = []
    for given in messages:
        message = dict(given)
        calls = message.get("tool_calls")
        if isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls):
            if make_ids:
                calls = [
                    call if call.get("id") else {**call, "id": f"call{count + i:05d}"} for i, call in enumerate(calls)
                ]
                message["tool_calls"] = calls
            count += len(calls)
            waiting = [call.get("id") for call in calls]
        elif message.get("role") in _RESULT_ROLES and waiting:
            known = message.get("tool_call_id")
            if known in waiting:
                waiting.remove(known)
            elif not known:
                expected = waiting.pop(0)
                if expected:
                    message["tool_call_id"] = expected
        named.append(message)
    return named
