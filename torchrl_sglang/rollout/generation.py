"""What a response is beside its tokens: why it ended, which weights made each token, how it was drawn.

Shapes: ``R`` is the number of response tokens of one sequence (its padded width when the output is padded).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorClass

from torchrl_sglang.protocol.messages import GenerateReply, WeightSpan
from torchrl_sglang.protocol.version import version_number

__all__ = ["NO_ID", "NO_TOKEN", "Generation", "token_versions"]

NO_TOKEN = -2
"""Weight version of a padding position; -1 is a token made by weights whose version string is not a number."""

NO_ID = -1
"""Fills up :attr:`Generation.support` where a token had fewer ids to be chosen among."""


class Generation(TensorClass["nocast"]):  # type: ignore[name-defined]
    """Facts of a generated sequence that tokens and log-probs don't tell. One entry per sequence.

    All tensors have the batch shape of the TensorDict they lie in; ``weight_version`` has one dimension more.

    Attributes:
        finish_reason: ``"stop"`` (EOS, stop token or stop string), ``"length"``, ``"abort"``, or ``"error"`` for a
            prompt that was never sent (``on_error="mask"``).
        matched: the stop token id or stop string that ended the response, else ``None``.
        truncated: bool; the response did not end by itself (``"length"`` or ``"abort"``).
        prompt_tokens: int64; tokens of the prompt.
        completion_tokens: int64; tokens of the response.
        cached_tokens: int64; prompt tokens the server took from its prefix cache.
        dropped_tokens: int64; prompt tokens cut off on the left by ``on_overlong="truncate_left"``.
        resumes: int64; how often an interrupted response was taken up again.
        weight_version: int64, one per response token, aligned with ``Tokens.response``: the weights that made it.
            :data:`NO_TOKEN` (-2) on padding, -1 where the server's version string is not one of ours.
        policy_version: int64; the oldest weights that made a token of the response (those at its end if it is empty).
            TorchRL's ``PolicyAgeFilter`` reads it with ``policy_version_key=("generation", "policy_version")``.
        temperature: float32; logits were divided by it. 0 is greedy, for which log-probs count as temperature 1.
        top_p: float32; nucleus the token was drawn from, 1 for all.
        top_k: int64; -1 for all tokens.
        min_p: float32; 0 for no floor.
        exact_log_probs: bool; the recorded log-probs are those of the distribution tokens were drawn from. ``False``
            under top-p, top-k or min-p, unless ``exact_log_probs=True`` was asked for: then they are the tempered ones
            before truncation.
        support: int64 of shape ``(R, K)``, only with ``exact_log_probs=True``: the ids each token was chosen among,
            filled up with -1.
        server: base URL of the server that answered.
        latency_s: float32; seconds from arrival to completion, as the server measured them.
        error: what was wrong with this sequence, ``""`` when nothing was.
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


def token_versions(reply: GenerateReply) -> list[int]:
    """The weight version of every response token, from the server's spans.

    A token that no span covers carries the version at the end of the response.

    Examples:
        >>> spans = (WeightSpan(version="3@a", start=0, end=2), WeightSpan(version="4@a", start=2, end=3))
        >>> token_versions(GenerateReply(output_ids=[5, 6, 7], weight_version="4@a", weight_spans=spans))
        [3, 3, 4]
    """
    versions_R = [version_number(reply.weight_version)] * len(reply.output_ids)
    for span in reply.weight_spans:
        stop = min(span.end, len(versions_R))
        if span.start < stop:
            versions_R[span.start : stop] = [version_number(span.version)] * (stop - span.start)
    return versions_R


def join_spans(first: Sequence[WeightSpan], second: Sequence[WeightSpan], offset: int) -> tuple[WeightSpan, ...]:
    """Spans of a response made in two goes, the second beginning at token ``offset``."""
    moved = (WeightSpan(version=s.version, start=s.start + offset, end=s.end + offset) for s in second)
    return (*first, *moved)
