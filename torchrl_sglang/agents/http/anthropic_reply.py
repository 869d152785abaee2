"""Turns in the form of Anthropic's ``/v1/messages``, whole and as events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.agents.http.api_errors import ApiError
from torchrl_sglang.agents.http.event_stream import named_event
from torchrl_sglang.agents.http.reply_deltas import Delta, ReplyDeltas
from torchrl_sglang.agents.types import Choice, Progress, Turn

__all__ = ["AnthropicReply", "AnthropicWriter"]

_SIGNATURE = "unsigned"
"""Anthropic's clients send back only thinking that has a signature."""
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnthropicReply:
    """Writes the answer to one request.

    Attributes:
        id: of the answer.
        model: the served model's name.
        stops: the stop strings that the client gave.
        manages_context: whether the client asked for ``context_management``.
    """

    id: str
    model: str
    stops: Sequence[str] = ()
    manages_context: bool = False

    def whole(self, turn: Turn) -> dict[str, Any]:
        """The answer in one piece."""
        choice = turn.choices[0]
        return {
            **self.head(),
            "content": list(blocks(choice)),
            **self.ending(choice),
            "usage": usage(turn),
            **self.management(),
        }

    def head(self) -> dict[str, Any]:
        """The answer before anything is written."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }

    def management(self) -> dict[str, Any]:
        """What became of ``context_management``: nothing is ever left out."""
        return {"context_management": {"applied_edits": []}} if self.manages_context else {}

    def ending(self, choice: Choice) -> dict[str, Any]:
        """Why an answer ended; the gateway may have stop strings of its own, such as after the only call."""
        if choice.stop in self.stops and choice.finish_reason == "stop":
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop}
        return {"stop_reason": _REASONS[choice.finish_reason], "stop_sequence": None}


def blocks(choice: Choice) -> Iterator[dict[str, Any]]:
    """The blocks of an answer: thinking, text, calls."""
    message = choice.message
    if message.get("reasoning_content"):
        yield {"type": "thinking", "thinking": message["reasoning_content"], "signature": _SIGNATURE}
    if message.get("content"):
        yield {"type": "text", "text": message["content"]}
    for call in message.get("tool_calls") or ():
        yield call_block(call)


def call_block(call: Mapping[str, Any]) -> dict[str, Any]:
    """The block of a tool call."""
    function = call["function"]
    return {
        "type": "tool_use",
        "id": call["id"],
        "name": function["name"],
        "input": json.loads(function["arguments"] or "{}"),
    }


def usage(turn: Turn) -> dict[str, Any]:
    """The numbers of tokens; Anthropic counts cached ones apart."""
    return {
        "input_tokens": turn.prompt_tokens - turn.cached_tokens,
        "cache_read_input_tokens": turn.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": turn.completion_tokens,
    }


class AnthropicWriter:
    """Writes a turn as events.

    Args:
        reply: the form of the answer.
    """

    def __init__(self, reply: AnthropicReply) -> None:
        self._reply = reply
        self._deltas = ReplyDeltas()
        self._begun = False
        self._open: str | None = None
        self._position = 0

    def progress(self, progress: Progress) -> Iterator[bytes]:
        """See :class:`EventWriter`."""
        yield from self._begin()
        if progress.index == 0:  # the API has one answer; the gateway's settings may ask for more choices
            yield from self._write(self._deltas.of(progress))

    def finish(self, turn: Turn) -> Iterator[bytes]:
        """See :class:`EventWriter`."""
        yield from self._begin()
        choice = turn.choices[0]
        yield from self._write(self._deltas.rest(choice))
        yield from self._close()
        for call in choice.message.get("tool_calls") or ():
            block = call_block(call)
            yield from self._start("tool_use", {**block, "input": {}})
            written = {"type": "input_json_delta", "partial_json": call["function"]["arguments"] or "{}"}
            yield self._delta(written)
            yield from self._close()
        ending = {"delta": self._reply.ending(choice), "usage": usage(turn)}
        yield _event("message_delta", **ending, **self._reply.management())
        yield _event("message_stop")

    def failure(self, error: ApiError) -> Iterator[bytes]:
        """See :class:`EventWriter`."""
        yield named_event("error", error.anthropic())

    def _begin(self) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            yield _event("message_start", message=self._reply.head())

    def _write(self, delta: Delta) -> Iterator[bytes]:
        if delta.reasoning_content:
            yield from self._start("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": delta.reasoning_content})
        if delta.content:
            yield from self._start("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": delta.content})

    def _start(self, kind: str, block: Mapping[str, Any]) -> Iterator[bytes]:
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        yield _event("content_block_start", index=self._position, content_block=block)

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._position, delta=delta)

    def _close(self) -> Iterator[bytes]:
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": _SIGNATURE})
        if self._open is not None:
            yield _event("content_block_stop", index=self._position)
            self._open = None
            self._position += 1


def _event(name: str, **data: Any) -> bytes:
    return named_event(name, {"type": name, **data})
