"""On a real local Ray: TorchRL's collector in an actor, and servers in actors, one placement-group bundle each."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from tensordict import TensorDictBase
from torchrl.collectors.llm import RayLLMCollector
from transformers import AutoTokenizer

from tests.fake_sglang.fake_python import make_python
from tests.loop.forked_processes import wait_until
from tests.loop.rollout_cases import reference_log_probs
from tests.loop.sync_cases import assert_serves, load
from tests.loop.test_recipes import (
    ANSWERS,
    QUESTIONS,
    rows_of,
    run_here,
    samples_of,
    served_version,
    settings,
    start,
    wait_for,
)
from torchrl_sglang import (
    AsyncSGLang,
    ConfigError,
    SamplingParams,
    ServerStartError,
    SGLangWeightSyncScheme,
    SGLangWrapper,
    SyncConfig,
    WeightSync,
    recipes,
)
from torchrl_sglang.protocol.version import version_number
from torchrl_sglang.ray_servers import RayPlacement, RayServer, launch_on_ray
from torchrl_sglang.server import SGLangServer

TWO_NODES = RayPlacement(hosts=("127.0.0.1", "127.0.0.2"), timeout_s=20)  # two addresses stand for two nodes
KEY = "key-of-a-server-6cb1"
PROMPTS = [[1, 72, 101, 108], [5, 260, 300], [77]]
SAMPLING = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Path]:
    """Two cores, no dashboard; yields the folder that Ray logs to."""
    before = set(psutil.Process().children())
    with pytest.MonkeyPatch.context() as patch:
        # Ray ends its workers on a machine whose memory is almost used up, by whomever: by other tests, here.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    daemons = set(psutil.Process().children()) - before
    assert daemons, "the watching itself works: Ray runs processes"
    yield Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1] / "logs"
    workers = {child for daemon in daemons if daemon.is_running() for child in daemon.children(recursive=True)}
    ray.shutdown()
    _, left = psutil.wait_procs(daemons | workers, timeout=30)
    assert not left, f"Ray left processes behind: {left}"


@pytest.fixture
def launch(tiny_llama: Path, tmp_path: Path) -> Iterator[Callable[..., AsyncSGLang]]:
    """Servers in actors: fake ones, launched like real ones."""
    engines: list[AsyncSGLang] = []

    def start(**settings: Any) -> AsyncSGLang:
        model = settings.pop("model", str(tiny_llama))
        python = make_python(tmp_path, "--step-s", "0.001")
        engines.append(launch_on_ray(model, python=python, device="cpu", **settings))
        return engines[-1]

    yield start
    for each in engines:
        each.shutdown()


# ------------------------------------------------------------------------------------------- a collector in an actor


def assert_sampled_from(model: Any, batch: TensorDictBase) -> None:
    for row in batch.unbind(0):
        expected = reference_log_probs(model, row["tokens", "full"])[len(row["tokens", "prompt"]) :]
        torch.testing.assert_close(row["log_probs", "response"], expected, atol=1e-4, rtol=0)


def test_a_collector_in_an_actor_gets_new_weights_from_the_trainers_process_and_counts_each_update_once(
    pristine_server: SGLangServer, tiny_llama: Path, tiny_llama_b: Path
) -> None:
    task = recipes.make_task({"name": "arithmetic", "largest": 3, "held_out": 1})
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with AsyncSGLang.connect(pristine_server.url) as engine:
        scheme = SGLangWeightSyncScheme(engine)
        collector = RayLLMCollector(
            functools.partial(recipes.make_env, task, tokenizer, questions=2, answers=1, seed=0),
            policy=SGLangWrapper(engine, generate_kwargs={"max_new_tokens": 6}),
            dialog_turns_per_batch=2,
            track_policy_version=True,
            remote_config={"num_cpus": 1},
        )
        scheme.attach(collector)
        batches = iter(collector)
        for version, folder in enumerate((tiny_llama, tiny_llama_b, tiny_llama)):
            model = load(folder)
            if version:
                collector.update_policy_weights_(model)
            assert_serves(pristine_server.url, model, version)
            batch = next(batches).reshape(-1)
            assert_sampled_from(model, batch)
            assert batch["generation"].policy_version.tolist() == [version] * 2
            assert batch["next", "policy_version"].reshape(-1).tolist() == [version] * 2
            assert collector.policy_version == version
        collector.shutdown()
        scheme.shutdown()
        ray.kill(collector._collector)  # TorchRL leaves the actor to the end of the program


@pytest.mark.slow
def test_the_recipes_ray_preset_trains_on_batches_that_an_actor_collects(
    pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    for kind, name in ((RayLLMCollector, "shutdown"), (recipes.RayServing, "close")):
        was = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, was=was, kind=kind: ended.append(kind.__name__) or was(self))
    words = settings(tiny_llama, pristine_server.url, tmp_path, steps=3)
    assert run_here("grpo_async", ["--preset", "ray_cpu", *words, "rollouts.ahead=0"])
    for row in rows_of(tmp_path):
        assert row["staleness_max"] == 0
        assert row["logprob_gap_max"] < 1e-3
    assert served_version(pristine_server.url) == 4
    positions = [sample["position"] for sample in samples_of(tmp_path)]
    # TorchRL's LLMCollector resets its environment once too often, so the first questions are skipped
    assert positions == [QUESTIONS + n for n in range(3 * QUESTIONS) for _ in range(ANSWERS)]
    gc.collect()
    assert ended == ["RayLLMCollector", "RayServing"], "a later shutdown call would start a new Ray"
    wait_until(lambda: ray.available_resources().get("CPU") == 2, "the collector's actor is still running", 30)


@pytest.mark.slow
def test_a_run_shuts_down_the_ray_that_it_started(
    pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path
) -> None:
    words = settings(tiny_llama, pristine_server.url, tmp_path / "run", steps=2)
    process = start("grpo_async", tmp_path / "log", ["--preset", "ray_cpu", *words])
    try:
        wait_for(lambda: (tmp_path / "run" / "model").exists(), process, tmp_path / "log")
        children = psutil.Process(process.pid).children(recursive=True)
        assert process.wait(timeout=90) == 0, (tmp_path / "log").read_text()[-4000:]
    finally:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left


# ---------------------------------------------------------------------------------------------------- servers in actors
@pytest.mark.slow
def test_servers_in_actors_take_weights_come_back_when_their_actor_is_killed_and_end_with_the_engine(
    launch: Callable[..., AsyncSGLang], tiny_llama_b: Path, cluster: Path
) -> None:
    lines: list[str] = []
    engine = launch(num_servers=2, placement=TWO_NODES, progress=lines.append, api_key=KEY)
    first, second = engine.servers
    assert [url.rsplit(":", 1)[0] for url in (first.url, second.url)] == ["http://127.0.0.1", "http://127.0.0.2"]
    assert any("Ray starts its actor" in line for line in lines)
    assert len(engine.pool.generate(PROMPTS, SAMPLING)) == 3
    with closing(WeightSync(engine.pool, SyncConfig(verify="off"), restart=engine.restart)) as sync:
        sync.push(load(tiny_llama_b))
        lost = psutil.Process(second.pid)
        ray.kill(actor_of(second))
        wait_until(lambda: not lost.is_running(), "the server outlived its actor", 20)
        assert second.has_crashed
        assert not second.is_running
        assert first.is_running
        report = sync.push(load(tiny_llama_b))
    assert report is not None
    assert report.server_weights == {first.url: "new", second.url: "new"}
    assert {version_number(r.weight_version) for r in engine.pool.generate(PROMPTS * 4, SAMPLING)} == {2}

    processes = [psutil.Process(server.pid) for server in engine.servers]
    engine.shutdown()
    wait_until(lambda: not any(process.is_running() for process in processes), "a server is left", 20)
    wait_until(lambda: ray.available_resources().get("CPU") == 2, "the bundles are still set aside", 20)
    assert where_it_says(cluster, KEY) == []


@pytest.mark.slow
def test_servers_join_and_leave_in_bundles_that_ray_gets_back(
    launch: Callable[..., AsyncSGLang], tiny_llama_b: Path
) -> None:
    engine = launch(num_servers=1, placement=RayPlacement(timeout_s=20))
    sync = WeightSync(engine.pool, SyncConfig(verify="off"), restart=engine.restart)
    sync.push(load(tiny_llama_b))
    (new,) = engine.add(1)
    assert not engine.pool.quarantined
    replies = engine.pool.generate(PROMPTS * 4, SAMPLING)
    assert {reply.server for reply in replies} == {new, engine.servers[0].url}
    assert {version_number(reply.weight_version) for reply in replies} == {1}
    with pytest.raises(ServerStartError, match="no room for 1 x"):
        engine.add(1)  # the cluster has two cores
    with pytest.raises(ConfigError, match="gpus are Ray's to decide"):
        engine.add(1, gpus=[[0]])
    engine.remove(engine.servers[0].url)
    wait_until(lambda: ray.available_resources().get("CPU") == 1, "the bundle is still set aside", 20)
    engine.scale_to(2)
    assert len(engine.pool.healthy) == 2
    processes = [psutil.Process(server.pid) for server in engine.servers]
    sync.close()
    engine.shutdown()
    wait_until(lambda: not any(process.is_running() for process in processes), "a server is left", 20)
    wait_until(lambda: ray.available_resources().get("CPU") == 2, "the bundles are still set aside", 20)


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why_and_keys_stay_secret(
    launch: Callable[..., AsyncSGLang], cluster: Path, tmp_path: Path
) -> None:
    with pytest.raises((ServerStartError, ConfigError)) as caught:
        launch(model=str(tmp_path / "nothing"), api_key=KEY)
    assert "nothing" in str(caught.value)
    assert KEY not in f"{caught.value!r}{caught.value}"
    assert where_it_says(cluster, KEY) == []


@pytest.mark.slow
def test_real_servers_on_two_addresses_answer_as_the_model_they_were_sent(
    needs_sglang: None, tiny_llama: Path, tiny_llama_b: Path
) -> None:
    placement = RayPlacement(hosts=("127.0.0.1", None))  # None: the node's own address
    with launch_on_ray(str(tiny_llama), num_servers=2, placement=placement, device="cpu") as engine:
        urls = [server.url for server in engine.servers]
        assert urls[0].startswith("http://127.0.0.1:")
        assert urls[1].startswith(f"http://{ray.util.get_node_ip_address()}:")
        assert_serves(urls, load(tiny_llama), 0, api_key=engine.api_key)
        with closing(WeightSync(engine.pool, SyncConfig(verify="full"), restart=engine.restart)) as sync:
            sync.push(load(tiny_llama_b))
        assert_serves(urls, load(tiny_llama_b), 1, api_key=engine.api_key)


def test_a_cluster_without_room_is_told(launch: Callable[..., AsyncSGLang]) -> None:
    with pytest.raises(ServerStartError, match=r"no room for 3 x \{'CPU': 1.0\}"):
        launch(num_servers=3, placement=RayPlacement(timeout_s=1))


def test_what_ray_decides_is_not_for_others_to_say(launch: Callable[..., AsyncSGLang]) -> None:
    for wrong, message in (
        ({"host": "0.0.0.0"}, "host is Ray's to decide"),
        ({"gpus": (0,)}, "gpus is Ray's to decide"),
        ({"num_servers": 2, "port": 30000}, "not port 30000"),
        ({"num_servers": 2, "placement": RayPlacement(hosts=("127.0.0.1",))}, "hosts must be 2"),
        ({"contxt_length": 8}, "Did you mean 'context_length'"),
    ):
        with pytest.raises(ConfigError, match=message):
            launch(**wrong)


def actor_of(server: Any) -> Any:
    assert isinstance(server, RayServer)
    return server.actor


def where_it_says(folder: Path, word: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and word.encode() in file.read_bytes()]
