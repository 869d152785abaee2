"""Stop strings that lie across the place where an answer was interrupted and continued, which no server sees whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torchrl_sglang.agents.server_part import Generated

__all__ = ["cut_at_stop"]


def cut_at_stop(
    made: Generated, stops: Sequence[str], *, decode: Callable[[Sequence[int]], str], min_new_tokens: int = 0
) -> Generated:
    """The sequence up to the token that completes a stop string, as a server that had generated all of it would end it.

    Args:
        made: the sequence, which was continued at least once.
        stops: the stop strings.
        decode: the text of tokens.
        min_new_tokens: stop strings that are complete before so many tokens don't count.
    """

    def found(count: int) -> list[tuple[int, str]]:
        text = decode(made.output_ids[:count])
        return [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]

    length = len(made.output_ids)
    if not made.resumes or not stops or not found(length):
        return made
    first = max(1, min_new_tokens)
    low, high = first, length  # the fewest tokens that have a stop string
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle + 1, high)
    if low > length or (low == length and isinstance(made.matched, str)):
        return made
    return replace(
        made,
        output_ids=made.output_ids[:low],
        log_probs=made.log_probs[:low],
        versions=made.versions[:low],
        top_log_probs=made.top_log_probs[:low],
        finish_reason="stop",
        matched=min(found(low))[1],
    )
