"""Which servers share a process group, that groups are made side by side, and limits that follow from sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fake_sglang import FakeServer, Fault
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import AsyncSGLang, SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.weights.transports.broadcast import divide

JOIN, BUCKET = "/init_weights_update_group", "/update_weights_from_distributed"


def servers(*devices: str) -> list[Any]:
    return [SimpleNamespace(url=str(index), info=SimpleNamespace(device=each)) for index, each in enumerate(devices)]


@pytest.mark.parametrize(
    ("settings", "devices", "sizes"),
    [
        ({}, ["cpu"] * 3, [1, 1, 1]),
        ({}, ["cuda"] * 3, [3]),
        ({"backend": "gloo"}, ["cuda"] * 3, [1, 1, 1]),
        ({"groups": "shared"}, ["cpu"] * 3, [3]),
        ({"groups": "per_server"}, ["cuda"] * 3, [1, 1, 1]),
    ],
    ids=str,
)
def test_gloo_has_a_group_per_server_and_nccl_one_for_all(
    settings: dict[str, Any], devices: list[str], sizes: list[int]
) -> None:
    assert [len(group) for group in divide(servers(*devices), SyncConfig(**settings))] == sizes


def test_the_default_makes_a_group_per_server_and_all_are_asked_to_join_at_once(
    make: Callable[..., FakeServer], tiny_llama: Path
) -> None:
    fakes = [make(), make(), make()]
    pool = SGLangPool([SGLangClient(fake.url) for fake in fakes])
    sync = WeightSync(pool, SyncConfig(verify="off", group_timeout_s=1.0))
    fakes[0].arm(Fault(path=JOIN, action="refuse"))
    fakes[1].arm(Fault(path=JOIN, action="hang"))
    with pytest.raises(WeightUpdateError):
        sync.push(read_checkpoint(tiny_llama))
    joins = [[event["body"] for event in fake.events if event["path"] == JOIN] for fake in fakes]
    assert [len(each) for each in joins] == [1, 1, 1], "one group was made after the other"
    assert {body["world_size"] for (body,) in joins} == {2}
    assert all(body["rank_offset"] == 1 for (body,) in joins)
    sync.close()


def test_a_trainer_tells_the_ranks_how_long_it_waits_itself(make: Callable[..., FakeServer], tiny_llama: Path) -> None:
    fake = make()
    for config in (SyncConfig(verify="off"), SyncConfig(verify="off", bucket_timeout_s=500)):
        sync = WeightSync(SGLangPool([SGLangClient(fake.url)]), config)
        sync.push(read_checkpoint(tiny_llama))
        sync.close()
    names = [event["body"]["group_name"] for event in fake.events if event["path"] == JOIN]
    assert [int(name.rpartition(".")[2]) for name in names] == [91, 530]


def test_the_largest_tensor_may_take_longer_than_a_bucket() -> None:
    config = SyncConfig(assumed_bytes_per_s=1e9)
    assert config.bucket_limit_s(config.bucket_size(2 * 10**12)) == 60
    assert config.bucket_limit_s(10**11) == 100
    assert replace(config, bucket_timeout_s=200).bucket_limit_s(10**11) == 200


def test_a_large_checkpoint_has_more_time_to_start(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    with model.open("wb") as file:
        file.truncate(2 * 10**12)  # a sparse file
    started = SGLangServer(ServerConfig(model=str(tmp_path)))
    assert started._lifecycle._start_timeout_s == 600 + 10_000
    assert SGLangServer(ServerConfig(model="some/hub-model"))._lifecycle._start_timeout_s == 600


def test_an_engine_says_which_servers_are_in_a_group(make: Callable[..., FakeServer]) -> None:
    fake = make()
    with AsyncSGLang.connect(fake.url) as engine:
        (choice,) = engine.init_weight_update_group("127.0.0.1").values()
        assert choice.transport == "broadcast"
        assert [event["body"]["master_address"] for event in fake.events if event["path"] == JOIN] == ["127.0.0.1"]
