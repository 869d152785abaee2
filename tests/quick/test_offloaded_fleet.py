"""Servers that crash, start, join and leave while GPU memory is offloaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.quick.gpu_server import WEIGHTS, WITH_BACKUP, GpuServer
from torchrl_sglang import AsyncSGLang, ConfigError, SGLangPool
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.parallel import Task


class Process:
    """What an engine needs of a server that it has launched."""

    def __init__(self, server: GpuServer) -> None:
        self.server = server
        self.url = server.url
        self.has_crashed = False
        self.may_start = threading.Event()
        self.may_start.set()
        self.num_starts = 0

    def crash(self) -> None:
        self.server.die()
        self.has_crashed = True

    def kill(self) -> None:
        self.has_crashed = False

    def reap(self) -> str:
        self.has_crashed = False
        return "was killed by signal 9"

    def start(self, *, progress: Callable[[str], None], weight_version: str | None = None) -> None:
        self.num_starts += 1
        assert self.may_start.wait(20)
        self.server.start_again()

    def stop(self, kill: bool = False) -> None:
        self.has_crashed = False


@pytest.fixture
def made() -> Iterator[list[GpuServer]]:
    servers: list[GpuServer] = []
    yield servers
    for each in servers:
        each.die()


@pytest.fixture
def make(made: list[GpuServer], tiny_llama: Path) -> Callable[..., GpuServer]:
    def start(**flags: Any) -> GpuServer:
        made.append(GpuServer(tiny_llama, **flags))
        return made[-1]

    return start


@pytest.fixture
def processes(make: Callable[..., GpuServer]) -> list[Process]:
    return [Process(make(**WITH_BACKUP)) for _ in range(2)]


@pytest.fixture
def engine(processes: list[Process]) -> Iterator[AsyncSGLang]:
    pool = SGLangPool([SGLangClient(process.url) for process in processes])
    pool.connect()
    with AsyncSGLang(pool, processes, restart="on-failure") as made:  # type: ignore[arg-type]
        yield made


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_that_crashes_in_the_block_is_started_again_after_it(
    engine: AsyncSGLang, processes: list[Process]
) -> None:
    steady, crashing = processes
    with engine.offloaded():
        crashing.crash()
        wait_for(lambda: "started again after resume_memory" in engine.pool.quarantined[crashing.url])
        for call in (partial(engine.restart, crashing.url), engine.flush_cache, engine.init_weight_update_group):
            with pytest.raises(ConfigError, match="resume_memory"):
                call()
        assert crashing.num_starts == 0, "its GPU memory is in use"
    assert steady.server.calls[-1] == "/continue_generation"
    wait_for(lambda: not engine.pool.quarantined)
    assert crashing.num_starts == 1
    assert "/resume_memory_occupation" not in " ".join(crashing.server.calls).partition("started again")[2]


def test_a_server_that_is_being_started_is_waited_for_and_releases_its_memory_too(
    engine: AsyncSGLang, processes: list[Process]
) -> None:
    crashing = processes[1]
    crashing.may_start.clear()
    crashing.crash()
    wait_for(lambda: crashing.num_starts)
    releasing = Task(engine.release_memory, name="release")
    assert not releasing.wait(0.3)
    crashing.may_start.set()
    releasing.outcome().unwrap()
    assert crashing.server.released
    assert crashing.server.paused
    engine.resume_memory()
    wait_for(lambda: not engine.pool.quarantined)
    assert not crashing.server.paused


def test_one_that_somebody_else_has_started_again_is_not_told_to_resume(make: Callable[..., GpuServer]) -> None:
    good, replaced = make(**WITH_BACKUP), make(**WITH_BACKUP)
    with AsyncSGLang.connect([good.url, replaced.url]) as engine:
        with engine.offloaded():
            replaced.die()
            replaced.start_again()
        assert "its process was replaced" in engine.pool.quarantined[replaced.url]
        assert engine.pool.state.server(replaced.url).restarts == 1
        assert replaced.calls[-1] == "started again", "SGLang ends when it resumes what it has"
        assert [client.url for client in engine.pool.healthy] == [good.url]


def test_all_may_die_in_the_block(make: Callable[..., GpuServer]) -> None:
    servers = [make(**WITH_BACKUP), make(**WITH_BACKUP)]
    with AsyncSGLang.connect([server.url for server in servers]) as engine:
        with engine.offloaded():
            for server in servers:
                server.die()
        assert len(engine.pool.quarantined) == 2
        engine.pool.refuse_while_offloaded()


@pytest.mark.filterwarnings("ignore:.*holds weights of an earlier run")
@pytest.mark.parametrize("flags", [WEIGHTS, WITH_BACKUP])
def test_a_newcomer_that_waits_for_its_weights_still_waits_for_them_after_the_block(
    make: Callable[..., GpuServer], flags: dict[str, Any]
) -> None:
    first, second = make(**flags), make(**flags)
    first.version = "3@abcd"
    with AsyncSGLang.connect(first.url) as engine:
        engine.add(second.url)
        before = engine.pool.state.server(second.url)
        assert before.phase == "joining"
        with engine.offloaded():
            assert second.released
        now = engine.pool.state.server(second.url)
        assert (now.phase, now.reason) == (before.phase, before.reason)


def test_a_server_that_drains_leaves_after_the_block(make: Callable[..., GpuServer]) -> None:
    staying, leaving = make(**WITH_BACKUP), make(**WITH_BACKUP)
    with AsyncSGLang.connect([staying.url, leaving.url]) as engine:
        slot = engine.pool.clients[1]._connections.slot("generate", 10.0)
        with slot:
            removing = Task(lambda: engine.remove(leaving.url), name="remove")
            wait_for(lambda: engine.pool.state.has_left(leaving.url))
            engine.release_memory()
        with pytest.raises(ConfigError, match="resume_memory"):
            engine.remove(staying.url)
        assert not removing.wait(0.5)
        engine.resume_memory()
        removing.outcome().unwrap()
        assert not leaving.paused
        assert [client.url for client in engine.pool.clients] == [staying.url]
