"""Generation that continues aborted responses from the tokens they have.

Shapes: ``B`` prompts of ``P`` tokens, ``n`` responses each, ``S = B * n`` responses prompt-major.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import LethalPromptError
from torchrl_sglang.parallel import work_through
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.rollout.generation import join_spans

__all__ = ["generate_resuming"]

_MAX_PARALLEL_REQUESTS = 8


class CanGenerate(Protocol):
    """What the rollout needs of a pool of servers."""

    @property
    def max_prompt_tokens(self) -> int | None:
        """Longest prompt, in tokens, that every server accepts."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        return_logprobs: bool = True,
        prompt_logprobs: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[GenerateReply]:
        """``sampling.n`` replies per prompt, prompt-major."""
        ...


def is_resumable(reply: GenerateReply, sampling: SamplingParams) -> bool:
    """Whether an interrupted response can be continued from its tokens.

    A response under a grammar can't: the grammar would restart in the middle.

    Examples:
        >>> cut = GenerateReply(output_ids=[5], finish_reason="abort")
        >>> is_resumable(cut, SamplingParams(max_new_tokens=4))
        True
        >>> is_resumable(cut, SamplingParams(max_new_tokens=4, regex="[a-z]*"))
        False
    """
    grammar = sampling.regex or sampling.json_schema or sampling.ebnf or sampling.structural_tag
    return reply.finish_reason == "abort" and not grammar and len(reply.output_ids) < sampling.max_new_tokens


def generate_resuming(
    pool: CanGenerate,
    prompts_B_P: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    max_resumes: int,
    return_logprobs: bool = True,
    prompt_logprobs: bool = False,
    progress: Callable[[int], None] | None = None,
    lethal: dict[int, str] | None = None,
) -> tuple[list[GenerateReply], list[int]]:
    """Generate, and continue aborted responses; tokens, log-probs and weight versions of all parts are kept.

    Frequency, presence and repetition penalties do not count the tokens of earlier parts.

    Args:
        pool: where to generate.
        prompts_B_P: prompt ids.
        sampling: how tokens are drawn.
        max_resumes: most continuations per response; after that an aborted response is returned as it is.
        return_logprobs: request response log-probs.
        prompt_logprobs: request prompt log-probs.
        progress: called with the number of newly generated tokens.
        lethal: takes the prompts that servers died on, with the reason; their replies are empty. ``None`` raises.

    Returns:
        ``S`` replies, and per reply how often it was continued.
    """
    try:
        replies_S = pool.generate(
            prompts_B_P, sampling, return_logprobs=return_logprobs, prompt_logprobs=prompt_logprobs, progress=progress
        )
    except LethalPromptError as error:
        if lethal is None:
            raise
        lethal.update(error.prompts)
        empty = GenerateReply(output_ids=[], output_logprobs=[])  # not "abort": it is not continued
        replies_S = [r for i in range(len(prompts_B_P)) for r in error.replies.get(i) or [empty] * sampling.n]
    resumes_S = [0] * len(replies_S)
    for _ in range(max_resumes):
        by_room: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for index, reply in enumerate(replies_S):
            prompt_length = len(prompts_B_P[index // sampling.n])
            length = prompt_length + len(reply.output_ids)
            unscored = prompt_logprobs and len(reply.prompt_logprobs or ()) < prompt_length
            # Near the end of the context, prompt and response together are too long to be a prompt.
            if is_resumable(reply, sampling) and length <= (pool.max_prompt_tokens or length):
                by_room[sampling.max_new_tokens - len(reply.output_ids), unscored].append(index)
        if not by_room:
            break

        def continue_group(group: tuple[tuple[int, bool], list[int]]) -> list[GenerateReply]:
            (room, unscored), indices = group
            done = sampling.max_new_tokens - room
            rest = replace(
                sampling, n=1, max_new_tokens=room, min_new_tokens=min(room, max(0, sampling.min_new_tokens - done))
            )
            prompts = [[*prompts_B_P[i // sampling.n], *replies_S[i].output_ids] for i in indices]
            return pool.generate(prompts, rest, return_logprobs=return_logprobs, prompt_logprobs=unscored)

        # Responses that were aborted together mostly have the same length, so these are few requests.
        groups = list(by_room.items())
        calls = [partial(continue_group, group) for group in groups]
        (outcomes,) = work_through([calls], workers=_MAX_PARALLEL_REQUESTS)
        failed = next((outcome for outcome in outcomes if outcome is not None and outcome.error is not None), None)
        if failed is not None:
            failed.unwrap()
        for ((_, unscored), indices), outcome in zip(groups, outcomes, strict=True):
            assert outcome is not None  # all were started, since none failed
            for index, part in zip(indices, outcome.unwrap(), strict=True):
                first = replies_S[index]
                if unscored:  # it was aborted while it waited, before its prompt was computed
                    length = len(prompts_B_P[index // sampling.n])
                    first = replace(first, prompt_logprobs=(part.prompt_logprobs or [])[:length])
                replies_S[index] = _joined(first, part)
                resumes_S[index] += 1
    return replies_S, resumes_S


def _joined(first: GenerateReply, second: GenerateReply) -> GenerateReply:
    scores = None
    if first.output_logprobs is not None and second.output_logprobs is not None:
        scores = [*first.output_logprobs, *second.output_logprobs]
    # A part without tokens, aborted while it waited, has no support.
    parts = [part for part in (first, second) if part.output_ids] or [first]
    supported = all(part.support_ids is not None for part in parts)
    return replace(
        second,
        support_ids=[*(first.support_ids or ()), *(second.support_ids or ())] if supported else None,
        support_logprobs=[*(first.support_logprobs or ()), *(second.support_logprobs or ())] if supported else None,
        output_ids=[*first.output_ids, *second.output_ids],
        output_logprobs=scores,
        prompt_logprobs=first.prompt_logprobs,
        text=first.text + second.text,
        prompt_tokens=first.prompt_tokens,
        completion_tokens=len(first.output_ids) + len(second.output_ids),
        cached_tokens=first.cached_tokens,
        weight_spans=join_spans(first.weight_spans, second.weight_spans, len(first.output_ids)),
        latency_s=first.latency_s + second.latency_s,
    )
