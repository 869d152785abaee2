"""Which answer a retry gets: equal requests that an agent sends side by side keep an answer each."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.agent_kit import Sampled, run, user
from torchrl_sglang.agents.types import ChatRequest
from torchrl_sglang.errors import ServerLostError

ASK = ChatRequest(messages=(user("dog"),))


def text(turn: Any) -> str:
    return str(turn.choices[0].message["content"])


def failing(model: Any, fails: Callable[[int], bool]) -> None:
    """The calls of these numbers find a lost server."""
    answer, numbers = model.answer, itertools.count(1)

    def answers(ids: list[int]) -> Sampled:
        if fails(next(numbers)):
            raise ServerLostError("the server is gone", server="http://scripted")
        return answer(ids)  # type: ignore[no-any-return]

    model.answer = answers


def test_the_retry_of_a_request_that_failed_is_no_retry_of_an_equal_one_that_did_not(numbered: Any) -> None:
    sessions, model = numbered
    failing(model, lambda number: number == 2)
    session = sessions.create()

    async def story() -> list[Any]:
        first, second = await asyncio.gather(session.chat(ASK), session.chat(ASK), return_exceptions=True)
        assert isinstance(second, ServerLostError)
        return [first, await session.chat(replace(ASK, attempt=1))]

    first, retried = run(story())
    assert (text(first), text(retried), retried.is_repeated) == ("1", "2", False)
    assert len(session.trajectories()) == 2


def test_the_retry_of_a_request_that_is_being_aborted_is_no_retry_of_an_equal_one(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create()

    async def story() -> list[Any]:
        first = await session.chat(ASK)
        model.gate = asyncio.Event()
        second = asyncio.ensure_future(session.chat(ASK))
        await asyncio.sleep(0.001)
        second.cancel()
        await asyncio.sleep(0)
        model.gate.set()
        return [first, await session.chat(replace(ASK, attempt=1))]

    first, retried = run(story())
    assert text(first) != text(retried)
    assert not retried.is_repeated


def test_two_equal_requests_that_are_both_sent_again_keep_an_answer_each(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create()

    async def story() -> tuple[list[Any], list[Any]]:
        model.gate = asyncio.Event()
        first = [asyncio.ensure_future(session.chat(ASK)) for _ in range(2)]
        await asyncio.sleep(0)
        again = [asyncio.ensure_future(session.chat(replace(ASK, attempt=1))) for _ in range(2)]
        await asyncio.sleep(0)
        model.gate.set()
        return list(await asyncio.gather(*first)), list(await asyncio.gather(*again))

    first, again = run(story())
    assert sorted(map(text, first)) == sorted(map(text, again)) == ["1", "2"]
    assert all(turn.is_repeated for turn in again)
    assert model.started == 2
    # a further attempt of each gets the same again
    third = [run(session.chat(replace(ASK, attempt=2))) for _ in range(2)]
    assert sorted(map(text, third)) == ["1", "2"]


def test_an_answer_that_was_lost_goes_before_a_request_that_failed(numbered: Any) -> None:
    sessions, model = numbered
    failing(model, lambda number: number == 2)
    session = sessions.create()

    async def story() -> list[Any]:
        lost, failed = await asyncio.gather(session.chat(ASK), session.chat(ASK), return_exceptions=True)
        assert isinstance(failed, ServerLostError)
        session.undelivered(lost)
        return [await session.chat(replace(ASK, attempt=1)) for _ in range(2)]

    again = run(story())
    assert [(text(turn), turn.is_repeated) for turn in again] == [("1", True), ("2", False)]


def test_best_of_n_gets_n_samples_also_when_every_request_fails_first(numbered: Any) -> None:
    sessions, model = numbered
    failing(model, lambda number: number <= 4)
    session = sessions.create()

    async def story() -> list[Any]:
        failed = await asyncio.gather(*[session.chat(ASK) for _ in range(4)], return_exceptions=True)
        assert all(isinstance(error, ServerLostError) for error in failed)
        return [await session.chat(replace(ASK, attempt=1)) for _ in range(4)]

    assert sorted(map(text, run(story()))) == ["1", "2", "3", "4"]
    assert len(session.trajectories()) == 4
