"""Requests that are cancelled, at each point where they wait: the next ones are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

from tests.agent_kit import run
from tests.fake_sglang import FakeServer
from torchrl_sglang.agents.server_calls import ServerCalls
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.protocol.control import build_ready
from torchrl_sglang.protocol.generate import build_generate

HANGS_S = 30.0


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

    assert run(story()) >= 3
