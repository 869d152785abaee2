"""Two trainers on one server: a dead one's update is ended, a live one's is respected, and the error names it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import ServerTimeoutError, SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_set_version
from torchrl_sglang.weights.group.trainer_mark import TrainerMark, update_under_way

PLAIN = SyncConfig(verify="off", fixed_timeout_s=1.0)
ELSEWHERE = TrainerMark("other.1", "00000000", 4711, 12)
HERE = TrainerMark.own("other.1")
ENDED = replace(HERE, started=HERE.started + 1)  # the process id belongs to a later process now

Make = Callable[..., FakeServer]


@pytest.fixture
def make(tiny_llama: Path) -> Iterator[Make]:
    made: list[FakeServer] = []

    def start(mark: TrainerMark | None = None, **settings: Any) -> FakeServer:
        if mark is not None:
            settings["weight_version"] = f"dirty-4@{mark}"
        made.append(FakeServer(FakeSettings(model_path=tiny_llama, **settings)).__enter__())
        if mark is not None:
            made[-1].set_state(session_open=True)
        return made[-1]

    yield start
    for server in made:
        server.__exit__(None, None, None)


@pytest.fixture
def tensors(tiny_llama: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(tiny_llama)


def sync_with(*servers: FakeServer, config: SyncConfig = PLAIN, **client: Any) -> WeightSync:
    return WeightSync(SGLangPool([SGLangClient(server.url, ClientConfig(**client)) for server in servers]), config)


def paths(server: FakeServer) -> list[str]:
    return [event["path"] for event in server.events]


@pytest.mark.parametrize(
    "mark", [ELSEWHERE, HERE, TrainerMark("another")], ids=["elsewhere", "this process", "no process"]
)
def test_a_mark_reads_as_it_was_written(mark: TrainerMark) -> None:
    assert TrainerMark.parse(str(mark)) == mark


def test_a_process_knows_its_own_updates_and_whether_processes_of_its_host_are_alive() -> None:
    assert HERE.is_alive() is False
    with update_under_way(HERE):
        assert HERE.is_alive() is True
    assert ELSEWHERE.is_alive() is None
    assert ENDED.is_alive() is False
    parent = TrainerMark.own("x")
    in_parent = replace(parent, pid=os.getppid(), started=started_of(os.getppid()))
    assert in_parent.is_alive() is True


def started_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


@pytest.mark.parametrize("mark", [ENDED, HERE], ids=["a process that has ended", "this process, which has given up"])
def test_the_update_of_a_dead_trainer_is_ended_at_once(
    make: Make, tensors: dict[str, torch.Tensor], mark: TrainerMark
) -> None:
    server = make(mark)
    sync = sync_with(server, config=SyncConfig(verify="off"))
    pushing = Task(lambda: sync.push(tensors), name="push")
    assert pushing.wait(30)
    assert pushing.outcome().unwrap() is not None
    assert "/destroy_weights_update_group" in paths(server)
    sync.close()


def test_the_update_of_a_live_trainer_is_respected_unless_it_is_to_be_taken_over(
    make: Make, tensors: dict[str, torch.Tensor]
) -> None:
    server = make(HERE)
    sync = sync_with(server)
    with update_under_way(HERE):
        before = len(server.events)
        with pytest.raises(
            WeightUpdateError, match=rf"another trainer \(other, process {os.getpid()}\).*takeover=True"
        ):
            sync.push(tensors)
        assert {event["method"] for event in server.events[before:]} == {"GET"}, "it has changed something"
        assert sync_with(server, config=replace(PLAIN, takeover=True)).push(tensors) is not None


def test_a_mark_of_another_host_counts_as_dead_when_its_update_must_have_failed(
    make: Make, tensors: dict[str, torch.Tensor]
) -> None:
    server = make(ELSEWHERE)
    sync = sync_with(server)
    start = time.monotonic()
    assert sync.push(tensors) is not None
    assert time.monotonic() - start >= PLAIN.fixed_timeout_s, "it did not wait"
    sync.close()


@pytest.mark.parametrize("version", ["4@other", f"dirty-5@{replace(ELSEWHERE, group='other.2')}"])
def test_an_update_of_another_host_that_goes_on_is_waited_for_or_refused(
    make: Make, tensors: dict[str, torch.Tensor], version: str
) -> None:
    server = make(ELSEWHERE)
    sync = sync_with(server, config=replace(PLAIN, fixed_timeout_s=30.0))
    pushing = Task(lambda: sync.push(tensors), name="push")
    assert not pushing.wait(0.5)
    server.set_state(session_open=False)
    SGLangClient(server.url).send(build_set_version(version))
    assert pushing.wait(20)
    outcome = pushing.outcome()
    assert (outcome.error is None) == (version == "4@other")
    if outcome.error is not None:
        assert "another trainer (other)" in str(outcome.error)
    sync.close()


def test_a_session_that_nobody_has_marked_is_left_open_unless_it_is_to_be_taken_over(
    make: Make, tensors: dict[str, torch.Tensor]
) -> None:
    server = make(weight_version="7@other")
    server.set_state(session_open=True)
    sync = sync_with(server)
    with pytest.raises(WeightUpdateError, match="session open that another program has opened"):
        sync.push(tensors)
    assert "/end_weight_update" not in paths(server)
    server.set_state(weight_version="7@other")
    report = sync_with(server, config=replace(PLAIN, takeover=True)).push(tensors)
    assert report is not None
    assert report.version == 8


def test_a_trainer_that_merely_connects_ends_nobodys_update(make: Make, tensors: dict[str, torch.Tensor]) -> None:
    """A server that loads a large model answers /server_info late, and looks as if it hung."""
    server = make(ELSEWHERE)
    server.arm(Fault(path="/server_info", action="slow", seconds=1.0, times=0))
    sync = sync_with(server, probe_timeout_s=0.3)
    with pytest.raises(ServerTimeoutError):
        sync.reach()
    assert "/destroy_weights_update_group" not in paths(server)
    with update_under_way(HERE):
        server.set_state(weight_version=f"dirty-4@{HERE}")
        with pytest.raises(WeightUpdateError, match="being updated by another trainer"):
            sync.push(tensors)
    assert "/destroy_weights_update_group" not in paths(server)


def test_what_is_waited_for_and_how_long_is_said(
    make: Make, tensors: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    sync = sync_with(make(ELSEWHERE))
    sync.push(tensors)
    assert "trainer other, not a process of this host: waiting up to 1 s" in caplog.text
    sync.close()


# ------------------------------------------------------------------------------------------- servers that hang for now


def stuck(sync: WeightSync, server: FakeServer) -> None:
    """An update has failed, and left the server waiting in a collective."""
    sync.reach()
    sync._pool.state.weights_changed(server.url, "stuck")
    sync._pool.quarantine(server.url, "its weights are stuck")


def test_a_hanging_server_is_asked_again_until_it_answers(make: Make, tensors: dict[str, torch.Tensor]) -> None:
    server = make()
    sync = sync_with(server, config=SyncConfig(verify="off"), probe_timeout_s=0.3)
    stuck(sync, server)
    server.arm(Fault(path="/server_info", action="slow", seconds=1.0, times=3))
    assert sync.push(tensors) is not None
    assert paths(server).count("/server_info") >= 4
    sync.close()


def test_a_server_that_goes_on_hanging_is_waited_for_once(make: Make, tensors: dict[str, torch.Tensor]) -> None:
    healthy, hanging = make(), make()
    sync = sync_with(healthy, hanging, config=SyncConfig(verify="off", fixed_timeout_s=2.0), probe_timeout_s=0.2)
    stuck(sync, hanging)
    hanging.arm(Fault(path="/server_info", action="hang", times=0))
    asked = []
    for _ in range(2):
        before = paths(hanging).count("/server_info")
        report = sync.push(tensors)
        asked.append(paths(hanging).count("/server_info") - before)
        assert report is not None
        assert list(report.server_weights) == [healthy.url]
    assert asked[0] > 1
    assert asked[1] == 1
    hanging.disarm()
    report = sync.push(tensors)
    assert report is not None
    assert len(report.server_weights) == 2
    sync.close()
