"""Copies of a pool in processes that others start: spawned ones, workers of an executor and of a DataLoader."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.fake_sglang import FakeServerProcess, FakeSettings
from tests.processes import spawned_workers as work
from torchrl_sglang import ConfigError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool

pytestmark = pytest.mark.slow

Ask = Callable[..., Any]


@pytest.fixture
def servers(tiny_llama: Path) -> Iterator[list[FakeServerProcess]]:
    with ExitStack() as stack:
        settings = FakeSettings(model_path=tiny_llama)
        yield [stack.enter_context(FakeServerProcess(settings)) for _ in range(3)]


def pool_of(*servers: FakeServerProcess) -> SGLangPool:
    pool = SGLangPool([SGLangClient(server.url) for server in servers])
    pool.connect()
    return pool


@pytest.fixture
def spawned() -> Iterator[Callable[[SGLangPool], Ask]]:
    """``spawned(pool)`` starts a process with a copy; what it returns makes the copy do something."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:

        def start(pool: SGLangPool) -> Ask:
            here, there = context.Pipe()
            process = context.Process(target=work.serve, args=(there,), daemon=True)
            process.start()
            stack.callback(process.join, 60)
            stack.callback(here.send, None)
            here.send(pool)

            def ask(function: Callable[..., Any], *urls: str, meanwhile: Callable[[], object] = lambda: None) -> Any:
                here.send((function, urls))
                meanwhile()
                assert here.poll(100)
                return here.recv()

            return ask

        yield start


def test_a_spawned_process_follows_the_servers(
    servers: list[FakeServerProcess], spawned: Callable[[SGLangPool], Ask], tiny_llama: Path
) -> None:
    first, second, third = servers
    pool = pool_of(first, second)
    ask = spawned(pool)
    assert ask(work.wait_for, first.url, second.url)
    pool.add(third.url)
    assert ask(work.wait_for, first.url, second.url, third.url)

    def remove() -> None:
        time.sleep(0.1)
        pool.remove(first.url, drain=False)

    assert ask(work.lengths, meanwhile=remove) == [work.LONG.max_new_tokens] * len(work.PROMPTS)
    assert ask(work.wait_for, second.url, third.url)
    assert isinstance(ask(work.add, first.url), ConfigError)
    second.kill()
    assert ask(work.wait_for, third.url)
    port = int(second.url.rpartition(":")[2])
    with FakeServerProcess(FakeSettings(model_path=tiny_llama, port=port)):
        assert ask(work.wait_for, second.url, third.url)
        pool.add(first.url)
        assert ask(work.wait_for, first.url, second.url, third.url)
        pool.remove([second.url, third.url])
        pool.add(second.url)
        pool.remove(first.url)  # all that the copy has connected to so far, but one that it has to look at again
        assert ask(work.wait_for, second.url)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_generate_while_servers_come_and_go(
    servers: list[FakeServerProcess], start: str
) -> None:
    first, second, third = servers
    pool = pool_of(first, second)
    loader = DataLoader(
        work.Answers(pool),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=2,
        multiprocessing_context=start,
    )
    answers = []
    for count, each in enumerate(loader):
        answers.append(each)
        if count == 5:
            pool.add(third.url)
        if count == 8:
            pool.remove(first.url)
    assert [length for _, length in answers] == [work.SHORT.max_new_tokens] * 20
    assert os.getpid() not in {process for process, _ in answers}


def test_tasks_of_an_executor_get_the_servers_of_their_moment(servers: list[FakeServerProcess]) -> None:
    first, second, third = servers
    pool = pool_of(first, second)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        tasks = [executor.submit(work.answer, pool, index) for index in range(10)]
        pool.remove(first.url)
        pool.add(third.url)
        tasks += [executor.submit(work.answer, pool, index) for index in range(10)]
        assert {task.result(100)[1] for task in tasks} == {work.SHORT.max_new_tokens}
    assert work.servers_of(pool) == {second.url, third.url}
