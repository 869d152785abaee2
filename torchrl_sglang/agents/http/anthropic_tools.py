"""The tools of Anthropic's API as functions, which a model calls.

Besides tools with a schema the API has some that the client runs as Anthropic has defined them: a shell, an editor of
files, and a memory. Anthropic's models know them; here the model is told a function for each, whose calls are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torchrl_sglang.agents.http.api_errors import bad_request
from torchrl_sglang.agents.http.fields import Fields

__all__ = ["read_tool", "read_tool_choice_of_messages"]

_TEXT = {"type": "string"}
_WHOLE = {"type": "integer"}
_RANGE = {"type": "array", "items": _WHOLE, "description": "First and last line; -1 is the end."}
_FILES = {
    "path": _TEXT,
    "view_range": _RANGE,
    "file_text": _TEXT,
    "old_str": _TEXT,
    "new_str": _TEXT,
    "insert_line": _WHOLE,
    "insert_text": _TEXT,
}


def _commands(*commands: str, **properties: Any) -> dict[str, Any]:
    command = {"type": "string", "enum": list(commands)}
    return {"type": "object", "properties": {"command": command, **properties}, "required": ["command"]}


# The beginning of a type, which ends in a date: what the model is told.
_DEFINED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bash": (
        "Runs a command in a shell that stays open, and returns its output.",
        {"type": "object", "properties": {"command": _TEXT, "restart": {"type": "boolean"}}},
    ),
    "text_editor": (
        "Views, creates and changes files.",
        _commands("view", "create", "str_replace", "insert", **_FILES),
    ),
    "memory": (
        "Views, creates and changes files in /memories, which stay for later conversations.",
        _commands(
            *("view", "create", "str_replace", "insert", "delete", "rename"),
            **_FILES,
            old_path=_TEXT,
            new_path=_TEXT,
        ),
    ),
}
_DATED = re.compile(r"(\w+)_\d{8}")
_WITH_INSERTED_NEW_STR = re.compile(r"text_editor_202(41022|50124|50429)")
"""Versions of the editor in which the text to insert is called ``new_str``."""


def read_tool(fields: Fields) -> dict[str, Any]:
    """A tool in the chat's form.

    Raises:
        ApiError: a tool without a schema, or one that Anthropic's servers run.

    Examples:
        >>> read_tool(Fields({"type": "bash_20250124", "name": "bash"}))["function"]["parameters"]["properties"]
        {'command': {'type': 'string'}, 'restart': {'type': 'boolean'}}
    """
    kind = fields.text("type")
    name = fields.required_text("name")
    if kind in (None, "custom"):
        function = {"name": name, "parameters": fields.object("input_schema", required=True)}
        description = fields.text("description")
        return {"type": "function", "function": function | ({"description": description} if description else {})}
    dated = _DATED.fullmatch(str(kind))
    if dated is None or dated[1] not in _DEFINED:
        raise bad_request(
            f"{fields.path('type')}={kind!r}: Anthropic's own tools don't exist here, but for bash, text_editor and "
            "memory; give tools with an input_schema",
            fields.path("type"),
            "unsupported_parameter",
        )
    description, parameters = _DEFINED[dated[1]]
    if _WITH_INSERTED_NEW_STR.fullmatch(str(kind)):
        properties = {n: schema for n, schema in parameters["properties"].items() if n != "insert_text"}
        parameters = {**parameters, "properties": properties}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def read_tool_choice_of_messages(choice: Mapping[str, Any] | None) -> tuple[Any, bool | None]:
    """The choice of a tool in the chat's form, and whether several calls are allowed."""
    if choice is None:
        return "auto", None
    fields = Fields(choice, "tool_choice")
    kind = fields.text("type", choices=("auto", "any", "tool", "none"), required=True)
    parallel = False if fields.flag("disable_parallel_tool_use") else None
    if kind == "tool":
        return {"type": "function", "function": {"name": fields.required_text("name")}}, parallel
    return {"auto": "auto", "any": "required", "none": "none"}[str(kind)], parallel
