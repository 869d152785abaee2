"""``Generation``: why a response ended, which weights generated each token, and how tokens were sampled.

Shapes: ``R`` is the number of response tokens of one sequence (its padded width when the output is padded).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorClass

from torchrl_sglang.protocol.generate import token_versions
from torchrl_sglang.protocol.messages import WeightSpan

__all__ = ["NO_ID", "NO_TOKEN", "Generation", "token_versions"]

NO_TOKEN = -2
"""Weight version at a padding position. -1 is a token from weights whose version string is not a number."""

NO_ID = -1
"""Fills :attr:`Generation.support` where a token was chosen among fewer ids."""


class Generation(TensorClass["nocast"]):  # type: ignore[name-defined]
    """How a sequence was generated, beside its tokens and log-probs. One entry per sequence.

    All tensors have the batch shape of the TensorDict that holds them; ``weight_version`` has one dimension more.

    Attributes:
        finish_reason: ``"stop"`` (EOS, stop token or stop string), ``"length"``, ``"abort"``, or ``"error"`` for a
            prompt that was never sent (``on_error="mask"``).
        matched: the stop token id or stop string that ended the response, else ``None``.
        truncated: bool; the response did not end by itself (``"length"`` or ``"abort"``).
        prompt_tokens: int64; tokens of the prompt.
        completion_tokens: int64; tokens of the response.
        cached_tokens: int64; prompt tokens the server took from its prefix cache.
        dropped_tokens: int64; prompt tokens cut off on the left by ``on_overlong="truncate_left"``.
        resumes: int64; how often an interrupted response was continued.
        weight_version: int64, one per response token, aligned with ``Tokens.response``: the weights that generated it.
            :data:`NO_TOKEN` (-2) on padding, -1 where the server's version string was not set by this package.
        policy_version: int64; the oldest weights that generated a token of the response (those at its end if it is
            empty).
            TorchRL's ``PolicyAgeFilter`` reads it with ``policy_version_key=("generation", "policy_version")``.
        temperature: float32; logits were divided by it. 0 is greedy, for which log-probs count as temperature 1.
        top_p: float32; probability mass of the nucleus, 1 for all tokens.
        top_k: int64; -1 for all tokens.
        min_p: float32; 0 for no floor.
        exact_log_probs: bool; the recorded log-probs are those of the distribution that tokens were drawn from.
            ``False`` under top-p, top-k or min-p without ``exact_log_probs=True``: the log-probs are then those after
            temperature and before truncation.
        support: int64 of shape ``(R, K)``, only with ``exact_log_probs=True``: the ids that each token was chosen
            among, filled with -1.
        server: base URL of the server that answered.
        latency_s: float32; seconds from arrival to completion, as the server measured them.
        error: why this sequence was not generated, ``""`` if it was.
    """

    finish_reason: str
    matched: int | str | None
    truncated: torch.Tensor
    prompt_tokens: torch.Tensor
    completion_tokens: torch.Tensor
    cached_tokens: torch.Tensor
    dropped_tokens: torch.Tensor
    resumes: torch.Tensor
    weight_version: torch.Tensor
    policy_version: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    exact_log_probs: torch.Tensor
    server: str
    latency_s: torch.Tensor
    error: str
    support: torch.Tensor | None = None


def join_spans(first: Sequence[WeightSpan], second: Sequence[WeightSpan], offset: int) -> tuple[WeightSpan, ...]:
    """Weight spans of a response that was generated in two parts, the second beginning at token ``offset``."""
    moved = (WeightSpan(version=s.version, start=s.start + offset, end=s.end + offset) for s in second)
    return (*first, *moved)
