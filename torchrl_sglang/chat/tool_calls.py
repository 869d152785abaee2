"""Tool calls, found in the text that a model wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchrl_sglang.chat.response import ToolCall

__all__ = ["find_tool_calls"]


def find_tool_calls(text: str, names: Sequence[str]) -> tuple[str, tuple[ToolCall, ...]]:
    """Find the calls in a response, written in one of the common formats.

    The formats are ``<tool_call>{...}</tool_call>`` (Hermes, Qwen), ``<function=name>`` with a JSON object or with
    ``<parameter=key>`` tags in it (Llama 3, Qwen3-Coder), ``[TOOL_CALLS]`` (Mistral), and a bare JSON object or list,
    after ``<|python_tag|>`` or as the whole response (Llama 3). A call that can't be parsed stays in the text.

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
    for pattern, read in _FORMATS:
        calls: list[ToolCall] = []
        content = pattern.sub(lambda match, read=read, calls=calls: _take(read(match), match, calls), text)  # type: ignore[misc]
        if calls:
            return content.strip(), tuple(calls)
    bare = _read_json(text.strip().removeprefix("<|python_tag|>"), "parameters")
    if bare and all(call.name in names for call in bare):
        return "", tuple(bare)
    return text, ()


def _take(found: list[ToolCall], match: re.Match[str], calls: list[ToolCall]) -> str:
    calls.extend(found)
    return "" if found else match[0]


def _read_json(text: str, *argument_keys: str) -> list[ToolCall]:
    """Calls from a JSON object or a list of them; empty when the text is neither."""
    try:
        value = json.loads(text)
    except ValueError:
        return []
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
            return []
        arguments: Any = next((item[key] for key in ("arguments", *argument_keys) if key in item), {})
        if not isinstance(arguments, Mapping):
            return []
        calls.append(ToolCall(name=item["name"], arguments=dict(arguments)))
    return calls


def _read_block(match: re.Match[str]) -> list[ToolCall]:
    return _read_json(match["body"], "parameters")


def _read_function(match: re.Match[str]) -> list[ToolCall]:
    body = match["body"].strip()
    if not body or _PARAMETER.search(body):
        return [
            ToolCall(name=match["name"], arguments={m["key"]: _value(m["value"]) for m in _PARAMETER.finditer(body)})
        ]
    try:
        arguments = json.loads(body)
    except ValueError:
        return []
    return [ToolCall(name=match["name"], arguments=arguments)] if isinstance(arguments, dict) else []


def _value(text: str) -> Any:
    """Tags carry no types: a value that parses as JSON is that JSON value, any other is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text.removeprefix("\n").removesuffix("\n")


_PARAMETER = re.compile(r"<parameter=(?P<key>[^>]+)>(?P<value>.*?)</parameter>", re.DOTALL)
_FORMATS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], list[ToolCall]]], ...] = (
    (
        re.compile(
            r"(?:<tool_call>\s*)?<function=(?P<name>[^>]+)>(?P<body>.*?)</function>(?:\s*</tool_call>)?", re.DOTALL
        ),
        _read_function,
    ),
    (re.compile(r"<tool_call>\s*(?P<body>.*?)\s*</tool_call>", re.DOTALL), _read_block),
    (re.compile(r"\[TOOL_CALLS\]\s*(?P<body>\[.*\])", re.DOTALL), _read_block),
    (
        re.compile(
            r"\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)(?:\[ARGS\])?\s*(?P<body>\{.*?\})(?=\s*(?:\[TOOL_CALLS\]|</s>|$))",
            re.DOTALL,
        ),
        _read_function,
    ),
)
