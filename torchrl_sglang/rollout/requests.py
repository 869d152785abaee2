"""Requests for one batch of prompts: overlong prompts are truncated or refused, and errors can be masked per prompt.

Shapes: ``B`` prompts of ``P`` tokens, ``n`` responses each, ``S = B * n`` responses prompt-major.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError, RequestRejectedError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.stop_strings import StopStrings
from torchrl_sglang.rollout.batching import Batcher
from torchrl_sglang.rollout.progress import token_progress
from torchrl_sglang.rollout.prompts import Prompts
from torchrl_sglang.rollout.resuming import generate_resuming
from torchrl_sglang.rollout.unmeasured import find_unmeasured

__all__ = ["Answers", "RequestBatcher", "generate_prompts", "score_sequences", "truncate_left"]

PerPrompt: TypeAlias = tuple[list[GenerateReply], list[int]]
"""The ``n`` replies of one prompt, and how often each was resumed."""
RequestBatcher: TypeAlias = Batcher[list[int], PerPrompt | str]
"""A prompt's result is a text if it can't be served: why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The replies to one batch.

    Attributes:
        prompts: the prompts as they were sent; one with invalid ids is empty.
        replies_S: one reply per sequence; an empty one for a prompt that was not sent.
        resumes_S: how often each response was continued.
        errors_B: per prompt, why it was not served; ``""`` if it was.
    """

    prompts: Prompts
    replies_S: list[GenerateReply]
    resumes_S: list[int]
    errors_B: list[str]


def truncate_left(prompts: Prompts, pool: SGLangPool, sampling: SamplingParams) -> Prompts:
    """Drop the beginning of prompts, so that prompt and ``max_new_tokens`` fit into the servers' context."""
    limits = [pool.max_prompt_tokens]
    if pool.context_length is not None:
        limits.append(pool.context_length - sampling.max_new_tokens)
    room = min((limit for limit in limits if limit is not None), default=None)
    if room is None or room < 1:  # no prompt fits: pool.check() raises that
        return prompts
    return replace(
        prompts,
        ids_B_T=[ids_P[-room:] for ids_P in prompts.ids_B_T],
        dropped_B=[max(0, len(ids_P) - room) for ids_P in prompts.ids_B_T],
    )


def generate_prompts(
    pool: SGLangPool,
    prompts: Prompts,
    sampling: SamplingParams,
    *,
    mask_errors: bool,
    max_resumes: int,
    return_logprobs: bool,
    prompt_logprobs: bool,
    progress: bool,
    batcher: RequestBatcher | None = None,
    stops: Callable[[], StopStrings | None] | None = None,
) -> Answers:
    """Generate ``sampling.n`` responses per prompt.

    Args:
        pool: the servers.
        prompts: the prompts.
        sampling: how tokens are drawn.
        mask_errors: leave out prompts that can't be served, instead of raising.
        max_resumes: how often an aborted response is continued.
        return_logprobs: request response log-probs.
        prompt_logprobs: request prompt log-probs.
        progress: show generated tokens and tokens per second.
        batcher: merges this call with those of other threads.
        stops: returns the stop strings; called if a response was interrupted.

    Raises:
        ConfigError: a prompt can't be served and errors are not masked; it names the batch index.
        ServerError: a server failed, or refused the request for another reason than a prompt; also when errors are
            masked.
    """

    def run(ids_B_P: Sequence[list[int]]) -> list[PerPrompt | str]:
        params = sampling
        if sampling.sampling_mask and sampling.n > 1:  # SGLang 0.5.23 answers 500 to a mask with n > 1
            ids_B_P, params = [ids_P for ids_P in ids_B_P for _ in range(sampling.n)], replace(sampling, n=1)
        lethal: dict[int, str] | None = {} if mask_errors else None
        with token_progress(progress, len(ids_B_P) * params.n * params.max_new_tokens) as advance:
            replies_S, resumes_S = generate_resuming(
                pool,
                ids_B_P,
                params,
                max_resumes=max_resumes,
                return_logprobs=return_logprobs,
                prompt_logprobs=prompt_logprobs,
                progress=advance,
                lethal=lethal,
                stops=stops,
            )
        copies = sampling.n // params.n
        reasons = {index // copies: reason for index, reason in (lethal or {}).items()}
        starts = range(0, len(replies_S), sampling.n)
        return [
            reasons.get(row) or (replies_S[i : i + sampling.n], resumes_S[i : i + sampling.n])
            for row, i in enumerate(starts)
        ]

    problems = _problems(pool, prompts, sampling, mask_errors=mask_errors)
    good = [index for index in range(len(prompts.ids_B_T)) if index not in problems]
    ids_G_P = [prompts.ids_B_T[index] for index in good]
    served: dict[int, PerPrompt] = {}
    if good:
        # Calls that share a request must have equal settings; only these two differ between calls of one policy.
        kind = (sampling, return_logprobs)
        try:
            results: Sequence[Any] = run(ids_G_P) if batcher is None else batcher.submit(ids_G_P, run, kind=kind)
        except RequestRejectedError as error:
            if not mask_errors or not _may_be_a_prompt(error):
                raise
            _refuse_bad_settings(pool, sampling, error)
            results = _isolate_rejected(run, ids_G_P)  # without other callers' prompts
        for index, result in zip(good, results, strict=True):
            if isinstance(result, str):
                problems[index] = result
            else:
                served[index] = result
    unmeasured = find_unmeasured({index: replies for index, (replies, _) in served.items()}, mask_errors=mask_errors)
    problems.update(unmeasured)
    served = {index: each for index, each in served.items() if index not in unmeasured}
    replies_S: list[GenerateReply] = []
    resumes_S: list[int] = []
    for index, ids_P in enumerate(prompts.ids_B_T):
        replies, resumes = served.get(index) or ([_empty_reply(ids_P, prompt_logprobs)] * sampling.n, [0] * sampling.n)
        replies_S.extend(replies)
        resumes_S.extend(resumes)
    errors_B = [problems.get(index, "") for index in range(len(prompts.ids_B_T))]
    return Answers(prompts=prompts, replies_S=replies_S, resumes_S=resumes_S, errors_B=errors_B)


def _empty_reply(ids_P: Sequence[int], prompt_logprobs: bool) -> GenerateReply:
    """The reply of a prompt that was not served."""
    return GenerateReply(
        output_ids=[],
        output_logprobs=[],
        prompt_logprobs=[0.0] * len(ids_P) if prompt_logprobs else None,
        finish_reason="abort",
        prompt_tokens=len(ids_P),
    )


def score_sequences(pool: SGLangPool, prompts: Prompts, *, mask_errors: bool) -> Answers:
    """Log-probs of given sequences, in one request.

    Raises:
        ConfigError: a sequence can't be scored and errors are not masked; it names the batch index.
    """
    sampling = SamplingParams(max_new_tokens=0)
    return generate_prompts(
        pool,
        prompts,
        sampling,
        mask_errors=mask_errors,
        max_resumes=0,
        return_logprobs=True,
        prompt_logprobs=True,
        progress=False,
    )


def _problems(pool: SGLangPool, prompts: Prompts, sampling: SamplingParams, *, mask_errors: bool) -> dict[int, str]:
    """Why prompts can't be sent. A prompt with invalid ids is emptied, so that a trainer never embeds them.

    Raises:
        ConfigError: errors are not masked, or the settings are the reason: not even one token could be sent.
    """
    problems = dict(prompts.problems)
    if problems and not mask_errors:
        index, problem = min(problems.items())
        raise ConfigError(f"batch index {index}: {problem}")
    if not problems:
        try:
            pool.check(prompts.ids_B_T, sampling)
            return problems
        except ConfigError:
            if not mask_errors:
                raise
    try:
        pool.check([[0]], sampling)
    except ConfigError as error:
        raise ConfigError(f"no prompt can be served with these settings: {error}") from None
    for index, ids_P in enumerate(prompts.ids_B_T):
        if index in problems:
            continue
        try:
            pool.check([ids_P], sampling)
        except ConfigError as error:
            problems[index] = str(error).replace("prompt 0", f"prompt {index}", 1)
            vocab_size = pool.vocab_size
            if ids_P and (min(ids_P) < 0 or (vocab_size is not None and max(ids_P) >= vocab_size)):
                prompts.ids_B_T[index] = []
    return problems


# What SGLang answers to a prompt that it can't serve. Keys (401, 403), paths (404), full queues (429, 503) and failures
# (500) are the same for every prompt.
_PROMPT_STATUSES = (400, 413, 422)


def _may_be_a_prompt(error: RequestRejectedError) -> bool:
    return error.status in _PROMPT_STATUSES


def _refuse_bad_settings(pool: SGLangPool, sampling: SamplingParams, error: RequestRejectedError) -> None:
    """Raise ``error`` if a server rejects the settings with the shortest prompt, too: then no prompt is the reason."""
    short = replace(sampling, n=1, max_new_tokens=min(1, sampling.max_new_tokens), min_new_tokens=0)
    try:
        pool.generate([[0]], short, return_logprobs=False)
    except RequestRejectedError:
        raise error from None


def _isolate_rejected(
    run: Callable[[Sequence[list[int]]], Sequence[PerPrompt | str]], ids_B_P: Sequence[list[int]]
) -> list[PerPrompt | str]:
    """Results per prompt: a batch that the server rejects is halved until each rejected prompt is alone."""
    try:
        return list(run(ids_B_P))
    except RequestRejectedError as error:
        if not _may_be_a_prompt(error):
            raise
        if len(ids_B_P) == 1:
            return [str(error)]
    half = len(ids_B_P) // 2
    return [*_isolate_rejected(run, ids_B_P[:half]), *_isolate_rejected(run, ids_B_P[half:])]
