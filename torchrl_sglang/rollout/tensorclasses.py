"""Replies as TorchRL's TensorClasses, one row per sequence, ragged or padded.

Shapes: ``B`` prompts, ``n`` responses each, ``S = B * n`` sequences prompt-major; ``P`` prompt, ``R`` response tokens.
Ragged values are one tensor per sequence. Padded ones are dense: prompts padded on the left, responses on the right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, MetaData, NonTensorData, TensorDict, TensorDictBase
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, LogProbs, Masks, Text, Tokens

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.version import version_number
from torchrl_sglang.rollout.generation import NO_ID, NO_TOKEN, Generation, token_versions

__all__ = [
    "Padding",
    "chat_rows",
    "first_zero",
    "generation_rows",
    "sampled_row",
    "stack_rows",
    "text_rows",
    "to_rows",
    "token_rows",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """How the tensors of a batch are padded.

    Attributes:
        enabled: all rows have one width, so that they stack to a dense tensor.
        value: token id at padding positions; log-probs are 0 there, masks ``False``.
        prompt_width: smallest padded width of the prompts: that of the tensor they were read from.
    """

    enabled: bool
    value: int = 0
    prompt_width: int = 0


def _ragged(values_S_T: Sequence[Sequence[Any]], dtype: torch.dtype) -> list[torch.Tensor]:
    """One tensor per sequence, each with its own storage: a row in a replay buffer must not keep its batch alive."""
    flat = torch.tensor(list(chain.from_iterable(values_S_T)), dtype=dtype)
    return [row.clone() for row in flat.split([len(v) for v in values_S_T])]  # type: ignore[no-untyped-call]


def _padded(
    values_S_T: Sequence[Sequence[Any]], dtype: torch.dtype, fill: Any, side: str, width: int = 0
) -> list[torch.Tensor]:
    width = max(width, max((len(v) for v in values_S_T), default=0))
    rows: list[list[Any]] = []
    for v in values_S_T:
        gap = [fill] * (width - len(v))
        rows.append([*gap, *v] if side == "left" else [*v, *gap])
    return list(torch.tensor(rows, dtype=dtype).reshape(len(rows), width).unbind(0))


def to_rows(
    values_S_T: Sequence[Sequence[Any]], dtype: torch.dtype, padding: Padding, fill: Any, side: str
) -> list[torch.Tensor]:
    """One tensor per sequence: of its own length, or all of one width, filled with ``fill`` on ``side``."""
    if not padding.enabled:
        return _ragged(values_S_T, dtype)
    return _padded(values_S_T, dtype, fill, side, padding.prompt_width if side == "left" else 0)


def token_rows(
    prompts_S_P: Sequence[Sequence[int]],
    replies_S: Sequence[GenerateReply],
    padding: Padding,
    *,
    log_probs: bool,
    full_log_probs: bool,
) -> list[dict[str, Any]]:
    """``tokens``, ``masks`` and ``log_probs`` of every generated sequence.

    ``LogProbs.full`` has the length of ``Tokens.full``. Without prompt log-probs in the reply, its prompt part is NaN
    (0 would mean probability 1), which TorchRL's losses mask.

    Args:
        prompts_S_P: prompt ids, one entry per reply.
        replies_S: the servers' replies.
        padding: dense or ragged.
        log_probs: write ``log_probs``.
        full_log_probs: also write ``LogProbs.full``.

    Returns:
        One dictionary per sequence: ``tokens`` (int64), ``masks`` (bool), ``log_probs`` (float32).
    """
    mark = MetaData(padding.enabled)
    responses_S_R = [reply.output_ids for reply in replies_S]
    prompt = to_rows(prompts_S_P, torch.long, padding, padding.value, "left")
    response = to_rows(responses_S_R, torch.long, padding, padding.value, "right")
    attended = to_rows([[True] * len(p) for p in prompts_S_P], torch.bool, padding, False, "left")
    answered = to_rows([[True] * len(r) for r in responses_S_R], torch.bool, padding, False, "right")
    rows: list[dict[str, Any]] = [
        {
            "tokens": _made(Tokens, prompt=p, response=r, full=torch.cat([p, r]), padded=mark),
            "masks": _made(
                Masks,
                all_attention_mask=torch.cat([a, m]),
                all_assistant_mask=torch.cat([torch.zeros_like(a), m]),
                padded=mark,
            ),
        }
        for p, r, a, m in zip(prompt, response, attended, answered, strict=True)
    ]
    if log_probs:
        lengths_S = [len(ids_P) for ids_P in prompts_S_P]
        scored = _log_prob_rows(prompt, lengths_S, replies_S, padding, full=full_log_probs)
        for row, scores in zip(rows, scored, strict=True):
            row["log_probs"] = scores
    return rows


def _log_prob_rows(
    prompt: Sequence[torch.Tensor],
    lengths_S: Sequence[int],
    replies_S: Sequence[GenerateReply],
    padding: Padding,
    *,
    full: bool,
) -> list[LogProbs]:
    mark = MetaData(padding.enabled)
    scores_S = [r.support_logprobs if r.support_logprobs is not None else r.output_logprobs or [] for r in replies_S]
    response = to_rows(scores_S, torch.float32, padding, 0.0, "right")
    known = [r.prompt_logprobs for r in replies_S]
    before: list[torch.Tensor] | None = None
    if all(scores is not None for scores in known):
        # A response that was aborted while it waited has none yet.
        filled = [[*(s or [None]), *[math.nan] * n][:n] for s, n in zip(known, lengths_S, strict=True)]
        before = to_rows(list(map(first_zero, filled)), torch.float32, padding, 0.0, "left")
    rows = []
    for index, (p, r) in enumerate(zip(prompt, response, strict=True)):
        fields = {"response": r, "padded": mark}
        if before is not None:
            fields["prompt"] = before[index]
        if full:
            unknown = torch.full(p.shape, float("nan"))
            fields["full"] = torch.cat([fields.get("prompt", unknown), r])
        rows.append(_made(LogProbs, **fields))
    return rows


def _made(kind: Any, **fields: Any) -> Any:
    """One row of a TensorClass. Its constructor takes three times as long, which counts with hundreds of rows."""
    return kind._from_tensordict(TensorDict(fields))


def first_zero(scores_P: Sequence[float | None]) -> list[float]:
    """The first token has no log-prob, since it is conditioned on nothing; TorchRL's wrappers write 0 for it."""
    first = [0.0 if s is None else s for s in scores_P[:1]]
    return first + [math.nan if s is None else s for s in scores_P[1:]]


def text_rows(prompts_S: Sequence[str], responses_S: Sequence[str], fulls_S: Sequence[str]) -> list[Text]:
    """``Text`` of every sequence."""
    return [
        _made(Text, prompt=NonTensorData(p), response=NonTensorData(r), full=NonTensorData(f))
        for p, r, f in zip(prompts_S, responses_S, fulls_S, strict=True)
    ]


def chat_rows(prompts_S: Sequence[History], contents_S: Sequence[str], complete_S: Sequence[bool]) -> list[ChatHistory]:
    """``ChatHistory`` of every sequence: the prompt's messages, the assistant's answer, and both.

    Args:
        prompts_S: conversations of shape ``(messages,)``.
        contents_S: the assistant's answers, without the token that ended them.
        complete_S: whether the answer ended by itself.
    """
    rows = []
    for prompt, content, complete in zip(prompts_S, contents_S, complete_S, strict=True):
        message = TensorDict(
            {
                "role": NonTensorData("assistant"),
                "content": NonTensorData(content),
                "is_complete": NonTensorData(complete),
            }
        )
        answer = History._from_tensordict(LazyStackedTensorDict(message, stack_dim=0))
        messages = [*prompt._tensordict.unbind(0), message]
        full = History._from_tensordict(LazyStackedTensorDict(*messages, stack_dim=0))
        rows.append(_made(ChatHistory, prompt=prompt, response=answer, full=full))
    return rows


def generation_rows(
    replies_S: Sequence[GenerateReply],
    sampling: SamplingParams,
    padding: Padding,
    *,
    dropped_S: Sequence[int],
    resumes_S: Sequence[int],
    errors_S: Sequence[str],
) -> list[Generation]:
    """:class:`Generation` of every sequence."""
    count = len(replies_S)
    versions_S_R = [token_versions(r) for r in replies_S]
    oldest = [min(v, default=version_number(r.weight_version)) for v, r in zip(versions_S_R, replies_S, strict=True)]
    exact = [not sampling.truncates or r.support_ids is not None for r in replies_S]
    reasons = ["error" if e else r.finish_reason for r, e in zip(replies_S, errors_S, strict=True)]
    columns: dict[str, Sequence[Any]] = {
        "weight_version": to_rows(versions_S_R, torch.long, padding, NO_TOKEN, "right"),
        "policy_version": torch.tensor(oldest).unbind(0),
        "truncated": torch.tensor([r.finish_reason != "stop" for r in replies_S]).unbind(0),
        "prompt_tokens": torch.tensor([r.prompt_tokens for r in replies_S]).unbind(0),
        "completion_tokens": torch.tensor([r.completion_tokens for r in replies_S]).unbind(0),
        "cached_tokens": torch.tensor([r.cached_tokens for r in replies_S]).unbind(0),
        "dropped_tokens": torch.tensor(dropped_S).unbind(0),
        "resumes": torch.tensor(resumes_S).unbind(0),
        "latency_s": torch.tensor([r.latency_s for r in replies_S], dtype=torch.float32).unbind(0),
        # One element per row: with a shared tensor, an in-place change of one row would change all rows.
        "temperature": torch.full((count,), 0.0 if sampling.is_greedy else float(sampling.temperature)).unbind(0),
        "top_p": torch.full((count,), float(sampling.top_p)).unbind(0),
        "top_k": torch.full((count,), sampling.top_k).unbind(0),
        "min_p": torch.full((count,), float(sampling.min_p)).unbind(0),
        "exact_log_probs": torch.tensor(exact).unbind(0),
        "finish_reason": _non_tensors(reasons),
        "matched": _non_tensors([r.matched for r in replies_S]),
        "server": _non_tensors([r.server for r in replies_S]),
        "error": _non_tensors(errors_S),
    }
    if sampling.sampling_mask:
        columns["support"] = _support_rows(replies_S, padding)
    names = tuple(columns)
    return [_made(Generation, **dict(zip(names, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _support_rows(replies_S: Sequence[GenerateReply], padding: Padding) -> list[torch.Tensor]:
    """``(R, K)`` ids per sequence, filled with -1 where a token was chosen among fewer than ``K``."""
    supports_S = [r.support_ids or [] for r in replies_S]
    widest = max((len(ids_K) for rows in supports_S for ids_K in rows), default=0)
    longest = max(map(len, supports_S), default=0)
    made = []
    for rows in supports_S:
        K = widest if padding.enabled else max(map(len, rows), default=0)
        R = longest if padding.enabled else len(rows)
        filled = [[*ids_K, *[NO_ID] * (K - len(ids_K))] for ids_K in rows] + [[NO_ID] * K] * (R - len(rows))
        made.append(torch.tensor(filled, dtype=torch.long).reshape(R, K))
    return made


def _non_tensors(values_S: Sequence[Any]) -> list[NonTensorData]:
    """Non-tensor entries; equal values share one object, since few differ."""
    shared = {value: NonTensorData(value) for value in set(values_S)}
    return [shared[value] for value in values_S]


def sampled_row(
    ids_T: Sequence[int],
    *,
    prompt_length: int,
    trained_T: Sequence[bool],
    log_probs_T: Sequence[float],
    versions_T: Sequence[int],
    temperature: float,
    exact: bool,
    finish_reason: str,
    texts: tuple[str, str],
) -> dict[str, Any]:
    """One ragged row of a sequence in which sampled tokens alternate with others: a conversation of several turns.

    Args:
        ids_T: all tokens.
        prompt_length: number of tokens before the first one that is trained on.
        trained_T: which tokens were sampled and are trained on.
        log_probs_T: natural-log probability of those, NaN for the others.
        versions_T: the weights that sampled those, -1 for the others.
        temperature: the temperature at which they were sampled; NaN if it was not the same for all, or is unknown.
        exact: whether the log-probs are those of the distribution that the tokens were drawn from.
        finish_reason: ``"stop"`` or ``"length"``.
        texts: texts of prompt and response.

    Returns:
        ``tokens``, ``masks``, ``log_probs``, ``text`` and ``generation``.
    """
    mark, full = MetaData(False), torch.tensor(ids_T, dtype=torch.long)
    trained, scores = torch.tensor(trained_T), torch.tensor(log_probs_T, dtype=torch.float32)
    versions = torch.tensor(versions_T, dtype=torch.long)
    prompt, response = slice(0, prompt_length), slice(prompt_length, None)
    unknown = torch.tensor(math.nan)
    generation = {
        "finish_reason": NonTensorData(finish_reason),
        "matched": NonTensorData(None),
        "truncated": torch.tensor(finish_reason == "length"),
        "prompt_tokens": torch.tensor(prompt_length),
        "completion_tokens": trained.sum(),
        "cached_tokens": torch.tensor(0),
        "dropped_tokens": torch.tensor(0),
        "resumes": torch.tensor(0),
        "weight_version": versions[response].clone(),
        "policy_version": versions[trained].min(),
        "temperature": torch.tensor(temperature),
        "top_p": torch.tensor(1.0) if exact else unknown,
        "top_k": torch.tensor(-1),
        "min_p": torch.tensor(0.0) if exact else unknown.clone(),
        "exact_log_probs": torch.tensor(exact),
        "server": NonTensorData(""),
        "latency_s": torch.tensor(0.0),
        "error": NonTensorData(""),
    }
    return {
        "tokens": _made(Tokens, prompt=full[prompt].clone(), response=full[response].clone(), full=full, padded=mark),
        "masks": _made(Masks, all_attention_mask=torch.ones_like(trained), all_assistant_mask=trained, padded=mark),
        "log_probs": _made(
            LogProbs, prompt=scores[prompt].clone(), response=scores[response].clone(), full=scores, padded=mark
        ),
        "text": text_rows(texts[:1], texts[1:], ["".join(texts)])[0],
        "generation": _made(Generation, **generation),
    }


def stack_rows(rows: Sequence[TensorDictBase], shape: Sequence[int]) -> TensorDictBase:
    """Rows as one lazily stacked TensorDict of batch shape ``shape``."""
    if not shape:
        return rows[0]
    if len(shape) == 1:
        return LazyStackedTensorDict(*rows, stack_dim=0)
    step = len(rows) // shape[0]
    parts = [stack_rows(rows[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]
    return LazyStackedTensorDict(*parts, stack_dim=0)
