"""Turns and pieces of turns in the form of ``/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.agents.http.old_functions import as_function_call
from torchrl_sglang.agents.http.openai_reply import OpenAIReply
from torchrl_sglang.agents.http.reply_deltas import Delta
from torchrl_sglang.agents.types import Choice, TokenLogProb, Turn

__all__ = ["ChatReply"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply(OpenAIReply):
    """Writes the answer to one request.

    Attributes:
        has_old_functions: a tool call is written as ``function_call``.
    """

    has_old_functions: bool = False

    def whole(self, turn: Turn) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {
                "index": choice.index,
                "message": {"refusal": None, **self._message(choice)},
                "logprobs": self._log_probs(choice.token_ids, choice.log_probs, choice.top_log_probs),
                "finish_reason": self._reason(choice),
                **self.token_ids(choice.token_ids),
            }
            for choice in turn.choices
        ]
        return {
            **self.head("chat.completion"),
            "choices": choices,
            **self.prompt_ids(turn),
            **self.ending(turn),
        }

    def begin(self, index: int) -> dict[str, Any]:
        """The piece of a choice that comes first."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Pieces with what a choice has gained."""
        log_probs = self._log_probs(delta.token_ids, delta.log_probs, delta.top_log_probs)
        gained = {"reasoning_content": delta.reasoning_content, "content": delta.content}
        fields = {name: text for name, text in gained.items() if text}
        ids = self.token_ids(delta.token_ids)
        if fields or (delta.token_ids and (log_probs or ids)):
            yield self._chunk(delta.index, fields or {"content": ""}, log_probs, more=ids)

    def end(self, choice: Choice, turn: Turn) -> Iterator[dict[str, Any]]:
        """The pieces that come last: the tool calls, and why the choice ended."""
        calls = choice.message.get("tool_calls") or ()
        if calls and self.has_old_functions:
            yield self._chunk(choice.index, {"function_call": calls[0]["function"]})
        elif calls:
            yield self._chunk(choice.index, {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
        yield {**self._chunk(choice.index, {}, finish_reason=self._reason(choice)), **self.prompt_ids(turn)}

    def usage_piece(self, turn: Turn) -> dict[str, Any]:
        """The piece that ends a stream with ``stream_options.include_usage``."""
        return {**self.head("chat.completion.chunk"), "choices": [], "usage": self.usage(turn)}

    def _message(self, choice: Choice) -> Mapping[str, Any]:
        return as_function_call(choice.message) if self.has_old_functions else choice.message

    def _reason(self, choice: Choice) -> str:
        is_old = self.has_old_functions and choice.finish_reason == "tool_calls"
        return "function_call" if is_old else choice.finish_reason

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        log_probs: Any = None,
        finish_reason: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish_reason, **(more or {})}
        return {**self.head("chat.completion.chunk"), "choices": [choice]}

    def _log_probs(
        self, ids: Sequence[int], log_probs: Sequence[float], top: Sequence[Sequence[TokenLogProb]]
    ) -> dict[str, Any] | None:
        """``logprobs`` in OpenAI's form: every sampled token, also that which ended the answer."""
        if self.texts is None:
            return None
        tops: Sequence[Sequence[TokenLogProb]] = top or [()] * len(ids)
        content = [
            {**self._token(i, value), "top_logprobs": [self._token(each.token_id, each.log_prob) for each in likely]}
            for i, value, likely in zip(ids, log_probs, tops, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, log_prob: float) -> dict[str, Any]:
        assert self.texts is not None
        text, data = self.texts.text_and_bytes(token_id)
        return {"token": text, "logprob": log_prob, "bytes": list(data)}
