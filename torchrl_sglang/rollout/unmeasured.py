"""Responses whose log-probs are NaN: they can't be trained on, and 0 would mean certainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torchrl_sglang.errors import ServerError
from torchrl_sglang.protocol.messages import GenerateReply

__all__ = ["find_unmeasured"]


def find_unmeasured(replies: Mapping[int, Sequence[GenerateReply]], *, mask_errors: bool) -> dict[int, str]:
    """Prompts of which a log-prob is NaN.

    Args:
        replies: per batch index, the replies to this prompt.
        mask_errors: return what is wrong, instead of raising; unless it is so for every one of several prompts.

    Returns:
        Per batch index, what is wrong.

    Raises:
        ServerError: names the first of them.
    """
    found = {index: problem for index, each in replies.items() if (problem := _first_problem(each))}
    if found and (not mask_errors or len(found) == len(replies) > 1):
        index = min(found)
        raise ServerError(f"batch index {index}: {found[index]}", server=replies[index][0].server)
    return found


def _first_problem(replies: Sequence[GenerateReply]) -> str:
    return next((problem for reply in replies if (problem := _problem(reply))), "")


def _problem(reply: GenerateReply) -> str:
    for what, values in (
        ("response", reply.output_logprobs),
        ("response", reply.support_logprobs),
        ("prompt", (reply.prompt_logprobs or [])[1:]),
    ):
        at = next((i for i, value in enumerate(values or ()) if value is None or not math.isfinite(value)), None)
        if at is not None:
            position = at + (what == "prompt")
            return (
                f"{reply.server} computed no finite log-prob for token {position} of the {what}: its logits are NaN or "
                "infinite there. Do the weights hold NaN, or do values overflow in the server's dtype?"
            )
    return ""
