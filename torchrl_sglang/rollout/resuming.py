"""Generation that continues aborted responses from the tokens they have.

Shapes: ``B`` prompts of ``P`` tokens, ``n`` responses each, ``S = B * n`` responses prompt-major.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError, LethalPromptError
from torchrl_sglang.parallel import work_through
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.stop_strings import StopStrings
from torchrl_sglang.rollout.generation import join_spans
from torchrl_sglang.text_tokens import decode_ids

__all__ = ["generate_resuming", "stop_strings"]

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
    stops: Callable[[], StopStrings | None] | None = None,
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
        stops: returns the stop strings, which may lie across an interruption; called if a response was interrupted.
            Without it none is looked for.

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
    responses = [
        _Response(prompt=prompts_B_P[index // sampling.n], reply=reply, scores_prompt=prompt_logprobs)
        for index, reply in enumerate(replies_S)
    ]
    resumed = max_resumes > 0 and any(is_resumable(reply, sampling) for reply in replies_S)
    known = stops() if resumed and stops is not None else None
    while True:
        groups: dict[_Part, list[_Response]] = defaultdict(list)
        for response in responses:
            part = response.next_part(sampling, known, max_resumes, pool.max_prompt_tokens)
            if part is not None:
                groups[part].append(response)
        if not groups:
            break

        def continue_group(part: _Part, group: list[_Response]) -> list[GenerateReply]:
            prompts = [[*response.prompt, *response.reply.output_ids] for response in group]
            return pool.generate(
                prompts, part.settings(sampling), return_logprobs=return_logprobs, prompt_logprobs=part.scores_prompt
            )

        # Responses that were aborted together mostly have the same length, so these are few requests.
        calls = [partial(continue_group, part, group) for part, group in groups.items()]
        (outcomes,) = work_through([calls], workers=_MAX_PARALLEL_REQUESTS)
        failed = next((outcome for outcome in outcomes if outcome is not None and outcome.error is not None), None)
        if failed is not None:
            failed.unwrap()
        for (part, group), outcome in zip(groups.items(), outcomes, strict=True):
            assert outcome is not None  # all were started, since none failed
            for response, reply in zip(group, outcome.unwrap(), strict=True):
                response.add(reply, part, known)
    return [response.reply for response in responses], [response.resumes for response in responses]


def stop_strings(sampling: SamplingParams, tokenizer: Callable[[], Any]) -> StopStrings | None:
    """The stop strings of some settings; ``None`` if there are none, or no tokenizer to read a response with.

    Args:
        sampling: how tokens are drawn.
        tokenizer: returns the tokenizer, or raises ``ConfigError``.
    """
    if not (sampling.stop or sampling.stop_regex):
        return None
    try:
        known = tokenizer()
    except ConfigError as error:  # tokens in and tokens out need none
        warnings.warn(
            f"a stop string that lies across an interruption is not found without the tokenizer: {error}", stacklevel=2
        )
        return None
    return StopStrings.of(sampling, lambda ids: decode_ids(known, [ids])[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """How a response is continued; responses that are continued alike share a request.

    Attributes:
        done: number of tokens that are there.
        length: most tokens of the part.
        is_watched: it is short, since a stop string may end in it.
        scores_prompt: whether the prompt's log-probs are missing.
    """

    done: int
    length: int
    is_watched: bool
    scores_prompt: bool

    def settings(self, sampling: SamplingParams) -> SamplingParams:
        least = min(self.length, max(0, sampling.min_new_tokens - self.done))
        return replace(sampling, n=1, max_new_tokens=self.length, min_new_tokens=least)


@dataclass(slots=True, kw_only=True)
class _Response:
    """One response: its prompt, what is there of it, and how often it was interrupted and continued."""

    prompt: Sequence[int]
    reply: GenerateReply
    scores_prompt: bool
    resumes: int = 0
    was_watched: bool = False

    def next_part(
        self, sampling: SamplingParams, stops: StopStrings | None, max_resumes: int, longest: int | None
    ) -> _Part | None:
        """What is to be generated of it; ``None`` if it stays as it is."""
        done = len(self.reply.output_ids)
        if not is_resumable(self.reply, sampling) or (self.resumes >= max_resumes and not self.was_watched):
            return None
        # Near the end of the context, prompt and response together are too long to be a prompt.
        if longest is not None and len(self.prompt) + done > longest:
            return None
        room = sampling.max_new_tokens - done
        watched = 0 if stops is None else stops.tokens_to_watch(self.reply.output_ids)
        return _Part(
            done=done,
            length=min(room, watched or room),
            is_watched=0 < watched < room,
            scores_prompt=self.scores_prompt and len(self.reply.prompt_logprobs or ()) < len(self.prompt),
        )

    def add(self, reply: GenerateReply, part: _Part, stops: StopStrings | None) -> None:
        """Add what was generated."""
        first = self.reply
        if part.scores_prompt:  # it was aborted while it waited, before its prompt was computed
            first = replace(first, prompt_logprobs=(reply.prompt_logprobs or [])[: len(self.prompt)])
        self.reply = _joined(first, reply)
        self.resumes += not self.was_watched
        self.was_watched = False
        if stops is None:
            return
        found = stops.find(self.reply.output_ids)
        if found is not None and not (isinstance(reply.matched, str) and found[0] == len(self.reply.output_ids)):
            self.reply = _cut(self.reply, *found, stops)
        elif part.is_watched and reply.finish_reason == "length" and len(reply.output_ids) == part.length:
            self.reply = replace(self.reply, finish_reason="abort")  # it goes on
            self.was_watched = True


def _cut(reply: GenerateReply, length: int, stop: str, stops: StopStrings) -> GenerateReply:
    """The response up to the token that completes a stop string, as a server that had generated all would end it."""
    text = stops.decode(reply.output_ids[:length])
    return replace(
        reply,
        output_ids=reply.output_ids[:length],
        output_logprobs=None if reply.output_logprobs is None else reply.output_logprobs[:length],
        support_ids=None if reply.support_ids is None else reply.support_ids[:length],
        support_logprobs=None if reply.support_logprobs is None else reply.support_logprobs[:length],
        weight_spans=tuple(
            replace(span, end=min(span.end, length)) for span in reply.weight_spans if span.start < length
        ),
        completion_tokens=length,
        text=text.partition(stop)[0],
        finish_reason="stop",
        matched=stop,
    )


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
