"""Turns in the form of OpenAI's Responses API, whole and as events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchrl_sglang.agents.http.api_errors import ApiError
from torchrl_sglang.agents.http.event_stream import named_event
from torchrl_sglang.agents.http.reply_deltas import Delta, ReplyDeltas
from torchrl_sglang.agents.http.responses_tools import ResponsesTools
from torchrl_sglang.agents.http.token_texts import TokenTexts
from torchrl_sglang.agents.types import Choice, Progress, Turn

__all__ = ["ResponsesReply", "ResponsesWriter"]

_ECHOED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesReply:
    """Writes the answer to one request.

    Attributes:
        id: of the answer.
        created: Unix time.
        model: the served model's name.
        body: the request, of which the answer repeats fields.
        texts: the texts of tokens; ``None`` without log-probs.
        tools: the request's tools.
    """

    id: str
    created: int
    model: str
    body: Mapping[str, Any] = field(default_factory=dict)
    texts: TokenTexts | None = None
    tools: ResponsesTools = field(default_factory=ResponsesTools)

    def whole(self, turn: Turn) -> dict[str, Any]:
        """The answer in one piece."""
        choice = turn.choices[0]
        is_cut = choice.finish_reason == "length"
        return {
            **self.head("incomplete" if is_cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": list(self.items(choice)),
            "usage": {
                "input_tokens": turn.prompt_tokens,
                "input_tokens_details": {"cached_tokens": turn.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": turn.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": turn.prompt_tokens + turn.completion_tokens,
            },
        }

    def head(self, status: str) -> dict[str, Any]:
        """The answer without its output."""
        echoed = {name: self.body.get(name) if self.body.get(name) is not None else d for name, d in _ECHOED.items()}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **echoed,
        }

    def items(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """The items of an answer: reasoning, text, calls."""
        message = choice.message
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        reasoning = message.get("reasoning_content")
        if reasoning:
            yield self.reasoning_item(reasoning)
        if message.get("content") or not (reasoning or message.get("tool_calls")):  # an answer has at least one item
            yield self.message_item(message.get("content") or "", status, self._log_probs(choice))
        for index, call in enumerate(message.get("tool_calls") or ()):
            yield self.call_item(call, index)

    def reasoning_item(self, text: str) -> dict[str, Any]:
        """The item of the reasoning."""
        content = [{"type": "reasoning_text", "text": text}] if text else []
        return {"id": f"rs_{self.id}", "type": "reasoning", "summary": [], "content": content}

    def message_item(self, text: str | None, status: str, log_probs: list[dict[str, Any]]) -> dict[str, Any]:
        """The item of the text; ``None`` leaves its content empty."""
        content = [] if text is None else [text_part(text, log_probs)]
        return {"id": f"msg_{self.id}", "type": "message", "role": "assistant", "status": status, "content": content}

    def call_item(self, call: Mapping[str, Any], index: int, status: str = "completed") -> dict[str, Any]:
        """The item of a tool call."""
        return self.tools.item(call, f"fc_{self.id}_{index}", status)

    def _log_probs(self, choice: Choice) -> list[dict[str, Any]]:
        return log_probs(self.texts, ReplyDeltas().rest(choice))


def log_probs(texts: TokenTexts | None, delta: Delta) -> list[dict[str, Any]]:
    """The log-probs of new tokens; empty unless requested."""
    if texts is None:
        return []

    def token(token_id: int, value: float) -> dict[str, Any]:
        text, data = texts.text_and_bytes(token_id)
        return {"token": text, "logprob": value, "bytes": list(data)}

    tops: Any = delta.top_log_probs or [()] * len(delta.token_ids)
    return [
        {**token(i, value), "top_logprobs": [token(each.token_id, each.log_prob) for each in likely]}
        for i, value, likely in zip(delta.token_ids, delta.log_probs, tops, strict=True)
    ]


def text_part(text: str, log_probs: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of a message item that holds its text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": log_probs}


class ResponsesWriter:
    """Writes a turn as events.

    Args:
        reply: the form of the answer.
    """

    def __init__(self, reply: ResponsesReply) -> None:
        self._reply = reply
        self._deltas = ReplyDeltas()
        self._number = 0
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
        items = list(self._reply.items(choice))
        if any(item["type"] == "message" for item in items):
            yield from self._open_message()
        yield from self._close(items)
        for index, call in enumerate(choice.message.get("tool_calls") or ()):
            done = self._reply.call_item(call, index)
            where = {"output_index": self._position, "item_id": done["id"]}
            yield self._event(
                "output_item.added",
                output_index=self._position,
                item=self._reply.call_item(call, index, "in_progress"),
            )
            yield from self._written(done, where)
            yield self._event("output_item.done", output_index=self._position, item=done)
            self._position += 1
        whole = self._reply.whole(turn)
        yield self._event(whole["status"], response=whole)

    def failure(self, error: ApiError) -> Iterator[bytes]:
        """See :class:`EventWriter`."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failed = {**self._reply.head("failed"), "error": {"code": code, "message": error.message}}
        yield from self._begin()
        yield self._event("failed", response=failed)

    def _begin(self) -> Iterator[bytes]:
        if self._number == 0:
            head = self._reply.head("in_progress")
            yield self._event("created", response=head)
            yield self._event("in_progress", response=head)

    def _write(self, delta: Delta) -> Iterator[bytes]:
        if delta.reasoning_content:
            if self._open is None:
                self._open = "reasoning"
                yield self._event("output_item.added", output_index=self._position, item=self._reply.reasoning_item(""))
            yield self._event(
                "reasoning_text.delta",
                output_index=self._position,
                item_id=self._reply.reasoning_item("")["id"],
                content_index=0,
                delta=delta.reasoning_content,
            )
        if delta.content:
            yield from self._open_message()
            yield self._event(
                "output_text.delta",
                **self._place(),
                delta=delta.content,
                logprobs=log_probs(self._reply.texts, delta),
            )

    def _open_message(self) -> Iterator[bytes]:
        if self._open == "message":
            return
        if self._open == "reasoning":
            self._position += 1
        self._open = "message"
        item = self._reply.message_item(None, "in_progress", [])
        yield self._event("output_item.added", output_index=self._position, item=item)
        yield self._event("content_part.added", **self._place(), part=text_part("", []))

    def _place(self) -> dict[str, Any]:
        item = self._reply.message_item(None, "in_progress", [])
        return {"output_index": self._position, "item_id": item["id"], "content_index": 0}

    def _close(self, items: list[dict[str, Any]]) -> Iterator[bytes]:
        """The events that end the text and the reasoning."""
        for index, item in enumerate(items):
            if item["type"] == "message":
                part = item["content"][0]
                where = {"output_index": index, "item_id": item["id"], "content_index": 0}
                yield self._event("output_text.done", **where, text=part["text"], logprobs=part["logprobs"])
                yield self._event("content_part.done", **where, part=part)
            elif item["type"] == "reasoning":
                text = item["content"][0]["text"]
                where = {"output_index": index, "item_id": item["id"], "content_index": 0}
                yield self._event("reasoning_text.done", **where, text=text)
            if item["type"] in ("message", "reasoning"):
                yield self._event("output_item.done", output_index=index, item=item)
                self._position = index + 1

    def _written(self, item: Mapping[str, Any], where: Mapping[str, Any]) -> Iterator[bytes]:
        """The events that bring what the model wrote into a call."""
        if item["type"] == "function_call":
            yield self._event("function_call_arguments.delta", **where, delta=item["arguments"])
            yield self._event("function_call_arguments.done", **where, name=item["name"], arguments=item["arguments"])
        elif item["type"] == "custom_tool_call":
            yield self._event("custom_tool_call_input.delta", **where, delta=item["input"])
            yield self._event("custom_tool_call_input.done", **where, input=item["input"])

    def _event(self, name: str, /, **data: Any) -> bytes:
        event = {"type": f"response.{name}", "sequence_number": self._number, **data}
        self._number += 1
        return named_event(event["type"], event)
