"""``ResponsesTools``: the tools of the Responses API as functions, which a model calls, and its calls as items.

Besides functions the API has tools that the client runs as OpenAI has defined them: free text (``custom``),
``local_shell``, ``shell`` and ``apply_patch``; and functions in a ``namespace``. A model is told of all of them as
functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrl_sglang.agents.http.api_errors import bad_request
from torchrl_sglang.agents.http.fields import Fields

__all__ = ["ResponsesTools", "chat_call", "chat_result", "is_call", "is_result"]

_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
_ON_OPENAIS_SERVERS = (
    "is run by OpenAI's servers, and there is nothing like it here. Switch it off in the client (in Codex's "
    'config.toml: web_search = "disabled"), or give the model a function'
)


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}


_TEXTS = {"type": "array", "items": {"type": "string"}}
_NUMBER = {"type": "integer"}
_TEXT = {"type": "string"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A tool that the API defines.

    Attributes:
        item: type of the item of a call; that of its result has ``_output`` behind it.
        description: what the model is told.
        parameters: the arguments of the function that it is told.
        holder: the field of the item that has the arguments.
        fixed: what this field has besides.
        renamed: the arguments that have other names there.
    """

    item: str
    description: str
    parameters: Mapping[str, Any]
    holder: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


_KINDS: Mapping[str, _Kind] = {
    "local_shell": _Kind(
        item="local_shell_call",
        description="Runs a command and returns its output.",
        parameters=_object("command", command=_TEXTS, workdir=_TEXT, timeout_ms=_NUMBER),
        holder="action",
        fixed={"type": "exec", "env": {}, "user": None},
        renamed={"workdir": "working_directory"},
    ),
    "shell": _Kind(
        item="shell_call",
        description="Runs shell commands and returns their output.",
        parameters=_object("commands", commands=_TEXTS, timeout_ms=_NUMBER, max_output_length=_NUMBER),
        holder="action",
    ),
    "apply_patch": _Kind(
        item="apply_patch_call",
        description="Creates, changes or deletes a file. A change is a diff in the V4A format.",
        parameters=_object(
            "type",
            type={"type": "string", "enum": ["create_file", "update_file", "delete_file"]},
            path=_TEXT,
            diff=_TEXT,
        ),
        holder="operation",
    ),
}
_OF_ITEM = {kind.item: (name, kind) for name, kind in _KINDS.items()}
_CALLS = ("function_call", "custom_tool_call", *_OF_ITEM)
_RESULTS = tuple(f"{name}_output" for name in _CALLS)
_OUTSIDE = "namespace"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tool:
    """A tool as the client named it: its type, its name, and the namespace that it is in."""

    kind: str
    name: str
    namespace: str = ""


class ResponsesTools:
    """The tools of one request.

    Args:
        tools: as the client sent them.

    Attributes:
        functions: the functions that the model is told, in the chat's form.

    Raises:
        ApiError: a tool of an unknown form, or one that OpenAI's servers run.

    Examples:
        >>> tools = ResponsesTools([{"type": "custom", "name": "patch"}])
        >>> tools.functions[0]["function"]["parameters"]["required"]
        ['input']
        >>> call = {"id": "c1", "function": {"name": "patch", "arguments": '{"input": "*** Begin"}'}}
        >>> tools.item(call, "i1", "completed")["input"]
        '*** Begin'
    """

    def __init__(self, tools: Sequence[Any] = ()) -> None:
        self.functions: list[dict[str, Any]] = []
        self._tools: dict[str, _Tool] = {}
        for index, tool in enumerate(tools):
            self._add(Fields(tool, f"tools[{index}]"))

    def _add(self, fields: Fields) -> None:
        kind = fields.required_text("type")
        if kind == _OUTSIDE:
            self._add_namespace(fields)
        elif kind == "function":
            self._tell(_Tool(kind=kind, name=fields.required_text("name")), _function(fields))
        elif kind == "custom":
            self._tell(_Tool(kind=kind, name=fields.required_text("name")), _free_text(fields))
        elif kind in _KINDS:
            known = _KINDS[kind]
            told = {"name": kind, "description": known.description, "parameters": dict(known.parameters)}
            self._tell(_Tool(kind=kind, name=kind), told)
        else:
            raise bad_request(
                f"{fields.path('type')}={kind!r} {_ON_OPENAIS_SERVERS}", fields.path("type"), "unsupported_parameter"
            )

    def _add_namespace(self, fields: Fields) -> None:
        """The functions of a namespace; its description stands before that of the first one."""
        namespace = fields.required_text("name")
        about = fields.text("description") or ""
        for index, tool in enumerate(fields.list("tools", required=True) or ()):
            inner = Fields(tool, f"{fields.path('tools')}[{index}]")
            kind = inner.text("type", choices=("function", "custom"), required=True)
            told = _function(inner) if kind == "function" else _free_text(inner)
            name = str(told["name"])
            if about:
                told["description"] = f"{about}\n\n{told.get('description') or ''}".strip()
                about = ""
            told["name"] = full_name(name, namespace)
            self._tell(_Tool(kind=str(kind), name=name, namespace=namespace), told)

    def _tell(self, tool: _Tool, function: dict[str, Any]) -> None:
        self._tools[function["name"]] = tool
        self.functions.append({"type": "function", "function": function})

    def item(self, call: Mapping[str, Any], item_id: str, status: str) -> dict[str, Any]:
        """The item of a call.

        Args:
            call: in the chat's form.
            item_id: names the item.
            status: ``in_progress`` leaves out what the events that follow bring.
        """
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        tool = self._tools.get(name, _Tool(kind="function", name=name))
        about = {"id": item_id, "call_id": call["id"], "status": status}
        if tool.kind in _KINDS:
            known = _KINDS[tool.kind]
            action = _action(known, arguments)
            if action is not None:
                return {"type": known.item, **about, known.holder: action}
        named = {"name": tool.name, **({"namespace": tool.namespace} if tool.namespace else {})}
        if tool.kind == "custom":
            written = "" if status == "in_progress" else _text_of(arguments)
            return {"type": "custom_tool_call", **about, **named, "input": written}
        written = "" if status == "in_progress" else arguments
        return {"type": "function_call", **about, **named, "arguments": written}

    def choice(self, choice: Any) -> Any:
        """The choice of a tool, in the chat's form."""
        if not isinstance(choice, Mapping):
            return choice
        if choice.get("type") in ("function", "custom", *_KINDS) and "function" not in choice:
            name = choice["type"] if choice["type"] in _KINDS else choice.get("name")
            return _chosen(full_name(name, choice.get(_OUTSIDE)))
        if choice.get("type") == "allowed_tools" and "allowed_tools" not in choice:
            tools = Fields(choice, "tool_choice").list("tools") or []
            allowed = [self.choice(Fields(each, "tool_choice.tools").all()) for each in tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": allowed}}
        return choice


def _chosen(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def full_name(name: Any, namespace: Any) -> Any:
    """The name by which the model knows a function.

    Examples:
        >>> full_name("spawn", "agents"), full_name("spawn", None), full_name("read", "mcp__files__")
        ('agents__spawn', 'spawn', 'mcp__files__read')
    """
    if not isinstance(namespace, str) or not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def _function(fields: Fields) -> dict[str, Any]:
    fields.required_text("name")
    given = fields.all()
    return {name: given[name] for name in _FUNCTION_FIELDS if name in given}


def _free_text(fields: Fields) -> dict[str, Any]:
    """A function that takes a text. Its grammar is told to the model, which is not held to it."""
    about = {"type": "string"}
    form = Fields(fields.object("format") or {}, fields.path("format"))
    kind = form.text("type", choices=("text", "grammar")) or "text"
    if kind == "grammar":
        syntax, definition = form.required_text("syntax"), form.required_text("definition")
        about["description"] = f"A text of this {syntax} grammar:\n{definition}"
    return {
        "name": fields.required_text("name"),
        "description": fields.text("description") or "",
        "parameters": _object("input", input=about),
    }


def _action(kind: _Kind, arguments: str) -> dict[str, Any] | None:
    """The field of an item that has the arguments; ``None`` if they are not what the function takes."""
    given = _as_object(arguments)
    names = kind.parameters["properties"]
    if given is None or kind.parameters["required"][0] not in given or not set(given) <= set(names):
        return None
    given = {name: value for name, value in given.items() if value is not None}
    if not all(_is_of(value, names[name]) for name, value in given.items()):
        return None
    return {**kind.fixed, **{kind.renamed.get(name, name): value for name, value in given.items()}}


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "array": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
}


def _is_of(value: Any, schema: Mapping[str, Any]) -> bool:
    return _TYPES[schema["type"]](value) and value in schema.get("enum", [value])


def _as_object(arguments: str) -> dict[str, Any] | None:
    try:
        given = json.loads(arguments or "{}")
    except ValueError:
        return None
    return given if isinstance(given, dict) else None


def _text_of(arguments: str) -> str:
    """The text that a call of a free-text tool has."""
    given = _as_object(arguments)
    text = None if given is None else given.get("input")
    return text if isinstance(text, str) else arguments


# ------------------------------------------------------------------ items that a client sends back


def is_call(kind: str) -> bool:
    """Whether an item of this type is a call."""
    return kind in _CALLS


def is_result(kind: str) -> bool:
    """Whether an item of this type is a call's result."""
    return kind in _RESULTS


def chat_call(kind: str, fields: Fields) -> dict[str, Any]:
    """The call of an item, in the chat's form."""
    if kind in _OF_ITEM:
        name, known = _OF_ITEM[kind]
        arguments = json.dumps(dict(_arguments(known, fields)), ensure_ascii=False)
    else:
        name = full_name(fields.required_text("name"), fields.text(_OUTSIDE))
        if kind == "custom_tool_call":
            arguments = json.dumps({"input": fields.required_text("input")}, ensure_ascii=False)
        else:
            arguments = fields.text("arguments") or "{}"
    return {"id": _id_of(fields), "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(kind: _Kind, fields: Fields) -> Iterator[tuple[str, Any]]:
    action = fields.object(kind.holder, required=True) or {}
    for name in kind.parameters["properties"]:
        value = action.get(kind.renamed.get(name, name))
        if value is not None:
            yield name, value


def _id_of(fields: Fields) -> str:
    """The id of a call; a local shell's output has it as its own."""
    return fields.text("call_id") or fields.text("id") or fields.required_text("call_id")


def chat_result(kind: str, fields: Fields, parts: Callable[[Fields], Any]) -> dict[str, Any]:
    """The result of a call, in the chat's form.

    Args:
        kind: type of the item.
        fields: of the item.
        parts: reads ``output`` where it is a text or parts of a content.
    """
    if kind == "shell_call_output":
        content: Any = json.dumps(fields.list("output", required=True), ensure_ascii=False)
    elif kind == "apply_patch_call_output":
        content = fields.text("output") or fields.text("status") or ""
    else:
        content = parts(fields)
    return {"role": "tool", "tool_call_id": _id_of(fields), "content": content}
