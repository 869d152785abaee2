"""Transports without a process group, on a real SGLang server: shared memory, the request itself, and the choice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.loop.failure_matrix_runner import segments_of
from tests.loop.forked_processes import ProcessFactory, wait_until
from tests.loop.sync_cases import assert_serves, group_names, load
from torchrl_sglang import ClientConfig, SyncConfig, WeightCoverageError, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server import SGLangServer


@pytest.fixture(scope="module")
def model_a(tiny_llama: Path) -> Any:
    return load(tiny_llama)


@pytest.fixture
def model_b(tiny_llama_b: Path) -> Any:
    return load(tiny_llama_b)


def config_of(transport: Any, **settings: Any) -> SyncConfig:
    return SyncConfig(**{"transport": transport, "bucket_bytes": 60_000, "verify": "full", **settings})


@pytest.mark.parametrize("transport", ["auto", "http"])
def test_weights_arrive_exactly_without_a_process_group_staged_or_not(
    url: str, model_a: Any, model_b: Any, transport: str
) -> None:
    client = SGLangClient(url)
    groups, segments_before = group_names(client), segments_of(os.getpid())
    for stage in ("off", "always"):
        with closing(WeightSync(SGLangPool([client]), config_of(transport, stage=stage))) as sync:
            for model in (model_b, model_a, model_b):
                report = sync.push(model)
                assert report is not None
            assert report.transport == {"auto": "ipc"}.get(transport, transport)
            assert report.is_staged == (stage == "always")
            assert report.num_checksums > 0
            assert_serves(url, model_b, version=report.version)
        assert set(segments_of(os.getpid())) <= set(segments_before)
    assert group_names(client) == groups


def test_values_are_checked_before_the_pause_and_the_server_keeps_generating(url: str, model_a: Any) -> None:
    with closing(WeightSync(SGLangPool([SGLangClient(url)]), config_of("ipc", stage="always"))) as sync:
        report = sync.push(model_a)
        assert report is not None
        bad = {name: tensor.clone() for name, tensor in model_a.state_dict().items()}
        bad["model.norm.weight"][1] = float("inf")
        with pytest.raises(WeightCoverageError, match=r"model.norm.weight: 1 of \d+ elements NaN or infinite"):
            sync.push(bad)
        assert_serves(url, model_a, version=report.version)


def test_a_trainer_that_is_killed_while_it_sends_leaves_a_server_that_answers_and_no_segment(
    url: str, processes: ProcessFactory, tiny_llama_b: Path, model_a: Any
) -> None:
    trainer = processes.start_stalled_trainer(url, tiny_llama_b, inside_a_broadcast=False)  # auto: by ipc
    assert trainer.read() == "half of the tensors sent"
    assert segments_of(trainer.pid)
    trainer.kill()
    start = time.monotonic()
    pool = SGLangPool([SGLangClient(url, ClientConfig(probe_timeout_s=5, control_timeout_s=5))])
    pool.connect()
    # A server that waits in a broadcast does not answer for half an hour. On an idle machine the test takes 0.7 s.
    assert time.monotonic() - start < 4.9
    assert "dirty-1@" in pool.quarantined[url]
    wait_until(lambda: not segments_of(trainer.pid), "a segment stayed in shared memory", 15)
    with closing(WeightSync(pool, config_of("ipc"))) as sync:
        report = sync.push(model_a)
    assert report is not None
    assert not pool.quarantined
    assert_serves(url, model_a, version=report.version)


@pytest.mark.slow
@pytest.mark.parametrize("times", [200])
def test_nothing_grows_on_either_side_over_many_syncs_by_ipc(
    pristine_server: SGLangServer, url: str, model_a: Any, model_b: Any, times: int
) -> None:
    assert pristine_server.pid is not None
    server = psutil.Process(pristine_server.pid)
    sides = {"server": [server, *server.children(recursive=True)], "trainer": [psutil.Process()]}

    def usage() -> dict[str, int]:
        counts = {f"{side}'s descriptors": sum(each.num_fds() for each in sides[side]) for side in sides}
        counts |= {f"{side}'s threads": sum(each.num_threads() for each in sides[side]) for side in sides}
        helpers = [child for child in psutil.Process().children() if "keeper.py" in " ".join(child.cmdline())]
        return {**counts, "segments": len(segments_of(os.getpid())), "helpers": len(helpers)}

    with closing(WeightSync(SGLangPool([SGLangClient(url)]), config_of("ipc", verify="probe"))) as sync:
        for model in (model_a, model_b, model_a):
            sync.push(model)
        before, resident = usage(), sum(each.memory_info().rss for side in sides.values() for each in side)
        for index in range(times):
            sync.push((model_b, model_a)[index % 2])
        after = usage()
        for what, count in before.items():
            assert after[what] - count < 10, f"{what}: {count} before, {after[what]} after {times} syncs"
        assert after["segments"] == before["segments"]
        grown = sum(each.memory_info().rss for side in sides.values() for each in side) - resident
        assert grown < 100 * sum(parameter.nbytes for parameter in model_a.parameters())
        segments = set(segments_of(os.getpid()))
    assert not segments & set(segments_of(os.getpid()))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["ipc", "http"])
def test_every_tensor_parallel_rank_of_a_server_with_a_key_has_its_part(
    special_server: Callable[..., SGLangServer], model_b: Any, transport: str
) -> None:
    server = special_server(tp_size=2, api_key="secret", admin_api_key="admin")
    client = SGLangClient(server.url, ClientConfig(api_key="secret", admin_api_key="admin"))
    with closing(WeightSync(SGLangPool([client]), config_of(transport))) as sync:
        for shift in (0.0, 0.25):
            with torch.no_grad():
                for parameter in model_b.parameters():
                    parameter.add_(shift)
            report = sync.push(model_b)
            assert report is not None
            assert report.num_checksums > 0
            assert report.max_logprob_gap is not None
            assert report.max_logprob_gap < 1e-3


@pytest.fixture
def old_server(launch_server: Callable[..., SGLangServer], old_sglang_env: dict[str, str]) -> SGLangServer:
    return launch_server(env=old_sglang_env)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["auto", "http"])
def test_an_old_server_without_update_sessions_takes_them_too(
    old_server: SGLangServer, model_b: Any, transport: str
) -> None:
    """It can't compute checksums on a CPU (it calls CUDA), and the report says so."""
    config = config_of(transport, verify="probe")
    with closing(WeightSync(SGLangPool([SGLangClient(old_server.url)]), config)) as sync:
        report = sync.push(model_b)
    assert report is not None
    assert report.transport == {"auto": "ipc"}.get(transport, transport)
    assert "does not report checksums" in report.not_compared[old_server.url]
    assert_serves(old_server.url, model_b, version=report.version)
