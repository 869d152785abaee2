"""Responses of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["RejectedCall", "Response", "ToolCall"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call of a tool, as the model wrote it.

    Attributes:
        name: the tool's name, as the model wrote it.
        arguments: the arguments by name, in the types of the tool's schema where that loses nothing.
        id: names the call in the conversation; the tool's message repeats it as ``tool_call_id``. Nine letters and
            digits, unless the model wrote an id itself or its family has a form of its own.
        problems: how the call doesn't fit the tool's schema, one sentence each; empty if it fits.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default="", compare=False)
    problems: tuple[str, ...] = ()

    def __repr__(self) -> str:
        more = "".join(f", {name}={value!r}" for name, value in (("id", self.id), ("problems", self.problems)) if value)
        return f"ToolCall(name={self.name!r}, arguments={self.arguments!r}{more})"


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedCall:
    """A passage that is written like a tool call, but is not taken as one.

    Attributes:
        text: the passage.
        reason: why it is no call.
    """

    text: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response. ``T`` is ``response_length``.

    Attributes:
        text: what the model wrote, tool calls included; stop strings are trimmed.
        prompt_length: tokens of the prompt, images included.
        response_length: tokens of the response, including the one that ended it.
        finish_reason: ``"stop"`` (EOS, a stop token or a stop string), ``"length"`` (``max_new_tokens`` reached),
            ``"abort"`` (the request was aborted, e.g. by a weight update).
        token_ids: the response's token ids, length ``T``.
        log_probs: natural-log probability of each response token, length ``T``; ``None`` without
            ``return_log_probs``. They are those after temperature and before top-p, top-k and min-p.
        tool_calls: the tool calls in the text, in order; empty without ``tools``.
        content: ``text`` without the tool calls.
        rejected_calls: passages that are written like calls, but can't be taken as such: not JSON, cut off, quoted.
        weight_version: the server's name for the weights that generated the response.
    """

    text: str
    prompt_length: int
    response_length: int
    finish_reason: Literal["stop", "length", "abort"]
    token_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    content: str = ""
    rejected_calls: tuple[RejectedCall, ...] = ()
    weight_version: str = "default"

    @property
    def message(self) -> dict[str, Any]:
        """This response as a message, to append to the conversation.

        Examples:
            >>> Response(text="4", content="4", prompt_length=9, response_length=2, finish_reason="stop").message
            {'role': 'assistant', 'content': '4'}
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    **({"id": call.id} if call.id else {}),
                    "type": "function",
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for call in self.tool_calls
            ]
        return message
