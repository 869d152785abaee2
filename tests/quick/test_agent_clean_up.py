"""Runs that are given up, however often and whenever: no session is left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import AgentGateway
from torchrl_sglang.agents.collector.clean_up import until_done
from torchrl_sglang.agents.collector.rewards import Reward
from torchrl_sglang.agents.collector.session_runs import SessionRuns
from torchrl_sglang.agents.collector.task_stream import NumberedTask


@pytest.fixture(scope="module")
def gateway(tiny_llama: Path) -> Iterator[AgentGateway]:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server, AgentGateway(server.url) as gateway:
        yield gateway


@pytest.mark.parametrize("call", ["create_session", "delete"])
@pytest.mark.parametrize("num_cancels", [1, 2])
def test_a_run_that_is_given_up_while_the_gateway_works_for_it_leaves_no_session(
    gateway: AgentGateway, monkeypatch: pytest.MonkeyPatch, call: str, num_cancels: int
) -> None:
    entered, may_go_on = threading.Event(), threading.Event()
    of_gateway = getattr(gateway, call)

    def held(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert may_go_on.wait(30)
        return of_gateway(*args, **kwargs)

    monkeypatch.setattr(gateway, call, held)

    async def agent(task: Any, base_url: str, api_key: str) -> Reward:
        return Reward(value=1.0)

    async def story() -> None:
        run = asyncio.ensure_future(SessionRuns(gateway, agent, timeout_s=30).run(NumberedTask(0, "task"), 0))
        assert await asyncio.to_thread(entered.wait, 30)
        for _ in range(num_cancels):
            run.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
        assert not run.done(), "it waits for the gateway"
        may_go_on.set()
        await asyncio.wait({run})
        assert run.cancelled()
        assert gateway.list_sessions() == []

    asyncio.run(story())


def test_waiting_for_a_clean_up_cancels_none_of_it_and_marks_errors_as_seen() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        complaints: list[Any] = []
        loop.set_exception_handler(lambda _loop, context: complaints.append(context))
        first, second = loop.create_future(), loop.create_future()
        waiting = asyncio.ensure_future(until_done([first, second]))
        for _ in range(3):
            await asyncio.sleep(0)
            waiting.cancel()
        first.set_exception(ValueError("no"))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not waiting.done()
        second.set_result(None)
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        del first
        assert complaints == []

    asyncio.run(story())
