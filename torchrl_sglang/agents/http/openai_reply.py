"""What answers of ``/chat/completions`` and of ``/completions`` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.agents.http.token_texts import TokenIdTexts, TokenTexts
from torchrl_sglang.agents.types import Choice, Turn

__all__ = ["OpenAIReply"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIReply:
    """The answer to one request.

    Attributes:
        id: of the answer.
        created: Unix time.
        model: the served model's name.
        texts: the texts of tokens; ``None`` without ``logprobs``.
        has_token_ids: whether the answer has the token ids of prompt and answer, in vLLM's fields.
    """

    id: str
    created: int
    model: str
    texts: TokenTexts | TokenIdTexts | None
    has_token_ids: bool = False

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that come first."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def ending(self, turn: Turn) -> dict[str, Any]:
        """The fields that come after the choices."""
        return {"usage": self.usage(turn), "system_fingerprint": _fingerprint(turn.choices)}

    def token_ids(self, ids: Sequence[int]) -> dict[str, Any]:
        """The field of a choice, or of a piece of it, with its tokens; none unless it is asked for."""
        return {"token_ids": list(ids)} if self.has_token_ids else {}

    def prompt_ids(self, turn: Turn) -> dict[str, Any]:
        """The field with the prompt's tokens; none unless it is asked for."""
        return {"prompt_token_ids": turn.read_prompt_ids()} if self.has_token_ids else {}

    @staticmethod
    def usage(turn: Turn) -> dict[str, Any]:
        """The numbers of tokens of a turn."""
        return {
            "prompt_tokens": turn.prompt_tokens,
            "completion_tokens": turn.completion_tokens,
            "total_tokens": turn.prompt_tokens + turn.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": turn.cached_tokens},
        }


def _fingerprint(choices: Sequence[Choice]) -> str | None:
    """Names the weights that generated the last token."""
    versions = [choice.weight_versions[-1] for choice in choices if choice.weight_versions]
    return f"weights-{max(versions)}" if versions else None
