"""A request that is cancelled at the moment at which its turn is recorded, or at its deadline."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from tests.agent_kit import run, says, scripted, user
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang.agents.generation import _Deadline
from torchrl_sglang.agents.http.chat_reply import ChatReply
from torchrl_sglang.agents.http.chunk_writer import ChunkWriter
from torchrl_sglang.agents.http.event_stream import event_stream
from torchrl_sglang.agents.http.running_turn import RunningTurn
from torchrl_sglang.agents.types import ChatRequest, OnProgress


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


@pytest.mark.parametrize("cancels_first", [False, True])
def test_an_answer_is_kept_for_the_next_equal_request_at_whichever_step_the_first_is_cancelled(
    cancels_first: bool,
) -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["ChatML"].source)
    sessions, _ = scripted(tokenizer, lambda _: says(tokenizer, "It is 5.", "<|im_end|>"))
    request = ChatRequest(messages=(user("2 + 3?"),), sampling={"max_new_tokens": 20})

    async def story(step: int) -> tuple[bool, int]:
        session = sessions.create()

        async def cancel() -> None:
            for _ in range(step):
                await asyncio.sleep(0)
            turn.cancel()

        def ask() -> asyncio.Task[Any]:
            return asyncio.ensure_future(session.chat(request))

        if cancels_first:
            canceller = asyncio.ensure_future(cancel())
            turn = ask()
        else:
            turn = ask()
            canceller = asyncio.ensure_future(cancel())
        await asyncio.wait({turn, canceller})
        while session.info().in_flight:
            await asyncio.sleep(0)
        recorded = session.info().turns
        again = await session.chat(request)
        assert again.is_repeated == (turn.cancelled() and recorded == 1)
        return turn.cancelled(), recorded

    outcomes = []
    for step in range(100):
        outcomes.append(run(story(step)))
        if not outcomes[-1][0]:
            break
    assert (True, 0) in outcomes  # cancelled in time
    assert (True, 1) in outcomes  # as it was recorded
    assert outcomes[-1] == (False, 1)


def test_an_answer_that_another_request_takes_is_not_kept_for_a_third() -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["ChatML"].source)
    sessions, _ = scripted(tokenizer, lambda _: says(tokenizer, "It is 5.", "<|im_end|>"))
    request = ChatRequest(messages=(user("2 + 3?"),), sampling={"max_new_tokens": 20})

    async def story() -> None:
        session = sessions.create()
        turn = asyncio.ensure_future(session.chat(request))
        await asyncio.sleep(0)
        retry = asyncio.ensure_future(session.chat(replace(request, attempt=1)))
        while not session.info().turns:
            await asyncio.sleep(0)
        turn.cancel()
        await asyncio.wait({turn, retry})
        assert turn.cancelled()
        assert retry.result().is_repeated
        assert not (await session.chat(request)).is_repeated

    run(story())


def test_a_stream_that_the_client_leaves_before_it_begins_loses_no_answer() -> None:
    writer = ChunkWriter(ChatReply(id="c", created=0, model="m", texts=None), include_usage=False)

    async def story(step: int) -> tuple[bool, bool]:
        """Whether the client was seen to leave, and whether the turn was finished."""
        undelivered: list[Any] = []
        made: list[Any] = []

        async def receive() -> dict[str, Any]:
            for _ in range(step):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def generate(_report: OnProgress) -> Any:
            for _ in range(5):
                await asyncio.sleep(0)
            made.append("the turn")
            return made[0]

        request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
        try:
            await event_stream(request, RunningTurn(generate), writer, undelivered=undelivered.append)
        except ClientDisconnect:
            assert undelivered == made
            return True, bool(made)
        assert not undelivered  # the response sees to it
        return False, bool(made)

    outcomes = [run(story(step)) for step in range(12)]
    assert {(True, False), (True, True), (False, True)} == set(outcomes)


@pytest.mark.parametrize(
    "also_cancelled",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not count cancellations"),
        ),
    ],
)
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
