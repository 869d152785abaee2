"""``tool_choice`` and ``parallel_tool_calls`` as constraints of the sampling."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.config.grammars import GRAMMARS
from torchrl_sglang.errors import ConfigError

__all__ = ["constrain", "reads_calls"]

_TAGGED = ("qwen", "qwen25", "hermes", None)
"""Families that write ``<tool_call>``; a model of no known family is told to in the system message."""
_ANY_JSON = "$$ANY$$"
"""SGLang's word for JSON of any kind."""
_FORMS = {
    **dict.fromkeys(_TAGGED, ('<tool_call>\n{"name": "%s", "arguments": ', "}\n</tool_call>", "\n")),
    "llama3": ('{"name": "%s", "parameters": ', "}", ""),
    "mistral": ('[TOOL_CALLS] [{"name": "%s", "arguments": ', "}]", ""),
}


def reads_calls(tools: Sequence[Mapping[str, Any]], tool_choice: str | Mapping[str, Any]) -> bool:
    """Whether a response may have tool calls."""
    return bool(tools) and tool_choice != "none"


def constrain(
    sampling: SamplingParams,
    *,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str | Mapping[str, Any],
    parallel: bool,
    family: str | None,
    thinking_end: str | None = None,
) -> SamplingParams:
    """The settings under which a response makes the calls that the request wants.

    Args:
        sampling: how tokens are drawn.
        tools: the tools, in OpenAI's form.
        tool_choice: ``"auto"``, ``"none"``, ``"required"``, or one function.
        parallel: whether a response may have several calls.
        family: SGLang's name of the parser for the model's calls; ``None`` if it is not known.
        thinking_end: the tag that ends the thinking which the prompt has opened.

    Under a JSON schema (``response_format``) a response with tools to choose from is calls, or JSON of that schema.
    Where calls are forced, the schema is for a later one, as in OpenAI's API.

    Raises:
        ConfigError: the choice names no tool, or can't be forced on this model.

    Examples:
        >>> tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
        >>> params = constrain(SamplingParams(), tools=[tool], tool_choice="required", parallel=False, family="qwen25")
        >>> params.structural_tag is not None
        True
    """
    names = [tool["function"]["name"] for tool in tools]
    wanted = _wanted(tool_choice, names)
    schema = sampling.json_schema
    if wanted is None:
        may_choose = bool(tools) and tool_choice == "auto"
        if may_choose and not parallel and family in _TAGGED:
            sampling = replace(sampling, stop=(*sampling.stop, "</tool_call>"))
        if not may_choose or schema is None or schema == _ANY_JSON or family not in _FORMS:
            return sampling
        form: dict[str, Any] = {
            "type": "or",
            "elements": [
                _calls(tools, names, family, parallel=parallel),
                {"type": "json_schema", "json_schema": json.loads(str(schema))},
            ],
        }
        return _under(sampling, form, thinking_end)
    taken = [name for name in GRAMMARS if name != "json_schema" and getattr(sampling, name) is not None]
    if taken:
        raise ConfigError(f"tool_choice={tool_choice!r} and {taken[0]} both constrain the response: give one of them")
    if family not in _FORMS:
        raise ConfigError(
            f"tool_choice={tool_choice!r} can't be forced on a model that writes calls as {family!r} does: use 'auto', "
            "and say in the prompt that a tool must be called"
        )
    return _under(sampling, _calls(tools, wanted, family, parallel=parallel), thinking_end)


def _calls(
    tools: Sequence[Mapping[str, Any]], names: Sequence[str], family: str | None, *, parallel: bool
) -> dict[str, Any]:
    """The grammar of calls of these tools."""
    begin, end, separator = _FORMS[family]
    tags = [
        {
            "type": "tag",
            "begin": begin % tool["function"]["name"],
            "content": {"type": "json_schema", "json_schema": tool["function"].get("parameters") or {"type": "object"}},
            "end": end,
        }
        for tool in tools
        if tool["function"]["name"] in names
    ]
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not parallel or not separator,
    }


def _under(sampling: SamplingParams, form: Mapping[str, Any], thinking_end: str | None) -> SamplingParams:
    """The settings under a grammar, which begins behind the thinking."""
    if thinking_end is not None:
        thinking = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": f"{thinking_end}\n\n"}
        form = {"type": "sequence", "elements": [thinking, form]}
    return replace(sampling, json_schema=None, structural_tag={"type": "structural_tag", "format": form})


def _wanted(tool_choice: str | Mapping[str, Any], names: Sequence[str]) -> Sequence[str] | None:
    """The names of the tools of which one must be called; ``None`` if none must."""
    if tool_choice in ("auto", "none"):
        return None
    if tool_choice == "required":
        if not names:
            raise ConfigError("tool_choice='required' needs tools, and the request has none")
        return names
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ConfigError(
            "tool_choice must be 'auto', 'none', 'required' or {'type': 'function', 'function': {'name': ...}}, got "
            f"{tool_choice!r:.100}"
        )
    if name not in names:
        raise ConfigError(f"tool_choice names the function {name!r}, but the request's tools are {list(names)}")
    return [name]
