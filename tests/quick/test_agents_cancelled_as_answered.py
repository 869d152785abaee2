"""A request that is cancelled at the moment at which its turn is recorded, or at its deadline."""

from __future__ import annotations

import asyncio

import pytest

from tests.agent_kit import run, says, scripted, user
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang.agents.generation import _Deadline
from torchrl_sglang.agents.types import ChatRequest


def test_an_answer_that_nobody_took_is_given_to_the_next_equal_request() -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["ChatML"].source)
    sessions, _ = scripted(tokenizer, lambda _: says(tokenizer, "It is 5.", "<|im_end|>"))
    request = ChatRequest(messages=(user("2 + 3?"),), sampling={"max_new_tokens": 20})

    async def story() -> None:
        session = sessions.create()
        turn = asyncio.ensure_future(session.chat(request))
        while not session.info().turns:
            await asyncio.sleep(0)
        assert not turn.done()  # the turn is recorded, and whoever asked has not been told yet
        turn.cancel()
        await asyncio.wait({turn})
        assert turn.cancelled()
        assert (await session.chat(request)).is_repeated
        assert not (await session.chat(request)).is_repeated  # once

    run(story())


@pytest.mark.parametrize("also_cancelled", [False, True])
def test_a_deadline_tells_its_own_cancellation_from_that_of_others(also_cancelled: bool) -> None:
    async def story() -> None:
        caught: list[bool] = []

        async def work() -> None:
            deadline = _Deadline(0.0)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                caught.append(deadline.was_the_cause())
            finally:
                deadline.cancel()

        task = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        if also_cancelled:
            task.cancel()
        await task
        assert caught == [not also_cancelled]

    run(story())
