"""Tools that a model may call, as JSON schemas in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchrl_sglang.errors import ConfigError

__all__ = ["read_tools"]


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
