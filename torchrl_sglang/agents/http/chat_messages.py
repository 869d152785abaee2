"""Checks the messages and tools of a request in OpenAI's chat form; they are handed on as they were sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang.agents.http.api_errors import bad_request
from torchrl_sglang.agents.http.fields import Fields

__all__ = ["check_messages", "check_tools", "read_tool_choice"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_PARTS = ("text", "image_url", "input_audio", "refusal", "input_text", "output_text")
_TEXT_PARTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}
"""The last two are of the Responses API; the texts' fields."""


def check_messages(messages: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """The messages of a conversation, each checked in shape.

    Args:
        messages: as the client sent them.

    Raises:
        ApiError: a message that no chat template could take; ``param`` names it.
    """
    if not messages:
        raise bad_request("messages is empty: give at least one message", "messages")
    checked, waiting = [], 0
    for index, message in enumerate(messages):
        one = _message(message, f"messages[{index}]", waiting)
        waiting = len(one.get("tool_calls") or ()) or waiting - (one["role"] == "tool")
        checked.append(one)
    return tuple(checked)


def _message(message: Any, where: str, waiting: int) -> dict[str, Any]:
    """A message; ``waiting`` calls before it have no result yet, so that a result without an id has a call."""
    if _is_plain(message):  # most messages of a long conversation, all of which come with each turn
        return dict(message)
    fields = Fields(message, where)
    role = fields.text("role", choices=_ROLES, required=True)
    checked = dict(message)
    fields.refuse(
        "prefix", "an answer begins anew; say in a user's message how it is to begin", neutral=(False,)
    )  # Mistral's and DeepSeek's form
    calls = fields.list("tool_calls") or []
    if calls and role != "assistant":
        raise bad_request(f"{where} has tool_calls, which only assistant messages have", f"{where}.tool_calls")
    for index, call in enumerate(calls):
        _check_call(Fields(call, f"{where}.tool_calls[{index}]"))
    if role == "tool" and waiting <= 0:
        fields.required_text("tool_call_id")
    fields.text("tool_call_id")
    fields.text("name")
    content = fields.any("content")
    if content is None:
        if role not in ("assistant", "tool"):
            raise bad_request(f"{where}.content is missing", f"{where}.content", "missing_required_parameter")
        if fields.text("refusal") is not None:
            checked["content"] = message["refusal"]
    elif isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, str):  # as vLLM takes it
                _check_part(part, f"{where}.content[{index}]")
        checked["content"] = [_as_text(part) for part in content]
    elif not isinstance(content, str):
        raise bad_request(
            f"{where}.content must be a string or a list of parts, got {content!r:.80}", f"{where}.content"
        )
    return checked


def _is_plain(message: Any) -> bool:
    """Whether a message has a role and a text, a tool's also the id of its call, and nothing else."""
    if type(message) is not dict or type(message.get("content")) is not str:
        return False
    role = message.get("role")
    if role == "tool":
        return len(message) == 3 and type(message.get("tool_call_id")) is str
    return len(message) == 2 and type(role) is str and role in _ROLES


def _check_call(fields: Fields) -> None:
    fields.text("id")
    kind = fields.text("type")
    if kind not in (None, "function"):
        raise bad_request(f"{fields.path('type')}={kind!r}: only calls of functions are supported", fields.path("type"))
    function = Fields(fields.object("function", required=True), fields.path("function"))
    function.required_text("name")
    if not isinstance(function.any("arguments"), Mapping):  # as some clients keep them
        function.text("arguments")


def _check_part(part: Any, where: str) -> None:
    fields = Fields(part, where)
    kind = fields.text("type", choices=_PARTS, required=True)
    if kind in _TEXT_PARTS:
        fields.required_text(_TEXT_PARTS[str(kind)])
    elif kind == "image_url":
        Fields(fields.object("image_url", required=True), fields.path("image_url")).required_text("url")
    else:
        Fields(fields.object("input_audio", required=True), fields.path("input_audio")).required_text("data")


def _as_text(part: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """A text in the one form of it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    name = _TEXT_PARTS.get(part["type"])
    return part if name is None or part["type"] == "text" else {"type": "text", "text": part[name]}


def check_tools(tools: Sequence[Any] | None) -> tuple[dict[str, Any], ...]:
    """The tools as they were sent, each checked in shape.

    Raises:
        ApiError: a tool that is no function, has no name, or a name that another one has.
    """
    checked: list[dict[str, Any]] = []
    for index, tool in enumerate(tools or ()):
        fields = Fields(tool, f"tools[{index}]")
        kind = fields.required_text("type")
        if kind != "function":
            raise bad_request(
                f"tools[{index}].type={kind!r}: only functions are supported",
                f"tools[{index}].type",
                "unsupported_parameter",
            )
        function = Fields(fields.object("function", required=True), fields.path("function"))
        name = function.required_text("name")
        if not name.strip() or json.dumps(name, ensure_ascii=False)[1:-1] != name:
            raise bad_request(
                f"tools[{index}] has the name {name!r:.80}: a name has letters, digits, '_' and '-'",
                function.path("name"),
            )
        function.text("description")
        function.object("parameters")
        function.flag("strict")
        if any(name == other["function"]["name"] for other in checked):
            raise bad_request(f"tools[{index}] has the name {name!r}, which an earlier tool has", "tools")
        checked.append(dict(tool))
    return tuple(checked)


def read_tool_choice(value: Any, names: Sequence[str]) -> str | dict[str, Any]:
    """``"auto"``, ``"none"``, ``"required"``, or one function in OpenAI's form.

    Args:
        value: the request's ``tool_choice``.
        names: of the request's tools.

    Raises:
        ApiError: another form, a name that no tool has, or a choice among some of the tools.

    Examples:
        >>> read_tool_choice(None, [])
        'auto'
        >>> read_tool_choice({"type": "function", "function": {"name": "now"}}, ["add", "now"])
        {'type': 'function', 'function': {'name': 'now'}}
    """
    if value is None:
        return "auto"
    if isinstance(value, str):
        if value not in ("auto", "none", "required"):
            raise bad_request(
                f"tool_choice must be 'auto', 'none', 'required' or an object, got {value!r:.80}", "tool_choice"
            )
        if value == "required" and not names:
            raise bad_request("tool_choice='required' needs tools", "tool_choice")
        return value
    fields = Fields(value, "tool_choice")
    if fields.text("type", choices=("function", "allowed_tools"), required=True) == "function":
        wanted = [_function_name(fields)]
    else:
        wanted = _allowed(Fields(fields.object("allowed_tools", required=True), "tool_choice.allowed_tools"))
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise bad_request(f"tool_choice names {unknown}, but the tools are {list(names)}", "tool_choice")
    if set(wanted) == set(names) and len(names) > 1:
        return "required"
    if len(wanted) > 1:
        raise bad_request(
            "tool_choice can force one tool, or any of all: list only the allowed tools in tools",
            "tool_choice",
            "unsupported_parameter",
        )
    return {"type": "function", "function": {"name": wanted[0]}}


def _allowed(allowed: Fields) -> list[str]:
    """The names in OpenAI's ``allowed_tools``, of which one must be called."""
    if allowed.text("mode", choices=("auto", "required"), required=True) == "auto":
        raise bad_request(
            "tool_choice.allowed_tools.mode='auto' can't be honoured: list only the allowed tools in tools",
            "tool_choice",
            "unsupported_parameter",
        )
    tools = allowed.list("tools", required=True) or []
    return [_function_name(Fields(each, allowed.path("tools"))) for each in tools]


def _function_name(fields: Fields) -> str:
    return Fields(fields.object("function", required=True), fields.path("function")).required_text("name")
