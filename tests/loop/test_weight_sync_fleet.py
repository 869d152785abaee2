"""Weight sync with several servers, several ranks, and servers of one's own that die; and other architectures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.loop.sync_cases import PROMPTS, assert_serves, load
from torchrl_sglang import (
    AsyncSGLang,
    ClientConfig,
    SamplingParams,
    ServerError,
    SGLangWeightSyncScheme,
    SyncConfig,
    WeightSync,
    WeightUpdateError,
)
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server import SGLangServer

SMALL_BUCKETS = SyncConfig(transport="broadcast", bucket_bytes=60_000, verify="full")
two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")


@pytest.mark.parametrize(
    "settings",
    [
        # biases; one tensor under two names
        pytest.param({"arch": "qwen2", "tied": True}, marks=pytest.mark.slow),
        pytest.param({"arch": "qwen2"}, marks=pytest.mark.slow),
        pytest.param({"arch": "qwen3", "tied": True}, marks=pytest.mark.slow),
        pytest.param({"arch": "qwen3"}, marks=pytest.mark.slow),
        pytest.param({"arch": "llama", "tied": True}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_other_architectures_arrive_too(
    special_server: Callable[..., SGLangServer], make_model: Callable[..., Path], settings: dict[str, Any]
) -> None:
    url = special_server(model=str(make_model(**settings))).url
    new = load(make_model(**settings, seed=5))
    with closing(WeightSync(SGLangPool([SGLangClient(url)]), SMALL_BUCKETS)) as sync:
        report = sync.push(new)
        assert report is not None
        assert report.num_bytes == sum(p.nbytes for p in new.parameters())  # a tied tensor counts once on both sides
        assert_serves(url, new, version=1)
        sync.push(load(make_model(**settings)))
        assert_serves(url, load(make_model(**settings)), version=2)


@pytest.fixture
def mixed_fleet(pristine_server: SGLangServer, special_server: Callable[..., SGLangServer]) -> Iterator[list[str]]:
    """One server of one rank and one of two: a world of four with the trainer."""
    return [special_server(tp_size=2).url, pristine_server.url]


@pytest.mark.slow
@two_cores
@pytest.mark.parametrize("groups", ["shared", "per_server"])
def test_servers_with_one_and_two_ranks_are_updated_together(
    mixed_fleet: list[str], tiny_llama: Path, tiny_llama_b: Path, groups: Any
) -> None:
    pool = SGLangPool([SGLangClient(url) for url in mixed_fleet])
    pool.connect()
    start = pool.weight_version
    # The checksums of a split server differ from a whole one's, so the probe has to do.
    config = SyncConfig(bucket_bytes=60_000, groups=groups)
    with closing(WeightSync(pool, config)) as sync:
        for index, folder in enumerate((tiny_llama_b, tiny_llama), start=1):
            report = sync.push(load(folder))
            assert report is not None
            assert report.server_weights == dict.fromkeys(mixed_fleet, "new")
            assert report.max_logprob_gap < 1e-4
            assert_serves(mixed_fleet, load(folder), version=start + index)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_fleet_is_updated_and_a_server_of_ours_that_died_comes_back_with_current_weights(
    needs_sglang: None, tiny_llama: Path, tiny_llama_b: Path
) -> None:
    model_a, model_b = load(tiny_llama), load(tiny_llama_b)
    with AsyncSGLang.from_pretrained(str(tiny_llama), dp_size=2, device="cpu", start_timeout_s=300) as engine:
        urls = [client.url for client in engine.pool.clients]
        scheme = SGLangWeightSyncScheme(engine, config=SMALL_BUCKETS)
        attached = WeightSync(SGLangPool([SGLangClient(urls[0], ClientConfig(api_key=engine.api_key))]), SMALL_BUCKETS)
        try:
            scheme.sync.push(model_b)
            assert_serves(urls, model_b, version=1, api_key=engine.api_key)
            attached.push(model_b, version=1)

            kill(engine.servers[0])
            # Attached, one can only say so, and soon.
            with pytest.raises(WeightUpdateError, match=f"no server can be reached.*{urls[0]}") as caught:
                attached.push(model_a)
            assert caught.value.server_weights == {urls[0]: "stuck"}
            # Without an update the other serves on.
            assert engine.pool.generate(PROMPTS * 2, SamplingParams(max_new_tokens=1))
            assert list(engine.pool.quarantined) == [urls[0]]
            # The next update brings it back, with the update's weights.
            scheme.sync.push(model_a)
            assert not engine.pool.quarantined
            assert_serves(urls, model_a, version=2, api_key=engine.api_key)

            for server in engine.servers:
                kill(server)
            with pytest.raises(ServerError):
                engine.pool.generate(PROMPTS, SamplingParams(max_new_tokens=1))
            scheme.sync.heal()
            assert not engine.pool.quarantined
            assert_serves(urls, model_a, version=3, api_key=engine.api_key)
        finally:
            attached.close()
            scheme.shutdown()


def kill(server: SGLangServer) -> None:
    assert server.pid is not None
    main = psutil.Process(server.pid)
    processes = [main, *main.children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=20)
