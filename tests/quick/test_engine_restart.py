"""A restart waits for an update under way, and an update restarts a dead server without waiting for itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool


class Process:
    """A server process for an engine: it counts its starts, and the fake server goes on."""

    has_crashed = False

    def __init__(self, fake: FakeServer) -> None:
        self.url = fake.url
        self.starts = 0
        self._fake = fake

    def start(self, progress: Any = None, weight_version: str | None = None) -> None:
        self.starts += 1
        self._fake.disarm()

    def kill(self) -> None: ...

    def stop(self, kill: bool = False) -> None: ...


@pytest.fixture
def fakes(tiny_llama: Path) -> Iterator[list[FakeServer]]:
    settings = FakeSettings(model_path=tiny_llama)
    with FakeServer(settings) as first, FakeServer(settings) as second:
        yield [first, second]


@pytest.fixture
def processes(fakes: list[FakeServer]) -> list[Process]:
    return [Process(fake) for fake in fakes]


@pytest.fixture
def engine(fakes: list[FakeServer], processes: list[Process]) -> Iterator[AsyncSGLang]:
    pool = SGLangPool([SGLangClient(fake.url) for fake in fakes])
    pool.connect()
    with AsyncSGLang(pool, processes) as made:  # type: ignore[arg-type]
        yield made


def test_a_restart_waits_for_the_update_under_way(engine: AsyncSGLang, processes: list[Process]) -> None:
    with engine.pool.update_lock:
        restarting = Task(lambda: engine.restart(engine.pool.clients[0].url), name="restart")
        assert not restarting.wait(0.3)
        assert processes[0].starts == 0
    assert restarting.wait(30)
    assert restarting.outcome().unwrap()
    assert processes[0].starts == 1
    assert not engine.pool.quarantined


@pytest.mark.parametrize("pushed_by", ["engine", "scheme", "sync"])
def test_an_update_restarts_dead_servers_itself(
    pushed_by: str, engine: AsyncSGLang, fakes: list[FakeServer], processes: list[Process], tiny_llama: Path
) -> None:
    """It holds the lock, and checks the servers in threads of its own."""
    push = {
        "engine": lambda: engine.update_weights(read_checkpoint(tiny_llama)),
        "scheme": lambda: SGLangWeightSyncScheme(engine).sync.push(read_checkpoint(tiny_llama)),
        "sync": lambda: WeightSync(engine.pool, SyncConfig(), restart=engine.restart).push(read_checkpoint(tiny_llama)),
    }[pushed_by]
    for fake in fakes:
        fake.arm(Fault(path="/ready", action="drop", times=0))
    pushing = Task(push, name="push")
    assert pushing.wait(60), "the update waits for itself"
    assert pushing.outcome().unwrap() is not None
    assert [process.starts for process in processes] == [1, 1]
    assert not engine.pool.quarantined
