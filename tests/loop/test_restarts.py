"""Servers of one's own that crash: what ``restart=`` makes of it, and that no stale weights ever answer.

The servers are fake ones launched like real ones; ``test_engine.py`` has a real one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang.fake_python import make_python
from tests.fake_sglang.model import read_checkpoint
from tests.loop.forked_processes import wait_until
from torchrl_sglang import AsyncSGLang, ConfigError, SamplingParams, ServerError, SyncConfig, WeightSync
from torchrl_sglang.parallel import Task
from torchrl_sglang.protocol.dialect import MODEL_INFO
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.server.supervisor import process_table

pytestmark = pytest.mark.usefixtures("logs_go_with_the_test")

SAMPLING = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
PATIENCE_S = 60.0
PROMPTS = [[1, 72, 101, 108], [5, 260, 300], [77]]


@pytest.fixture
def launch(tiny_llama: Path, tmp_path: Path) -> Iterator[Callable[..., AsyncSGLang]]:
    engines: list[AsyncSGLang] = []

    def start(**settings: Any) -> AsyncSGLang:
        python = make_python(tmp_path, "--step-s", "0.001")
        made = AsyncSGLang.from_pretrained(str(tiny_llama), python=python, device="cpu", **settings)
        engines.append(made)
        return made

    yield start
    for each in engines:
        each.shutdown()


def kill(server: SGLangServer) -> int:
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def await_new_process(server: SGLangServer, old_pid: int) -> None:
    wait_until(lambda: server.pid not in (None, old_pid), "the server was not started again", PATIENCE_S)


def await_answer(engine: AsyncSGLang, index: int, count: int = 1) -> None:
    client = engine.pool.clients[index]
    wait_until(lambda: engine.pool.state.server(client.url).restarts >= count, "it did not come up again", PATIENCE_S)
    await_admission(engine, client.url)


def await_admission(engine: AsyncSGLang, url: str) -> None:
    def is_decided() -> bool:
        return "being restarted" not in engine.pool.quarantined.get(url, "")

    wait_until(is_decided, "nobody decides what it holds", PATIENCE_S)


def outputs(engine: AsyncSGLang, index: int) -> list[list[int]]:
    """What one server answers, past all routing."""
    with AsyncSGLang.connect(engine.pool.clients[index].url, api_key=engine.api_key) as direct:
        return [reply.output_ids for reply in direct.pool.generate(PROMPTS, SAMPLING)]


def test_a_crashed_server_is_back_with_the_weights_the_others_hold(
    launch: Callable[..., AsyncSGLang],
    tiny_llama: Path,
    tiny_llama_b: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    engine = launch(dp_size=2, restart="on-failure")
    victim, url = engine.servers[0], engine.pool.clients[0].url
    assert (engine.get_dp_size(), engine.get_tp_size(), len(engine.servers)) == (2, 1, 2)
    at_first = outputs(engine, 1)

    # Nothing was synced yet: the checkpoint's weights are the current ones.
    pid = kill(victim)
    await_answer(engine, 0)
    assert not engine.pool.quarantined
    assert victim.url == url
    assert outputs(engine, 0) == at_first
    told = caplog.text
    assert "exit code 137 (SIGKILL)" in told
    assert "server_args=" in told, "the end of the log is shown"
    assert "is back, with the weights" in told
    assert pid not in process_table()

    # Synced from an iterator: nobody can read it again, so the server waits for the next update.
    engine.update_weights(iter(read_checkpoint(tiny_llama_b).items()))
    expected = outputs(engine, 1)
    assert expected != at_first
    kill(victim)
    await_answer(engine, 0, count=2)
    assert "the next weight update puts it to use" in engine.pool.quarantined[url]
    assert {reply.server for reply in engine.pool.generate(PROMPTS, SAMPLING)} == {engine.pool.clients[1].url}
    held = engine.pool.clients[0].send(MODEL_INFO)["weight_version"]
    assert held.startswith("dirty-"), "no reply of it counts, in whatever process it arrives"
    copy = pickle.loads(pickle.dumps(engine.pool))  # as in a collector's worker, which knows of no crash
    asked = Task(lambda: copy.clients[0].send(MODEL_INFO) and pool_answers(copy.clients[0]), name="unaware")
    time.sleep(0.5)
    assert not asked.done, "a request that arrives before the weights waits for them"
    engine.update_weights(read_checkpoint(tiny_llama_b))
    assert asked.outcome().unwrap() == expected
    assert not engine.pool.quarantined
    assert outputs(engine, 0) == expected

    # Synced over a shared folder: it loads them from there.
    config = SyncConfig(transport="disk", disk_dir=tmp_path / "weights")
    with_disk = WeightSync(engine.pool, config, restart=engine.restart)
    with_disk.push(read_checkpoint(tiny_llama))
    version = engine.pool.clients[1].send(MODEL_INFO)["weight_version"]
    kill(victim)
    await_answer(engine, 0, count=3)
    assert not engine.pool.quarantined
    assert engine.pool.clients[0].send(MODEL_INFO)["weight_version"] == version
    assert outputs(engine, 0) == outputs(engine, 1)
    assert outputs(engine, 0) == at_first  # the checkpoint's own weights, as version 3

    # A fourth time within minutes is no accident.
    kill(victim)
    wait_until(lambda: "is not restarted" in engine.pool.quarantined.get(url, ""), "it was started again", 30)
    assert not victim.is_running
    assert len(engine.pool.generate(PROMPTS, SAMPLING)) == len(PROMPTS)
    with_disk.heal()
    assert not engine.pool.quarantined, "the next update brings it back"
    with_disk.close()


def pool_answers(client: Any) -> list[list[int]]:
    from torchrl_sglang.pool import SGLangPool

    pool = SGLangPool([client])
    pool.connect()
    pool.restore(client.url, based_on=pool.state.server(client.url))
    return [reply.output_ids for reply in pool.generate(PROMPTS, SAMPLING)]


def supervisors() -> set[int]:
    """Children of ours that live in a session of their own."""
    table = process_table().items()
    return {pid for pid, row in table if row.parent == os.getpid() and row.state != "Z" and row.session != os.getsid(0)}


def test_what_is_stopped_on_purpose_stays_stopped_and_shutdown_ends_a_restart(
    launch: Callable[..., AsyncSGLang],
) -> None:
    before = supervisors()  # other tests' servers
    engine = launch(restart="on-failure")
    (server,) = engine.servers
    server.stop(kill=True)
    time.sleep(1.5)  # three looks of the monitor
    assert not server.is_running
    server.start()
    old = kill(server)
    await_new_process(server, old)
    engine.shutdown()
    time.sleep(1.5)
    assert not server.is_running
    assert supervisors() <= before, "a supervisor is left"


def test_a_crashed_router_is_back_with_its_servers(launch: Callable[..., AsyncSGLang]) -> None:
    pytest.importorskip("sglang_router")
    engine = launch(router=True, restart="on-failure")
    router, front = engine.router, engine.pool.router
    assert router is not None
    assert front is not None
    assert len(engine.pool.generate(PROMPTS, SAMPLING)) == len(PROMPTS)
    url, pid = router.url, router.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: router.pid not in (None, pid), "the router was not started again", PATIENCE_S)

    def joined() -> bool:
        with contextlib.suppress(ServerError):
            return list(front.workers()) == [engine.pool.clients[0].url]
        return False

    wait_until(joined, "it was not told of its server", PATIENCE_S)
    assert router.url == url
    assert {reply.server for reply in engine.pool.generate(PROMPTS, SAMPLING)} == {url}
    last = router.pid
    engine.shutdown()
    assert last not in process_table()


def test_without_a_monitor_the_next_update_restarts_or_never(
    launch: Callable[..., AsyncSGLang], tiny_llama_b: Path
) -> None:
    engine = launch()
    kill(engine.servers[0])
    wait_until(lambda: engine.servers[0].has_crashed, "it lives", 20)
    time.sleep(1)
    assert not engine.servers[0].is_running
    engine.update_weights(read_checkpoint(tiny_llama_b))
    assert engine.servers[0].is_running
    engine.shutdown()

    unwatched = AsyncSGLang(engine.pool, engine.servers, restart="never")
    assert not unwatched.restart(engine.pool.clients[0].url)
    with pytest.raises(ConfigError, match="restart must be"):
        launch(restart="always")
