"""OpenAI's first form of tool calls, ``functions`` and ``function_call``, as tools: older agents still use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrl_sglang.agents.http.api_errors import bad_request

__all__ = ["as_function_call", "has_old_functions", "with_tools"]


def has_old_functions(body: Any) -> bool:
    """Whether a request gives its tools in this form, so that its answer has calls in this form."""
    return isinstance(body, Mapping) and bool(body.get("functions"))


def with_tools(body: Any) -> Any:
    """The body of a request with its functions, its choice and its messages in the form of tools.

    Raises:
        ApiError: it has tools in both forms.

    Examples:
        >>> body = {"functions": [{"name": "now"}], "function_call": {"name": "now"}}
        >>> with_tools(body)["tool_choice"]
        {'type': 'function', 'function': {'name': 'now'}}
    """
    if not isinstance(body, Mapping):
        return body
    made = {name: value for name, value in body.items() if name not in ("functions", "function_call")}
    if isinstance(body.get("messages"), list):
        made["messages"] = [_message(message) for message in body["messages"]]
    functions, choice = body.get("functions"), body.get("function_call")
    if not functions:
        if choice is not None and choice not in ("auto", "none"):
            raise bad_request("function_call needs functions; for tools send tool_choice", "function_call")
        return made
    if body.get("tools"):
        raise bad_request("functions is the old form of tools: send one of them", "functions")
    if not isinstance(functions, list):
        raise bad_request(f"functions must be a list, got {functions!r:.100}", "functions")
    made["tools"] = [{"type": "function", "function": function} for function in functions]
    made["parallel_tool_calls"] = False  # a message has one call in this form
    if isinstance(choice, Mapping):
        made["tool_choice"] = {"type": "function", "function": dict(choice)}
    elif choice is not None:
        made["tool_choice"] = choice
    return made


def _message(message: Any) -> Any:
    """A call without an id, or its result, which then answers the call before it."""
    if not isinstance(message, Mapping):
        return message
    if message.get("role") == "function":
        return {**message, "role": "tool"}
    call = message.get("function_call")
    if call is None or message.get("tool_calls"):
        return message
    made = {name: value for name, value in message.items() if name != "function_call"}
    return {**made, "tool_calls": [{"type": "function", "function": call}]}


def as_function_call(message: Mapping[str, Any]) -> dict[str, Any]:
    """An answer's message with its call in this form."""
    made = {name: value for name, value in message.items() if name != "tool_calls"}
    calls = message.get("tool_calls")
    return {**made, "function_call": calls[0]["function"]} if calls else made
