"""One sequence: its tokens, their log-probabilities and weight versions, and why it ended."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from tests.fake_sglang.model import advance, logits_after

__all__ = ["PrefixCache", "Sampling", "Sequence"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling parameters that have an effect; SGLang's other ones are accepted and ignored."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class PrefixCache:
    """The key-value states of known token prefixes, which may have been computed with older weights."""

    def __init__(self) -> None:
        self._states: dict[int, int] = {}

    def clear(self) -> None:
        """Remove everything, as ``/flush_cache`` does."""
        self._states.clear()

    def prefill(self, tokens: list[int], weights: int, *, first: int) -> tuple[list[int], int]:
        """States after each of ``tokens``; up to ``first`` tokens may come from the cache.

        Returns:
            The states, and how many of them came from the cache.
        """
        keys = []
        key = 0
        for token in tokens:
            key = advance(key, token, 0)
            keys.append(key)
        cached = first
        while cached > 0 and keys[cached - 1] not in self._states:
            cached -= 1
        states = [self._states[key] for key in keys[:cached]]
        for token, key in zip(tokens[cached:], keys[cached:], strict=True):
            states.append(advance(states[-1] if states else 0, token, weights))
            self._states.setdefault(key, states[-1])
        return states, cached

    def insert(self, tokens: list[int], states: list[int]) -> None:
        """Store the states of a finished sequence; existing entries are not replaced."""
        key = 0
        for token, state in zip(tokens, states, strict=False):
            key = advance(key, token, 0)
            self._states.setdefault(key, state)


@dataclass(kw_only=True, eq=False)
class Sequence:
    """One sequence. Only the scheduler changes it.

    Attributes:
        prompt: prompt token ids.
        sampling: how to sample.
        rid: request id.
        logprobs: whether the reply has log-probabilities.
        logprob_start: first prompt position with a log-probability; ``None`` for none.
        top_logprobs: how many alternatives to report per token.
        adapter: LoRA adapter name, if any.
        versions: per output token the weight version it was generated with.
        initial_version: version to report if there is no token.
    """

    prompt: list[int]
    sampling: Sampling
    rid: str = field(default_factory=lambda: uuid.uuid4().hex)
    logprobs: bool = False
    logprob_start: int | None = None
    top_logprobs: int = 0
    adapter: str | None = None
    output: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    output_top: list[list[list[Any]]] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    initial_version: str = "default"
    states: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    retractions: int = 0
    finish_reason: dict[str, Any] | None = None
    was_queued_at_end: bool = False
    aborted: bool = False
    created_at: float = field(default_factory=time.monotonic)

    def prefill(self, cache: PrefixCache, weights: int, vocab_size: int) -> None:
        """Compute the states of all tokens so far and, the first time, the prompt's log-probabilities."""
        tokens = self.prompt + self.output
        start = self.logprob_start
        fresh = not self.output and not self.states
        first = len(tokens) - 1 if start is None or not fresh else min(start, len(tokens) - 1)
        self.states, cached = cache.prefill(tokens, weights, first=max(first, 0))
        if not fresh:
            return
        self.cached_tokens = cached
        if start is not None:
            for i in range(start, len(self.prompt)):
                logits = logits_after(self.states[i - 1], weights, vocab_size) if i else None
                self.prompt_logprobs.append(None if logits is None else _logprob(logits, self.prompt[i]))

    def decode(self, weights: int, version: str, vocab_size: int, generator: torch.Generator) -> None:
        """Sample one token."""
        raw = logits_after(self.states[-1], weights, vocab_size)
        greedy = self.sampling.temperature == 0 or self.sampling.top_k == 1
        logits = raw if greedy else raw / self.sampling.temperature
        token = int(logits.argmax()) if greedy else self._sample(logits, generator)
        self.output.append(token)
        self.versions.append(version)
        self.output_logprobs.append(_logprob(logits, token))
        if self.top_logprobs:
            values, ids = torch.log_softmax(logits, -1).topk(self.top_logprobs)
            self.output_top.append([[float(v), int(i), None] for v, i in zip(values, ids, strict=True)])
        self.states.append(advance(self.states[-1], token, weights))

    def _sample(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        probs, ids = torch.softmax(logits, -1).sort(descending=True)
        keep = probs.cumsum(-1) - probs < self.sampling.top_p
        keep &= probs >= self.sampling.min_p * probs[0]
        if self.sampling.top_k > 0:
            keep &= torch.arange(len(probs)) < self.sampling.top_k
        return int(ids[torch.multinomial(probs * keep, 1, generator=generator)])

    def spans(self) -> list[dict[str, Any]]:
        """``weight_versions`` of the reply: which version generated which tokens."""
        if not self.versions:
            return [{"version": self.initial_version, "start": 0, "end": 0}]
        out = []
        start = 0
        for version, run in groupby(self.versions):
            end = start + len(list(run))
            out.append({"version": version, "start": start, "end": end})
            start = end
        return out

    def meta(self, current_version: str) -> dict[str, Any]:
        """``meta_info`` of the reply, with the fields that SGLang sends in each case."""
        spans = self.spans()
        meta: dict[str, Any] = {"id": self.rid, "finish_reason": self.finish_reason, "prompt_tokens": len(self.prompt)}
        meta["weight_version"] = spans[-1]["version"] if self.finish_reason else current_version
        if not self.was_queued_at_end:
            meta["num_retractions"] = self.retractions
        if self.logprobs:
            start = self.logprob_start or 0
            meta["input_token_logprobs"] = [
                [value, self.prompt[start + i], None] for i, value in enumerate(self.prompt_logprobs)
            ]
            meta["output_token_logprobs"] = [
                [value, token, None] for value, token in zip(self.output_logprobs, self.output, strict=True)
            ]
            meta["output_token_logprobs_length"] = len(self.output)
            if self.top_logprobs:
                meta["output_top_logprobs"] = list(self.output_top)
        meta["completion_tokens"] = len(self.output)
        if not self.was_queued_at_end:
            meta["reasoning_tokens"] = 0
            meta["cached_tokens"] = self.cached_tokens
            details = {"device": self.cached_tokens, "host": 0} if self.cached_tokens else None
            meta["cached_tokens_details"] = details
            meta["dp_rank"] = None
        if self.finish_reason is not None:
            meta["weight_versions"] = spans
            meta["e2e_latency"] = time.monotonic() - self.created_at
        return meta


def _logprob(logits: torch.Tensor, token: int) -> float:
    return float(torch.log_softmax(logits, -1)[token])
