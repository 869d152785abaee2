"""``engine.scale_to``, ``add``, ``remove``: what is launched, what ends, and that nothing is left after a failure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import AsyncSGLang, ConfigError, SamplingParams, ServerConfig, ServerStartError, SyncConfig
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.engine.launching import LocalLauncher
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server.gpus import free_gpus

PROMPTS = [[index + 3, 7, 8] for index in range(8)]
SHORT = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)


class Process:
    """A server process whose server is in this process."""

    has_crashed = False

    def __init__(self, model_path: Path, **settings: Any) -> None:
        self.fake = FakeServer(FakeSettings(model_path=model_path, **settings)).start()
        self.url = self.fake.url
        self.stopped = False

    def stop(self, kill: bool = False) -> None:
        self.stopped = True
        self.fake.stop()


class Launcher:
    """Starts such processes, and can fail on the way."""

    def __init__(self, model_path: Path) -> None:
        self.started: list[Process] = []
        self.settings: dict[str, Any] = {}
        self.before: Callable[[Callable[[str], None]], None] = lambda progress: None
        self._model_path = model_path

    def start(self, num_servers: int, running: Sequence[Any], *, gpus: Any, progress: Any) -> list[Process]:
        self.before(progress)
        new = [Process(self._model_path, **self.settings) for _ in range(num_servers)]
        self.started += new
        return new


@pytest.fixture
def launcher(tiny_llama: Path) -> Iterator[Launcher]:
    made = Launcher(tiny_llama)
    yield made
    for process in made.started:
        process.stop()


@pytest.fixture
def engine(launcher: Launcher) -> Iterator[AsyncSGLang]:
    first = launcher.start(1, [], gpus=None, progress=None)
    pool = SGLangPool([SGLangClient(first[0].url)])
    pool.connect()
    with AsyncSGLang(pool, first, launcher=launcher) as made:  # type: ignore[arg-type]
        yield made


def urls(engine: AsyncSGLang) -> list[str]:
    return [client.url for client in engine.pool.clients]


def test_it_launches_until_there_are_enough_and_ends_the_newest(engine: AsyncSGLang, launcher: Launcher) -> None:
    engine.scale_to(3)
    assert urls(engine) == [process.url for process in launcher.started]
    assert engine.get_dp_size() == len(engine.servers) == 3
    assert {reply.server for reply in engine.pool.generate(PROMPTS, SHORT)} == set(urls(engine))
    engine.scale_to(3)
    assert len(launcher.started) == 3
    engine.scale_to(2)
    assert [process.stopped for process in launcher.started] == [False, False, True]
    assert len(engine.servers) == 2


def test_servers_that_take_no_requests_end_first(engine: AsyncSGLang, launcher: Launcher) -> None:
    engine.scale_to(3)
    engine.pool.quarantine(urls(engine)[0], "it crashed")
    engine.scale_to(2)
    assert [process.stopped for process in launcher.started] == [True, False, False]
    assert not engine.pool.quarantined


def test_new_servers_get_the_weights_that_the_others_hold(
    engine: AsyncSGLang, launcher: Launcher, tiny_llama: Path
) -> None:
    tensors = {name: tensor + 1 for name, tensor in read_checkpoint(tiny_llama).items()}
    engine.update_weights(tensors)
    (new,) = engine.add(1)
    assert new == launcher.started[1].url
    assert not engine.pool.quarantined
    held = launcher.started[1].fake.weights[0]
    assert all(held[name].equal(tensor) for name, tensor in tensors.items())


def test_a_server_that_was_launched_ends_when_it_is_removed_and_an_attached_one_goes_on(
    engine: AsyncSGLang, launcher: Launcher, make: Callable[..., FakeServer]
) -> None:
    attached = make()
    assert engine.add(attached.url) == (attached.url,)
    engine.add(1)
    engine.remove(urls(engine)[0])
    assert [process.stopped for process in launcher.started] == [True, False]
    assert engine.restart(launcher.started[0].url) is False
    engine.remove(launcher.started[1].url)
    assert not engine.servers
    engine.add(make().url)
    with pytest.raises(ConfigError, match="this engine has launched only 0"):
        engine.scale_to(1)
    engine.remove(urls(engine)[-1])
    assert SGLangClient(attached.url).weight_version() == "default"
    assert urls(engine) == [attached.url]


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, None])
def test_impossible_numbers_are_refused(engine: AsyncSGLang, wrong: Any) -> None:
    with pytest.raises(ConfigError):
        engine.scale_to(wrong)
    with pytest.raises(ConfigError):
        engine.add(wrong)
    assert len(engine.servers) == 1


def test_an_engine_that_is_attached_launches_nothing(make: Callable[..., FakeServer]) -> None:
    with AsyncSGLang.connect(make().url) as engine:
        with pytest.raises(ConfigError, match="has launched no servers and does not know how"):
            engine.add(1)
        with pytest.raises(ConfigError, match="has launched no servers and does not know how"):
            engine.scale_to(2)
        with pytest.raises(ConfigError, match="a running server has its own"):
            engine.add(make().url, gpus=[[0]])


def test_what_was_started_ends_if_it_can_not_join(engine: AsyncSGLang, launcher: Launcher, tiny_llama: Path) -> None:
    engine.update_weights(read_checkpoint(tiny_llama))
    launcher.settings = {"faults": (Fault(path="/begin_weight_update", action="refuse", message="no room", times=0),)}
    with pytest.raises(Exception, match="no room"):
        engine.scale_to(3)
    assert [process.stopped for process in launcher.started] == [False, True, True]
    assert len(urls(engine)) == len(engine.servers) == 1
    assert engine.pool.generate(PROMPTS, SHORT)


def test_after_ctrl_c_while_they_join_nothing_is_left(
    engine: AsyncSGLang, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.pool._membership, "_bring_up_to_date", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.scale_to(3)
    assert [process.stopped for process in launcher.started] == [False, True, True]
    assert len(urls(engine)) == len(engine.servers) == 1


def test_shutdown_abandons_a_start_under_way(engine: AsyncSGLang, launcher: Launcher) -> None:
    starting, ended = threading.Event(), threading.Event()

    def load(progress: Callable[[str], None]) -> None:
        starting.set()
        assert ended.wait(10)
        progress("loading")

    launcher.before = load
    scaling = Task(lambda: engine.scale_to(2), name="scale")
    assert starting.wait(10)
    engine.shutdown()
    ended.set()
    with pytest.raises(ServerStartError, match="shut down while"):
        scaling.outcome().unwrap()
    assert len(launcher.started) == 1


def test_the_memory_of_others_must_not_be_offloaded(engine: AsyncSGLang, launcher: Launcher) -> None:
    engine.pool.offload(urls(engine)[0], ["weights"])
    with pytest.raises(ConfigError, match="resume_memory"):
        engine.scale_to(2)
    assert len(launcher.started) == 1


def test_weights_reach_a_fleet_of_other_servers_than_it_began_with(
    engine: AsyncSGLang, launcher: Launcher, tiny_llama: Path
) -> None:
    tensors = read_checkpoint(tiny_llama)
    engine.weights.close()
    engine.update_weights(tensors)
    engine.add(1)
    engine.remove(urls(engine)[0])
    report = engine.update_weights({name: tensor + 2 for name, tensor in tensors.items()})
    assert report is not None
    assert list(report.server_weights) == urls(engine) == [launcher.started[1].url]
    assert engine.weights.sync.config == SyncConfig()


class Config:
    def __init__(self, gpus: tuple[int, ...] | None) -> None:
        self.gpus = gpus


class Running:
    def __init__(self, gpus: tuple[int, ...] | None) -> None:
        self.config = Config(gpus)


def test_further_servers_get_gpus_that_nobody_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ServerConfig] = []
    monkeypatch.setattr(
        "torchrl_sglang.engine.launching.start_fleet", lambda configs, progress: started.extend(configs) or ()
    )
    monkeypatch.setattr("torchrl_sglang.server.gpus.count_machine_gpus", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    launcher = LocalLauncher(ServerConfig(model="m", device="cuda", tp_size=2, port=30000))
    running: list[Any] = [Running(None), Running((4, 5))]  # the first was launched without naming any
    launcher.start(2, running, gpus=None, progress=print)
    assert [(config.gpus, config.port) for config in started] == [((2, 3), None), ((6, 7), None)]
    with pytest.raises(ConfigError, match="3 more servers need 6 free GPUs"):
        launcher.start(3, running, gpus=None, progress=print)
    with pytest.raises(ConfigError, match="GPU 5 is used by a server that runs"):
        launcher.start(1, running, gpus=[[5, 6]], progress=print)
    with pytest.raises(ConfigError, match="one list per server"):
        launcher.start(2, running, gpus=[[2, 3]], progress=print)
    assert free_gpus(1, 1, {0}, environ={"CUDA_VISIBLE_DEVICES": "4,5"}) == ((1,),)
