"""A server that is removed from the pool while it is being restarted does not run afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang import ServerStartError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.engine import monitor
from torchrl_sglang.pool import SGLangPool


class Process:
    """A server process that calls a function in the middle of a restart."""

    def __init__(self, pool: SGLangPool, url: str, when: str) -> None:
        self.runs = True
        self._pool, self._url, self._when = pool, url, when

    def _step(self, name: str) -> None:
        if name == self._when:
            self.runs = False  # what the removal does first
            self._pool.remove(self._url, drain=False)

    def kill(self) -> None:
        self.runs = False
        self._step("killed")

    def stop(self, *, kill: bool) -> None:
        self.runs = False

    def start(self, *, progress: Callable[[str], None], weight_version: str | None) -> None:
        self._step("starting")
        self.runs = True
        if self._when == "loading":
            self._pool.remove(self._url, drain=False)
            try:
                progress("loading")
            except ServerStartError:
                self.runs = False
                raise


@pytest.mark.parametrize("when", ["killed", "starting", "loading"])
def test_it_is_not_left_running(make: Callable[..., FakeServer], when: str) -> None:
    first, second = make(), make()
    pool = SGLangPool([SGLangClient(server.url) for server in (first, second)])
    pool.connect()
    process: Any = Process(pool, second.url, when)
    assert pool.state.restart_begun(second.url)
    with pytest.raises(ServerStartError, match="removed from the pool while it was being restarted"):
        monitor.restart_server(pool, pool.clients[1], process)
    assert not process.runs
    assert [client.url for client in pool.clients] == [first.url]


def test_a_restart_that_is_over_does_not_end_the_next_one(make: Callable[..., FakeServer]) -> None:
    """The first one waits for the update lock; meanwhile somebody restarts the server again."""
    first, second = make(), make()
    pool = SGLangPool([SGLangClient(server.url) for server in (first, second)])
    pool.connect()
    process: Any = Process(pool, second.url, "never")
    process.reap = lambda: "ended with exit code 1"
    process.has_crashed = True

    class Engine:
        router = None
        launched = ((pool.clients[1], process),)

    engine: Any = Engine()
    engine.pool = pool
    restarts = monitor._Restarts()
    with pool.update_lock:
        monitor._begin_restarts(engine, restarts)
        (task,) = restarts.tasks
        started = threading.Event()
        while pool.state.server(second.url).is_restarting:
            assert not started.wait(0.01)
            assert not task.done
        assert pool.state.restart_begun(second.url)
    assert task.wait(30)
    assert pool.state.server(second.url).is_restarting
