"""Anthropic's ``/v1/messages``: the body of a request as what the session is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchrl_sglang.agents.http.anthropic_thinking import thinking_variables
from torchrl_sglang.agents.http.anthropic_tools import read_tool, read_tool_choice_of_messages
from torchrl_sglang.agents.http.api_errors import bad_request
from torchrl_sglang.agents.http.chat_messages import check_messages, check_tools, read_tool_choice
from torchrl_sglang.agents.http.chat_request import Call, Sending
from torchrl_sglang.agents.http.fields import Fields
from torchrl_sglang.agents.http.sampling_fields import MOST_INTEGER, read_grammar
from torchrl_sglang.agents.types import ChatRequest

__all__ = ["read_anthropic"]

_WITHOUT_EFFECT = (
    *("metadata", "service_tier", "cache_control", "inference_geo", "anthropic_beta", "betas", "speed"),
    "anthropic_version",
)
_PARTS = ("text", "image", "document", "search_result")
_ROLES = ("user", "assistant", "system")


def read_anthropic(body: Any, sending: Sending, *, template: str = "", counts: bool = False) -> Call:
    """The body of ``/v1/messages``.

    Args:
        body: the parsed JSON.
        sending: how it was sent.
        template: the text of the model's chat template.
        counts: the body of ``/v1/messages/count_tokens``, which has no ``max_tokens``.

    Raises:
        ApiError: a field that is wrong, unknown, or can't be honoured.
    """
    fields = Fields(body)
    fields.ignore(*_WITHOUT_EFFECT)
    model = fields.required_text("model")
    limit = fields.integer("max_tokens", at_least=1)
    if limit is None and not counts:
        raise bad_request("max_tokens is missing", "max_tokens", "missing_required_parameter")
    messages = [*_system(fields), *_messages(fields.list("messages", required=True) or [])]
    tools = check_tools([read_tool(Fields(tool, f"tools[{i}]")) for i, tool in enumerate(fields.list("tools") or ())])
    choice, parallel = read_tool_choice_of_messages(fields.object("tool_choice"))
    choice = read_tool_choice(choice, [tool["function"]["name"] for tool in tools])
    sampling: dict[str, Any] = {"max_new_tokens": limit, **_grammar(fields)}
    for name in ("temperature", "top_p"):
        sampling[name] = fields.number(name)
    sampling["top_k"] = fields.integer("top_k", at_least=0, at_most=MOST_INTEGER)
    stops = fields.list("stop_sequences") or []
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise bad_request(f"stop_sequences must be non-empty strings, got {stops!r:.100}", "stop_sequences")
    sampling["stop"] = stops or None
    variables = thinking_variables(fields, template)
    _refuse_what_messages_cannot(fields)
    stream = bool(fields.flag("stream"))
    fields.refuse_unread()
    return Call(
        request=ChatRequest(
            messages=check_messages(messages),
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=parallel,
            template_kwargs=variables,
            sampling={name: value for name, value in sampling.items() if value is not None},
            idempotency_key=sending.idempotency_key,
            attempt=sending.attempt,
        ),
        model=model,
        stream=stream,
    )


def _refuse_what_messages_cannot(fields: Fields) -> None:
    for name in ("container", "mcp_servers", "fallbacks"):
        fields.refuse(name, "there is nothing like it here")
    management = fields.object("context_management")
    edits = Fields(management or {}, "context_management").list("edits") or []
    if any(edit != _KEEPS_ALL for edit in edits):
        raise bad_request(
            f"context_management={management!r:.200} can't be honoured: the conversation is sent to the model as it "
            "comes. Leave out earlier messages in the request itself",
            "context_management",
            "unsupported_parameter",
        )


_KEEPS_ALL = {"type": "clear_thinking_20251015", "keep": "all"}
"""Asks for nothing: earlier thinking stays as the chat template has it."""


def _grammar(fields: Fields) -> dict[str, Any]:
    """The JSON schema of an answer: ``output_config.format``, formerly ``output_format``."""
    config = Fields(fields.object("output_config") or {}, "output_config")
    given = config.object("format") or fields.object("output_format")
    return {} if given is None else read_grammar(Fields(given, "output_config.format"))


def _system(fields: Fields) -> Iterator[dict[str, Any]]:
    system = fields.any("system")
    if system is None:
        return
    if isinstance(system, list):
        system = _joined(system, "system")
    if not isinstance(system, str):
        raise bad_request(f"system must be a string or a list of text blocks, got {system!r:.80}", "system")
    yield {"role": "system", "content": system}


def _joined(parts: Sequence[Any], where: str) -> str:
    """The text of text blocks."""
    return "".join(Fields(part, f"{where}[{i}]").required_text("text") for i, part in enumerate(parts))


def _messages(messages: Sequence[Any]) -> Iterator[dict[str, Any]]:
    if not messages:
        raise bad_request("messages is empty: give at least one message", "messages")
    if isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
        raise bad_request(
            "the last message is the assistant's: that an answer continues a given beginning can't be honoured. End "
            "with a message of the user, and ask there for the form of the answer",
            f"messages[{len(messages) - 1}]",
            "unsupported_parameter",
        )
    for index, message in enumerate(messages):
        fields = Fields(message, f"messages[{index}]")
        role = fields.text("role", choices=_ROLES, required=True)
        content = fields.any("content")
        if isinstance(content, str):
            yield {"role": role, "content": content}
        elif isinstance(content, list) and role == "system":  # in the middle of a conversation
            yield {"role": role, "content": _joined(content, fields.path("content"))}
        elif isinstance(content, list):
            blocks = [Fields(block, f"{fields.path('content')}[{i}]") for i, block in enumerate(content)]
            yield from _assistant(blocks) if role == "assistant" else _user(blocks)
        else:
            raise bad_request(f"{fields.path('content')} must be a string or a list of blocks", fields.path("content"))


def _assistant(blocks: Sequence[Fields]) -> Iterator[dict[str, Any]]:
    text, thinking, calls = "", "", []
    for block in blocks:
        kind = block.text("type", choices=("text", "thinking", "redacted_thinking", "tool_use"), required=True)
        if kind == "text":
            text += block.required_text("text")
        elif kind == "thinking":
            thinking += block.required_text("thinking")
        elif kind == "tool_use":
            arguments = json.dumps(block.object("input", required=True), ensure_ascii=False)
            function = {"name": block.required_text("name"), "arguments": arguments}
            calls.append({"id": block.required_text("id"), "type": "function", "function": function})
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = calls
    yield message


def _user(blocks: Sequence[Fields]) -> Iterator[dict[str, Any]]:
    """A user's message; the results of tools that it holds become messages of their own, before it."""
    parts: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.text("type", choices=(*_PARTS, "tool_result"), required=True)
        if kind == "tool_result":
            content = block.any("content")
            if isinstance(content, list):
                content = [
                    part
                    for i, each in enumerate(content)
                    for part in _parts(Fields(each, f"{block.path('content')}[{i}]"))
                ]
            elif content is None:
                content = ""
            block.flag("is_error")
            yield {"role": "tool", "tool_call_id": block.required_text("tool_use_id"), "content": content}
        else:
            parts += _parts(block)
    if parts:
        yield {"role": "user", "content": parts}


def _parts(block: Fields) -> Iterator[dict[str, Any]]:
    """A block of a user's message or a tool's result, in the chat's form."""
    kind = block.text("type", choices=_PARTS, required=True)
    block.refuse("citations", "the model's answers cite nothing", neutral=({"enabled": False},))
    if kind == "text":
        yield {"type": "text", "text": block.required_text("text")}
    elif kind == "image":
        yield _image(Fields(block.object("source", required=True), block.path("source")))
    elif kind == "document":
        for name in ("title", "context"):
            if block.text(name):
                yield {"type": "text", "text": f"{block.required_text(name)}\n"}
        yield from _document(Fields(block.object("source", required=True), block.path("source")))
    else:
        yield {"type": "text", "text": f"{block.required_text('title')}\n{block.required_text('source')}\n"}
        for index, part in enumerate(block.list("content", required=True) or ()):
            yield from _parts(Fields(part, f"{block.path('content')}[{index}]"))


def _image(source: Fields) -> dict[str, Any]:
    if source.text("type", choices=("base64", "url"), required=True) == "url":
        return {"type": "image_url", "image_url": {"url": source.required_text("url")}}
    url = f"data:{source.required_text('media_type')};base64,{source.required_text('data')}"
    return {"type": "image_url", "image_url": {"url": url}}


def _document(source: Fields) -> Iterator[dict[str, Any]]:
    """The text of a document; the model reads no other."""
    kind = source.text("type", required=True)
    if kind == "text":
        yield {"type": "text", "text": source.required_text("data")}
    elif kind == "content":
        content = source.any("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else source.list("content") or []
        for index, part in enumerate(blocks):
            yield from _parts(Fields(part, f"{source.path('content')}[{index}]"))
    else:
        raise bad_request(
            f"{source.path('type')}={kind!r}: only a document's text can be read; send a source of the type 'text'",
            source.path("type"),
            "unsupported_parameter",
        )
