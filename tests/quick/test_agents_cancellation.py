"""Requests that are cancelled, at each point where they wait: the next ones are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.agent_kit import run, user
from tests.fake_sglang import FakeServer
from torchrl_sglang.agents.served_model import ServedModel
from torchrl_sglang.agents.server_calls import ServerCalls
from torchrl_sglang.agents.sessions import Sessions
from torchrl_sglang.agents.settings import SessionSettings
from torchrl_sglang.agents.slots import ServerSlots
from torchrl_sglang.agents.types import ChatRequest
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import SGLangError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_ready
from torchrl_sglang.protocol.generate import build_generate

HANGS_S = 30.0


@contextmanager
def pool_of(server: FakeServer) -> Iterator[SGLangPool]:
    pool = SGLangPool([SGLangClient(server.url)])
    pool.connect()
    try:
        yield pool
    finally:
        pool.close()


class CancelledAt:
    """Awaits a coroutine, and cancels the task at some of the points where the coroutine waits, counted from 1."""

    def __init__(self, work: Coroutine[Any, Any, Any], points: range) -> None:
        self._work, self._points = work, points

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._work.__await__()
        error: BaseException | None = None
        point = 0
        while True:
            try:
                waits_for = steps.send(None) if error is None else steps.throw(error)
            except StopIteration as end:
                return end.value
            point += 1
            task = asyncio.current_task()
            if point in self._points and task is not None:
                task.cancel()
            try:
                error = None
                yield waits_for
            except BaseException as thrown:  # noqa: BLE001  the coroutine gets it
                error = thrown


async def was_cancelled(work: Coroutine[Any, Any, Any], points: range) -> bool:
    async def drive() -> None:
        await CancelledAt(work, points)

    task = asyncio.ensure_future(drive())
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()
    return task.cancelled()


async def sends(calls: ServerCalls) -> None:
    await calls.send(build_ready())


async def streams(calls: ServerCalls) -> None:
    sampling = SamplingParams(max_new_tokens=2, ignore_eos=True)
    async for _ in calls.stream(build_generate([[1, 2, 3]], sampling, stream=True, request_ids=["a"])):
        pass


async def leaves_early(calls: ServerCalls) -> None:
    sampling = SamplingParams(max_new_tokens=2, ignore_eos=True)
    events = calls.stream(build_generate([[1, 2, 3]], sampling, stream=True, request_ids=["a"]))
    await anext(events)
    await events.aclose()


@pytest.mark.parametrize("num_cancels", [1, 2])
@pytest.mark.parametrize("has_connection", [False, True])
@pytest.mark.parametrize("request_of", [sends, streams, leaves_early])
def test_after_a_request_was_cancelled_at_any_point_the_next_is_answered(
    fake: FakeServer,
    request_of: Callable[[ServerCalls], Coroutine[Any, Any, None]],
    has_connection: bool,
    num_cancels: int,
) -> None:
    async def story() -> int:
        point = 1
        while True:
            calls = ServerCalls(SGLangClient(fake.url))
            if has_connection:
                await sends(calls)
            cancelled = await was_cancelled(request_of(calls), range(point, point + num_cancels))
            await asyncio.wait_for(sends(calls), HANGS_S)
            await calls.close()
            if not cancelled:
                return point - 1
            point += 1

    assert run(story()) >= 1


def test_a_turn_that_waits_for_a_place_can_be_cancelled_when_it_gets_one(fake: FakeServer) -> None:
    async def story() -> None:
        with pool_of(fake) as pool:
            slots = ServerSlots(pool, max_in_flight=1, max_waiting=2, no_server_wait_s=60)

            async def hold() -> None:
                async with slots.take(None):
                    await asyncio.Event().wait()

            holder, waiting, next_one = (asyncio.ensure_future(hold()) for _ in range(3))
            while slots.waiting < 2:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            holder.add_done_callback(lambda _holder: waiting.cancel())
            holder.cancel()
            await asyncio.wait({waiting}, timeout=HANGS_S)
            assert waiting.cancelled()
            while slots.waiting:
                await asyncio.sleep(0)
            assert slots.in_flight == 1
            next_one.cancel()
            await asyncio.wait({next_one})
            assert slots.in_flight == 0

    run(story())


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("way", ["cancelled", "rewarded", "deleted"])
def test_a_turn_that_is_ended_as_its_answer_comes_is_not_recorded(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, way: str, n: int
) -> None:
    async def story() -> None:
        with pool_of(fake) as pool:
            sessions = Sessions(ServedModel(pool, settings=SessionSettings()))
            session = sessions.create()
            answers: list[str] = []

            def end(versions: object, server: str) -> None:  # called when an answer has been checked
                answers.append(server)
                if len(answers) < n:
                    return
                if way == "cancelled":
                    turn.cancel()
                elif way == "rewarded":
                    session.reward(1.0)
                else:
                    session.close()

            monkeypatch.setattr(pool.state, "replies_seen", end)
            request = ChatRequest(messages=(user("dog"),), sampling={"max_new_tokens": 4, "ignore_eos": True, "n": n})
            turn = asyncio.ensure_future(session.chat(request))
            await asyncio.wait({turn})
            assert len(answers) == n
            assert turn.cancelled() if way == "cancelled" else isinstance(turn.exception(), SGLangError)
            while session.info().in_flight:
                await asyncio.sleep(0)
            assert session.trajectories() == []
            await sessions.close()

    run(story())
