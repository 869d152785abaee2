"""Servers that leave the pool and can't be ended: each is tried, each leaves, and the error names those that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang import AsyncSGLang, ServerError, ServerStartError, SGLangPool
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import SGLangError


class Ends:
    """Ends servers, and fails at some of them."""

    def __init__(self, failing: dict[str, BaseException]) -> None:
        self.asked: list[str] = []
        self._failing = failing

    def __call__(self, url: str) -> None:
        self.asked.append(url)
        if url in self._failing:
            raise self._failing[url]


@pytest.fixture
def pool(make: Callable[..., FakeServer]) -> SGLangPool:
    made = SGLangPool([SGLangClient(make().url) for _ in range(4)])
    made.connect()
    return made


def urls(pool: SGLangPool) -> list[str]:
    return [client.url for client in pool.clients]


def test_after_one_error_the_others_are_ended_too(pool: SGLangPool) -> None:
    first, second, third, stays = urls(pool)
    ends = Ends({first: OSError("no such process"), second: ServerError("its actor does not answer")})
    with pytest.raises(ServerError, match="all 3 servers have left the pool, but 2 could not be ended") as caught:
        pool.take_out([first, second, third], drain=False, timeout_s=None, on_left=ends)
    assert f"{first}: no such process" in str(caught.value)
    assert f"{second}: its actor does not answer" in str(caught.value)
    assert ends.asked == [first, second, third]
    assert urls(pool) == [stays]
    assert not [url for url, server in pool.state.servers.items() if server.is_leaving]


def test_a_single_error_is_raised_as_it_is(pool: SGLangPool) -> None:
    first, second, *_ = urls(pool)
    ends = Ends({first: ServerStartError("a test")})
    with pytest.raises(ServerStartError, match="a test"):
        pool.take_out([first, second], drain=False, timeout_s=None, on_left=ends)
    assert ends.asked == [first, second]
    assert len(urls(pool)) == 2


def test_ctrl_c_stops_nothing_half_way(pool: SGLangPool) -> None:
    first, second, *_ = urls(pool)
    ends = Ends({first: KeyboardInterrupt(), second: OSError("a test")})
    with pytest.raises(KeyboardInterrupt):
        pool.take_out([first, second], drain=False, timeout_s=None, on_left=ends)
    assert ends.asked == [first, second]
    assert len(urls(pool)) == 2


def test_a_process_group_that_can_not_be_destroyed_keeps_no_server_in_the_pool(pool: SGLangPool) -> None:
    class Sync:
        def servers_leave(self) -> None:
            raise SGLangError("a test")

    sync = Sync()
    pool.weight_sync = sync
    first, second, *_ = urls(pool)
    ends = Ends({})
    with pytest.raises(SGLangError, match="a test"):
        pool.take_out([first, second], drain=False, timeout_s=None, on_left=ends)
    assert ends.asked == [first, second]
    assert len(urls(pool)) == 2


def test_an_engine_that_can_not_close_something_ends_its_servers_nevertheless(pool: SGLangPool) -> None:
    class Process:
        has_crashed = False
        stopped = False

        def __init__(self, url: str) -> None:
            self.url = url

        def stop(self, kill: bool = False) -> None:
            self.stopped = True

    class Router(Process):
        def stop(self, kill: bool = False) -> None:
            raise OSError("the router")

    processes: list[Any] = [Process(client.url) for client in pool.clients]
    router: Any = Router("http://127.0.0.1:1")
    engine = AsyncSGLang(pool, processes, router=router, restart="on-failure")

    def interrupted() -> None:
        raise KeyboardInterrupt

    engine.weights.close = interrupted  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the router"):
        engine.shutdown()
    assert all(process.stopped for process in processes)
    router.stop = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.shutdown()
