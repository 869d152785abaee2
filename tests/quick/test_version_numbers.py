"""Version numbers that a caller gives to a push."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.fake_sglang import FakeServer
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import ConfigError, SamplingParams, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool

WRONG = [True, -1, 1.5, "5", float("nan"), float("inf"), 10**30]


def test_what_is_no_version_number_is_refused_before_anything_is_sent(fake: FakeServer) -> None:
    client = SGLangClient(fake.url)
    sync = WeightSync(SGLangPool([client]), SyncConfig(transport="http", verify="off"))
    tensors = read_checkpoint(fake.settings.model_path)
    for wrong in WRONG:
        value: Any = wrong
        with pytest.raises(ConfigError, match="version must be"):
            sync.push(tensors, version=value)
        with pytest.raises(ConfigError, match="version must be"):
            sync.push_in_background(tensors, version=value)
    assert "/pause_generation" not in [event["path"] for event in fake.events]
    report = sync.push(tensors, version=np.int64(7))  # type: ignore[arg-type]
    assert report is not None
    assert report.version == 7
    assert type(report.version) is int
    sync.close()


def test_a_version_that_is_lower_than_one_before_is_refused_before_anything_is_sent(fake: FakeServer) -> None:
    sync = WeightSync(SGLangPool([SGLangClient(fake.url)]), SyncConfig(transport="http", verify="off"))
    tensors = read_checkpoint(fake.settings.model_path)
    sync.push(tensors, version=7)
    num_events = len(fake.events)
    with pytest.raises(ConfigError, match=r"version 6 is lower than 7.*Nothing was sent.*the next one \(8\)"):
        sync.push(tensors, version=6)
    with pytest.raises(ConfigError, match="version 0 is lower than 7"):
        sync.push_in_background(tensors, version=0)
    assert all(event["method"] == "GET" for event in fake.events[num_events:])
    for version in (7, 7, 9, None):  # the same again, as after a failure
        assert sync.push(tensors, version=version) is not None
    assert sync.last_report is not None
    assert sync.last_report.version == 10
    sync.close()


def test_a_version_that_is_pushed_again_meets_no_cache_of_the_first_push(fake: FakeServer) -> None:
    """The first one may have failed its verification: its weights were others."""
    pool = SGLangPool([SGLangClient(fake.url)])
    sync = WeightSync(pool, SyncConfig(transport="http", verify="off", cache="salt"))
    tensors = read_checkpoint(fake.settings.model_path)
    salts = []
    for version in (7, 7, 7, 8):
        sync.push(tensors, version=version)
        salts.append(pool.state.weights.cache_salt)
    assert len(set(salts)) == len(salts)
    sync.close()


@pytest.mark.parametrize("held", ["57@another", "57", "default"])
@pytest.mark.parametrize("first", [0, 40])
def test_a_trainer_that_resumes_begins_with_its_own_number_on_servers_that_hold_a_higher_one(
    make: Callable[..., FakeServer], held: str, first: int
) -> None:
    server = make(weight_version=held)
    tensors = read_checkpoint(server.settings.model_path)
    pool, watching = (SGLangPool([SGLangClient(server.url)]) for _ in range(2))
    watching.connect()
    sync = WeightSync(pool, SyncConfig(transport="http", verify="off"))
    for version in (first, first + 1):
        sync.push(tensors, version=version)
        for each in (pool, watching):
            (reply,) = each.generate([[1, 2, 3]], SamplingParams(max_new_tokens=2))
            assert reply.weight_version == f"{version}@{sync.owner}"
            assert not each.quarantined
    sync.close()
