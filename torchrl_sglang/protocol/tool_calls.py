"""``/parse_function_call``: the server's parsers for the formats in which models write tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang.errors import ProtocolError
from torchrl_sglang.protocol.messages import HttpRequest

__all__ = ["build_parse_tool_calls", "parse_tool_calls_answer"]


def build_parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]], parser: str) -> HttpRequest:
    """Request the tool calls in a response.

    Args:
        text: the response, special tokens included.
        tools: the tools' JSON schemas, in OpenAI's form.
        parser: SGLang's name of the model's format, e.g. ``"qwen25"``, ``"llama3"``, ``"mistral"``, ``"deepseekv3"``.
    """
    body = {"text": text, "tools": [dict(tool) for tool in tools], "tool_call_parser": parser}
    return HttpRequest(method="POST", path="/parse_function_call", body=body, timeout="control", repeatable=True)


def parse_tool_calls_answer(answer: Any, *, server: str) -> tuple[str, list[tuple[str, str]]]:
    """Read the answer to :func:`build_parse_tool_calls`.

    Returns:
        The text around the calls, and per call the tool's name and its arguments as JSON text.

    Raises:
        ProtocolError: the answer has another form.

    Examples:
        >>> answer = {"normal_text": "", "calls": [{"name": "add", "parameters": '{"a": 1}', "tool_index": 0}]}
        >>> parse_tool_calls_answer(answer, server="http://host")
        ('', [('add', '{"a": 1}')])
    """
    try:
        calls = [(str(call["name"]), str(call["parameters"] or "{}")) for call in answer["calls"]]
        return str(answer["normal_text"]), calls
    except (KeyError, TypeError) as error:
        raise ProtocolError(
            f"{server} answered /parse_function_call in an unknown form: {str(answer)[:200]}", server=server
        ) from error
