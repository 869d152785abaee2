"""A request of ``/completions`` with several prompts: a turn of each, answered together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torchrl_sglang.agents.http.text_reply import TextReply
from torchrl_sglang.agents.session import Session
from torchrl_sglang.agents.types import TextRequest, Turn

__all__ = ["complete_all", "joined_answer"]


async def complete_all(session: Session, requests: Sequence[TextRequest]) -> list[Turn]:
    """The turns of all requests.

    If one fails, or this is cancelled, the others end; those that are finished are kept for the client's retry.

    Raises:
        SGLangError: as :meth:`Session.complete`, of the first request that failed.
    """
    tasks = [asyncio.ensure_future(session.complete(each)) for each in requests]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled() and task.exception() is None:
                session.undelivered(task.result())
        raise


def joined_answer(turns: Sequence[Turn], reply: TextReply) -> dict[str, Any]:
    """The answers of all prompts as one: choices in the order of the prompts, numbers of tokens added up."""
    wholes = [replace(reply).whole(turn) for turn in turns]
    choices = [choice for whole in wholes for choice in whole["choices"]]
    for index, choice in enumerate(choices):
        choice["index"] = index
    numbers = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = {name: sum(whole["usage"][name] for whole in wholes) for name in numbers}
    cached = sum(whole["usage"]["prompt_tokens_details"]["cached_tokens"] for whole in wholes)
    usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return {**wholes[-1], "choices": choices, "usage": usage}
