"""Tools for a model: schemas on the way in, calls found in what it wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchrl_sglang.chat.response import ToolCall
from torchrl_sglang.errors import ConfigError

__all__ = ["find_tool_calls", "read_tools"]


def read_tools(tools: str | Sequence[Mapping[str, Any] | Callable[..., Any]]) -> list[dict[str, Any]]:
    """Tools as JSON schemas in OpenAI's form.

    Args:
        tools: schemas (with or without the outer ``{"type": "function", "function": ...}``), Python functions with type
            hints and a Google-style docstring, or the JSON of a list of schemas.

    Raises:
        ConfigError: a tool in another form.

    Examples:
        >>> read_tools('[{"name": "now", "parameters": {}}]')
        [{'type': 'function', 'function': {'name': 'now', 'parameters': {}}}]
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ConfigError(f"tools is a string, but not the JSON of a list of tools: {error}") from error
    if isinstance(tools, Mapping) or not isinstance(tools, Sequence):
        raise ConfigError(f"tools must be a list, got {type(tools).__name__}")
    return [_schema(tool) for tool in tools]


def _schema(tool: Any) -> dict[str, Any]:
    if callable(tool):
        from transformers.utils.chat_template_utils import (
            DocstringParsingException,
            TypeHintParsingException,
            get_json_schema,
        )

        try:
            return dict(get_json_schema(tool))
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise ConfigError(f"the tool {tool.__name__!r} can't be described to the model: {error}") from error
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(f"a tool is a function or a JSON schema with a 'name', got {tool!r:.100}")
    return {"type": "function", "function": dict(function)}


def find_tool_calls(text: str, names: Sequence[str]) -> tuple[str, tuple[ToolCall, ...]]:
    """Find the calls in a response, written in one of the common ways.

    Known are ``<tool_call>{...}</tool_call>`` (Hermes, Qwen), ``<function=name>`` with a JSON object or with
    ``<parameter=key>`` tags in it (Llama 3, Qwen3-Coder), ``[TOOL_CALLS]`` (Mistral), and a bare JSON object or list,
    after ``<|python_tag|>`` or as the whole response (Llama 3). What can't be read stays in the text.

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
    for pattern, read in _WAYS:
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
    """Calls from a JSON object or a list of them; empty when it is none."""
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
    """Tags carry no types: what reads as JSON is taken as that, all else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text.removeprefix("\n").removesuffix("\n")


_PARAMETER = re.compile(r"<parameter=(?P<key>[^>]+)>(?P<value>.*?)</parameter>", re.DOTALL)
_WAYS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], list[ToolCall]]], ...] = (
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
