"""Crashed servers restart in parallel and beside weight updates, which do not wait; no error ends the watching."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import AsyncSGLang, SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ServerStartError
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool

PATIENCE_S = 30.0
PLAIN = SyncConfig(verify="off")


class Process:
    """A server process for an engine. While it has crashed, its fake server drops every connection."""

    def __init__(self, fake: FakeServer) -> None:
        self.url = fake.url
        self.starts: list[str | None] = []
        self.may_start = threading.Event()
        self.may_start.set()
        self.start_error: BaseException | None = None
        self._fake = fake
        self._is_up = True

    @property
    def has_crashed(self) -> bool:
        return not self._is_up

    def crash(self) -> None:
        self._fake.arm(Fault(path="*", action="drop", times=0))
        self._is_up = False

    def reap(self) -> str | None:
        crashed, self._is_up = not self._is_up, True
        return "ended with exit code 1" if crashed else None

    def start(self, progress: Callable[[str], None] = print, weight_version: str | None = None) -> None:
        self.starts.append(weight_version)
        while not self.may_start.wait(0.02):
            progress("loading")
        if self.start_error is not None:
            raise self.start_error
        self._fake.set_state(session_open=False, weight_version=weight_version or "default")
        self._fake.disarm()

    def kill(self) -> None: ...

    def stop(self, kill: bool = False) -> None: ...


class Fleet:
    def __init__(self, stack: ExitStack, model: Path, count: int) -> None:
        fakes = [stack.enter_context(FakeServer(FakeSettings(model_path=model))) for _ in range(count)]
        self.fakes = fakes
        self.processes = [Process(fake) for fake in fakes]
        self.pool = SGLangPool([SGLangClient(fake.url) for fake in fakes])
        self.pool.connect()
        self.engine = stack.enter_context(AsyncSGLang(self.pool, self.processes, restart="on-failure"))  # type: ignore[arg-type]
        stack.callback(lambda: [process.may_start.set() for process in self.processes])

    @property
    def state(self) -> Any:
        return self.pool.state


@pytest.fixture
def fleet(tiny_llama: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(stack, tiny_llama, 3)


@pytest.fixture
def tensors(tiny_llama: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(tiny_llama)


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_servers_restart_side_by_side_while_the_update_lock_is_held_and_return_when_it_is_free(fleet: Fleet) -> None:
    with fleet.pool.update_lock:
        for process in fleet.processes:
            process.may_start.clear()
            process.crash()
        wait_until(lambda: all(process.starts for process in fleet.processes), "they start one after the other")
        for process in fleet.processes:
            process.may_start.set()
        urls = [process.url for process in fleet.processes]
        wait_until(lambda: all(fleet.state.server(url).restarts == 1 for url in urls), "they are not up")
        assert not fleet.pool.healthy, "an update could be under way"
    wait_until(lambda: len(fleet.pool.healthy) == 3, "they are not admitted")


def test_an_update_goes_to_the_other_servers_while_one_restarts_and_the_next_one_to_all(
    fleet: Fleet, tensors: dict[str, torch.Tensor]
) -> None:
    victim = fleet.processes[0]
    victim.may_start.clear()
    victim.crash()
    with_restart = WeightSync(fleet.pool, PLAIN, restart=fleet.engine.restart)
    report = with_restart.push(tensors)  # at once: the monitor may not have noticed yet
    assert report is not None
    assert list(report.server_weights) == [process.url for process in fleet.processes[1:]]
    assert victim.starts == [None], "the update has started it a second time"
    victim.may_start.set()
    # It was started as one that holds the current weights, and these have changed since.
    wait_until(lambda: "next weight update" in fleet.pool.quarantined.get(victim.url, ""), "it was not admitted")
    assert fleet.pool.clients[0].weight_version().startswith("dirty-2")
    report = with_restart.push(tensors)
    assert report is not None
    assert len(report.server_weights) == 3
    assert not fleet.pool.quarantined
    with_restart.close()


def test_an_update_waits_for_a_restart_if_no_other_server_is_left(
    tiny_llama: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with ExitStack() as stack:
        fleet = Fleet(stack, tiny_llama, 1)
        (victim,) = fleet.processes
        victim.may_start.clear()
        victim.crash()
        pushing = Task(lambda: fleet.engine.update_weights(tensors), name="push")
        wait_until(lambda: victim.starts, "it is not started")
        assert not pushing.wait(0.5)
        victim.may_start.set()
        assert pushing.wait(PATIENCE_S)
        report = pushing.outcome().unwrap()
        assert report is not None
        assert report.server_weights == {victim.url: "new"}
        assert len(victim.starts) == 1


@pytest.mark.parametrize("error", [ServerStartError("no memory"), RuntimeError("a fault of ours")], ids=repr)
def test_an_error_of_one_restart_is_logged_and_the_watching_goes_on(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    first, second, _ = fleet.processes
    first.start_error = error
    first.crash()
    wait_until(lambda: "could not be restarted" in fleet.pool.quarantined.get(first.url, ""), "it was not tried")
    assert str(error) in caplog.text
    assert not fleet.state.server(first.url).is_restarting
    second.crash()
    wait_until(lambda: fleet.state.server(second.url).restarts == 1, "nobody watches any more")


def test_an_error_of_the_watching_itself_is_logged_once_and_the_watching_goes_on(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(process: Process) -> bool:
        raise OSError("too many open files")

    monkeypatch.setattr(Process, "has_crashed", property(fail))
    wait_until(lambda: "too many open files" in caplog.text, "it was not looked at")
    time.sleep(1.2)
    assert caplog.text.count("watching the servers failed") == 1
    monkeypatch.undo()
    fleet.processes[0].crash()
    wait_until(lambda: fleet.state.server(fleet.processes[0].url).restarts == 1, "nobody watches any more")


def test_nothing_of_an_update_reaches_the_process_that_replaces_a_server(
    fleet: Fleet, tensors: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """The new process holds the checkpoint's weights: the old one's version would be a wrong label."""
    sync = WeightSync(fleet.pool, PLAIN)
    sync.push(tensors)
    victim, fake = fleet.processes[0], fleet.fakes[0]
    # The update has marked all servers and waits for another one, while this one is replaced.
    fleet.fakes[1].arm(Fault(path="/begin_weight_update", action="slow", seconds=2.0))
    fleet.fakes[1].arm(Fault(path="/begin_weight_update", action="refuse", at="handled"))
    pushing = Task(lambda: sync.push(tensors), name="push")
    wait_until(lambda: any(e["path"] == "/begin_weight_update" for e in fake.events[-3:]), "no begin")
    victim.may_start.clear()
    victim.crash()
    wait_until(lambda: victim.starts, "it is not restarted")
    fake.disarm()  # the new process listens; that it is ready is not known yet
    fake.set_state(session_open=False, weight_version=victim.starts[0])
    count = len(fake.events)
    assert pushing.wait(PATIENCE_S)
    with pytest.raises(WeightUpdateError) as failure:
        pushing.outcome().unwrap()
    assert failure.value.server_weights[victim.url] == "stuck"
    sent = {event["path"] for event in fake.events[count:]}
    assert not sent & {"/update_weight_version", "/continue_generation", "/end_weight_update"}
    assert fleet.pool.clients[0].weight_version().startswith("dirty-"), "the checkpoint's weights have another label"
    sync.close()


def test_an_update_waits_for_the_lock_no_longer_than_another_update_may_take_and_names_its_holder(
    fleet: Fleet, tensors: dict[str, torch.Tensor]
) -> None:
    from torchrl_sglang.config import ClientConfig

    pool = SGLangPool([SGLangClient(fleet.fakes[0].url, ClientConfig(update_timeout_s=0.2))])
    sync = WeightSync(pool, SyncConfig(verify="off", fixed_timeout_s=0.2))
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with pool.update_lock.held_for("somebody's restart"):
            held.set()
            release.wait(PATIENCE_S)

    holding = Task(hold, name="the-other-thread")
    assert held.wait(PATIENCE_S)
    with pytest.raises(WeightUpdateError, match=r"somebody's restart, for \d+ s \(thread 'the-other-thread'\)"):
        sync.push(tensors)
    release.set()
    holding.wait()
    assert sync.push(tensors) is not None
    sync.close()
