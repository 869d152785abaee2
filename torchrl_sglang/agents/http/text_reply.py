"""Turns and pieces of turns in the form of ``/completions``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrl_sglang.agents.http.openai_reply import OpenAIReply
from torchrl_sglang.agents.http.reply_deltas import Delta
from torchrl_sglang.agents.types import Choice, TokenLogProb, Turn

__all__ = ["TextReply"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReply(OpenAIReply):
    """Writes the answer to one request."""

    _offsets: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    """Per choice, characters of its tokens so far."""

    def whole(self, turn: Turn) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {
                **self._choice(
                    choice.index,
                    choice.message.get("content") or "",
                    self._log_probs(choice.index, choice.token_ids, choice.log_probs, choice.top_log_probs),
                    choice.finish_reason,
                ),
                **self.prompt_ids(turn),
                **self.token_ids(choice.token_ids),
            }
            for choice in turn.choices
        ]
        return {
            **self.head("text_completion"),
            "choices": choices,
            **self.ending(turn),
        }

    def begin(self, index: int) -> None:
        """Nothing comes before the text."""

    def piece(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Pieces with what a choice has gained."""
        log_probs = self._log_probs(delta.index, delta.token_ids, delta.log_probs, delta.top_log_probs)
        ids = self.token_ids(delta.token_ids)
        if delta.text or (delta.token_ids and (log_probs or ids)):
            choice = {**self._choice(delta.index, delta.text, log_probs, None), **ids}
            yield {**self.head("text_completion"), "choices": [choice]}

    def end(self, choice: Choice, turn: Turn) -> Iterator[dict[str, Any]]:
        """The piece that says why a choice ended."""
        ending = {**self._choice(choice.index, "", None, choice.finish_reason), **self.prompt_ids(turn)}
        yield {**self.head("text_completion"), "choices": [ending]}

    def usage_piece(self, turn: Turn) -> dict[str, Any]:
        """The piece that ends a stream with ``stream_options.include_usage``."""
        return {**self.head("text_completion"), "choices": [], "usage": self.usage(turn)}

    @staticmethod
    def _choice(index: int, text: str, log_probs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish_reason}

    def _log_probs(
        self, index: int, ids: Sequence[int], log_probs: Sequence[float], top: Sequence[Sequence[TokenLogProb]]
    ) -> dict[str, Any] | None:
        if self.texts is None:
            return None
        tokens = [self.texts.text_and_bytes(i)[0] for i in ids]
        offsets, at = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets[index] = at
        likely = [{self.texts.text_and_bytes(each.token_id)[0]: each.log_prob for each in one} for one in top]
        return {
            "tokens": tokens,
            "token_logprobs": list(log_probs),
            "top_logprobs": likely or None,
            "text_offset": offsets,
        }
