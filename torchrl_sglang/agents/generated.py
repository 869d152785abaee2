"""``Generated``: a sequence, finished or so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrl_sglang.protocol.messages import GenerateReply

__all__ = ["Generated", "OnTokens"]


@dataclass(slots=True, kw_only=True)
class Generated:
    """A sequence, finished or so far.

    Attributes:
        output_ids: sampled tokens, length ``R``.
        log_probs: natural-log probability of each, length ``R``.
        versions: number of the weights that generated each, length ``R``; of a sequence that is not finished yet only
            those of its finished parts.
        top_log_probs: per token ``[log_prob, id, text]`` of the most likely ones, if requested.
        finish_reason: ``"stop"`` or ``"length"``.
        matched: the stop token or string that ended it.
        abort_message: what the server said when it aborted the last part.
        cached_tokens: prompt tokens from the prefix cache.
        server: URL of the server that generated the last part.
        resumes: how often it was continued.
        prompt_ids: the prompt as the server saw it, images expanded; ``None`` for a prompt without images.
    """

    output_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    top_log_probs: list[Any] = field(default_factory=list)
    finish_reason: str = ""
    matched: int | str | None = None
    abort_message: str = ""
    cached_tokens: int = 0
    server: str = ""
    resumes: int = 0
    prompt_ids: list[int] | None = None

    def with_part(self, reply: GenerateReply, top: Sequence[Any], *, versions: Sequence[int]) -> Generated:
        """The sequence with a further part."""
        return Generated(
            output_ids=self.output_ids + reply.output_ids,
            log_probs=self.log_probs + (reply.output_logprobs or []),
            versions=[*self.versions, *versions],
            top_log_probs=[*self.top_log_probs, *top],
            finish_reason=reply.finish_reason,
            matched=reply.matched,
            abort_message=reply.abort_message,
            cached_tokens=self.cached_tokens if self.resumes or self.output_ids else reply.cached_tokens,
            server=reply.server,
            resumes=self.resumes,
            prompt_ids=self.prompt_ids,
        )


OnTokens = Callable[[Generated], None]
"""Called with the sequence so far, which grows in place: what is to be kept of it is copied."""
