"""What a chat gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Response", "ToolCall"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A tool the model asks for.

    Attributes:
        name: the tool's name, as the model wrote it.
        arguments: what to call it with.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One answer. ``T`` is ``response_length``.

    Attributes:
        text: what the model wrote, tool calls included; stop strings are trimmed.
        prompt_length: tokens of the prompt, images included.
        response_length: tokens of the response, the one that ended it included.
        finish_reason: ``"stop"`` (it ended by itself or by a stop string), ``"length"`` (it was cut off), ``"abort"``
            (somebody ended it, e.g. a weight update).
        token_ids: the response's token ids, length ``T``.
        log_probs: natural-log probability of each response token, length ``T``; ``None`` when not asked for. They are
            those of the distribution after temperature and before top-p, top-k and min-p.
        tool_calls: the tools the model asks for, in order; empty without ``tools``.
        content: ``text`` without the tool calls.
        weight_version: version of the weights that made the response, as the server names it.
    """

    text: str
    prompt_length: int
    response_length: int
    finish_reason: Literal["stop", "length", "abort"]
    token_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    content: str = ""
    weight_version: str = "default"

    @property
    def message(self) -> dict[str, Any]:
        """This response as a message, to go on with.

        Examples:
            >>> Response(text="4", content="4", prompt_length=9, response_length=2, finish_reason="stop").message
            {'role': 'assistant', 'content': '4'}
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.tool_calls
            ]
        return message
