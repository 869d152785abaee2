"""An engine that launches and ends servers while it generates, as processes: no orphan, also after Ctrl-C.

The servers are fake ones launched like real ones; ``test_elastic_fleet.py`` has real ones.
"""

from __future__ import annotations

import _thread
import contextlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fake_sglang import FakeSettings
from tests.fake_sglang.fake_python import make_python
from tests.fake_sglang.model import read_checkpoint
from tests.loop.forked_processes import ProcessFactory, wait_until
from torchrl_sglang import AsyncSGLang, ConfigError, RouterConfig, SamplingParams
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import RouterClient, SGLangPool
from torchrl_sglang.server import SGLangRouter

pytestmark = pytest.mark.usefixtures("logs_go_with_the_test")

PROMPTS = [[index + 3, 7, 8] for index in range(8)]
SAMPLING = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=100, temperature=0, ignore_eos=True)


@pytest.fixture
def launch(tiny_llama: Path, tmp_path: Path) -> Iterator[Callable[..., AsyncSGLang]]:
    engines: list[AsyncSGLang] = []

    def start(**settings: Any) -> AsyncSGLang:
        python = make_python(tmp_path, "--step-s", "0.005")
        engines.append(AsyncSGLang.from_pretrained(str(tiny_llama), python=python, device="cpu", **settings))
        return engines[-1]

    yield start
    for each in engines:
        each.shutdown()


def children() -> set[psutil.Process]:
    return {process for process in psutil.Process().children(recursive=True) if process.status() != "zombie"}


@pytest.mark.slow
def test_servers_are_launched_and_ended_while_others_generate(
    launch: Callable[..., AsyncSGLang], tiny_llama: Path
) -> None:
    engine = launch(restart="on-failure")
    engine.update_weights({name: tensor + 1 for name, tensor in read_checkpoint(tiny_llama).items()})
    expected = [reply.output_ids for reply in engine.pool.generate(PROMPTS, LONG)]
    before = children()
    running = [Task(lambda: engine.pool.generate(PROMPTS, LONG), name="generate") for _ in range(3)]
    engine.scale_to(2)
    assert not engine.pool.quarantined
    assert len({reply.server for reply in engine.pool.generate(PROMPTS, LONG)}) == 2
    running += [Task(lambda: engine.pool.generate(PROMPTS, LONG), name="generate") for _ in range(3)]
    engine.scale_to(1, drain=False)
    for task in running:
        assert [reply.output_ids for reply in task.outcome().unwrap()] == expected
    wait_until(lambda: children() <= before, "a process is left", 20)
    # A copy follows, with the servers' key, and one that crashed is restarted although others have joined and left.
    copied = pickle.loads(pickle.dumps(engine.pool))
    engine.add(1)
    wait_until(lambda: len({reply.server for reply in copied.generate(PROMPTS, SAMPLING)}) == 2, "not learned", 20)
    engine.remove(engine.servers[0].url)
    crashed = engine.servers[0]
    pid = crashed.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: crashed.pid not in (None, pid), "it was not started again", 60)


@pytest.mark.slow
def test_ctrl_c_while_servers_start_leaves_none_behind(launch: Callable[..., AsyncSGLang]) -> None:
    engine = launch()
    before = children()

    def interrupt() -> None:
        wait_until(lambda: len(children()) > len(before), "nothing was started", 30)
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        engine.scale_to(3)
    thread.join()
    wait_until(lambda: children() <= before, "an orphan is left", 20)
    assert len(engine.servers) == len(engine.pool.clients) == 1
    assert engine.pool.generate(PROMPTS, SAMPLING)
    engine.scale_to(2)
    assert len(engine.pool.healthy) == 2


@pytest.mark.slow
def test_a_trainer_that_is_killed_takes_the_servers_with_it_that_it_has_added(tiny_llama: Path, tmp_path: Path) -> None:
    python = make_python(tmp_path, "--step-s", "0.001")
    program = f"""
import time
from torchrl_sglang import AsyncSGLang
engine = AsyncSGLang.from_pretrained({str(tiny_llama)!r}, python={python!r}, device="cpu")
engine.scale_to(2)
print("ready", *(server.pid for server in engine.servers), flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        words = trainer.stdout.readline().split()
        assert words[0] == "ready"
        assert len(words) == 3
    finally:
        trainer.kill()
        trainer.wait()
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid in words[1:]), "a server is left", 20)


def test_forked_workers_learn_who_joins_and_who_leaves(processes: ProcessFactory, tiny_llama: Path) -> None:
    fakes = [processes.start_server(FakeSettings(model_path=tiny_llama)) for _ in range(2)]
    pool = SGLangPool([SGLangClient(fakes[0].url)])
    pool.connect()
    go_on, says = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            pool.generate(PROMPTS, SAMPLING)
            os.read(go_on[0], 1)
            wait_until(lambda: {reply.server for reply in pool.generate(PROMPTS, SAMPLING)} == {fakes[1].url}, "", 20)
            os.write(says[1], b"y")
        finally:
            os._exit(0)
    pool.add(fakes[1].url)
    pool.remove(fakes[0].url)
    os.write(go_on[1], b"x")
    os.close(says[1])
    assert os.read(says[0], 1) == b"y"
    os.waitpid(child, 0)


def test_a_router_gets_the_servers_that_join_and_loses_those_that_leave(
    processes: ProcessFactory, tiny_llama: Path
) -> None:
    if importlib.util.find_spec("sglang_router") is None:
        assert not os.environ.get("CI"), "sglang-router is not installed: make env"
        pytest.skip("sglang-router is not installed")
    fakes = [processes.start_server(FakeSettings(model_path=tiny_llama, step_s=0.01)) for _ in range(3)]
    router = SGLangRouter(RouterConfig(policy="round_robin"))
    router.start()
    with contextlib.ExitStack() as at_end:
        at_end.callback(router.stop)
        front = RouterClient(router.url, ClientConfig())
        pool = SGLangPool([SGLangClient(fake.url) for fake in fakes[:2]], router=front)
        pool.connect()
        expected = [reply.output_ids for reply in pool.generate(PROMPTS, LONG)]
        assert pool.add(fakes[2].url) == (fakes[2].url,)
        assert front.workers().keys() == {fake.url for fake in fakes}
        for leaving, drain in ((fakes[0], True), (fakes[1], False)):
            seen = leaving.requests("/generate")
            running = Task(lambda: pool.generate(PROMPTS, LONG), name="generate")
            wait_until(lambda: leaving.requests("/generate") > seen, "it got nothing", 20)  # noqa: B023
            pool.remove(leaving.url, drain=drain)
            assert leaving.url not in front.workers()
            replies = running.outcome().unwrap()
            assert [reply.output_ids for reply in replies] == expected
            assert {reply.finish_reason for reply in replies} == {"length"}
        before = fakes[2].requests("/generate")
        pool.generate(PROMPTS, SAMPLING)
        assert fakes[2].requests("/generate") == before + len(PROMPTS)
        with pytest.raises(ConfigError, match="a pool needs at least one server"):
            pool.remove(fakes[2].url)
        pool.close()
