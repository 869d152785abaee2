"""Waits for the gateway have an end: the gateway closes, its event loop is blocked, or no session becomes free."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang import AgentCollector, AgentGateway, SessionSettings
from torchrl_sglang.agents.collector.failures import RunFailure
from torchrl_sglang.agents.collector.session_runs import SessionRuns
from torchrl_sglang.agents.collector.task_stream import NumberedTask
from torchrl_sglang.agents.http.server_thread import ServerThread
from torchrl_sglang.errors import ConfigError, OverloadedError, ServerTimeoutError, SGLangError


@pytest.fixture
def thread() -> Any:
    async def application() -> tuple[Any, Any]:
        async def end() -> None:
            """Nothing is open."""

        return (lambda *_: None), end

    server = ServerThread(application, host="127.0.0.1", port=0)
    server.start()
    yield server
    server.stop()


def test_a_call_ends_when_the_gateway_is_closed(thread: ServerThread) -> None:
    begun, errors = threading.Event(), []

    async def forever() -> None:
        begun.set()
        await asyncio.Event().wait()

    def call() -> None:
        try:
            thread.call(forever)
        except RuntimeError as error:
            errors.append(str(error))

    caller = threading.Thread(target=call)
    caller.start()
    assert begun.wait(30)
    thread.stop()
    caller.join(30)
    assert not caller.is_alive()
    assert errors == ["the gateway was closed while this call waited for it"]


def test_a_call_to_a_blocked_event_loop_ends_with_an_error(thread: ServerThread) -> None:
    free, begun = threading.Event(), threading.Event()

    async def block() -> None:
        begun.set()
        free.wait(60)

    async def quick() -> int:
        return 1

    blocking = threading.Thread(target=thread.call, args=[block])
    blocking.start()
    assert begun.wait(30)
    with pytest.raises(ServerTimeoutError, match="did not answer within 0.3 s.*process of its own"):
        thread.call(quick, timeout_s=0.3)
    free.set()
    blocking.join(30)
    assert thread.call(quick) == 1


class FullGateway:
    """A gateway that has no room for sessions."""

    def create_session(self, **_: Any) -> Any:
        raise OverloadedError("there are 3 sessions, as many as may be (max_sessions)", retry_after_s=0.01)


def test_a_run_for_which_no_session_becomes_free_fails() -> None:

    async def agent(*_: Any) -> None:
        raise AssertionError("it has no session")

    runs = SessionRuns(FullGateway(), agent, timeout_s=0.1, grace_s=0.0)  # type: ignore[arg-type]
    failure = asyncio.run(asyncio.wait_for(runs.run(NumberedTask(number=3, task="t"), 1), 60))
    assert isinstance(failure, RunFailure)
    assert (failure.kind, failure.group_id, failure.member, failure.session) == ("gateway", 3, 1, "")
    assert "max_sessions" in failure.message
    assert "delete those that nobody uses" in failure.message


@pytest.mark.parametrize("name", ["session_timeout_s", "no_server_wait_s", "turn_timeout_s"])
def test_time_limits_of_all_sizes_are_taken_or_refused_with_their_name(name: str) -> None:
    assert getattr(SessionSettings(**{name: 9e8}), name) == 9e8
    for bad in (float("inf"), float("nan"), 1e10, 0, -1, "5", True):
        with pytest.raises(ConfigError, match=name):
            SessionSettings(**{name: bad})


@pytest.mark.torchrl
def test_collecting_ends_when_the_gateway_is_closed(fake: FakeServer) -> None:
    begun = threading.Event()

    async def agent(*_: Any) -> float:
        begun.set()
        await asyncio.Event().wait()
        return 1.0

    errors: list[BaseException] = []
    with AgentGateway(fake.url) as gateway:
        collector = AgentCollector(gateway, agent, ["a"] * 9, group_size=2, timeout_s=1.0)

        def collect() -> None:
            try:
                next(iter(collector))
            except (RuntimeError, SGLangError) as error:
                errors.append(error)

        collecting = threading.Thread(target=collect)
        collecting.start()
        assert begun.wait(60)
    collecting.join(60)
    assert not collecting.is_alive()
    assert len(errors) == 1
    collector.shutdown(timeout=float("inf"))
