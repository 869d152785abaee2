"""A server that a failed update has left behind joins and waits for the next one, unless its update may go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.fake_sglang import FakeServer, Fault
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import ConfigError, SamplingParams, SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.group.trainer_mark import TrainerMark

Make = Callable[..., FakeServer]
Tensors = dict[str, torch.Tensor]
PROMPTS = [[index + 3, 7, 8] for index in range(8)]
SHORT = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)


@pytest.fixture
def tensors(tiny_llama: Path) -> Tensors:
    return read_checkpoint(tiny_llama)


@pytest.fixture
def servers(make: Make) -> tuple[FakeServer, FakeServer]:
    return make(), make()


@pytest.fixture
def pool(servers: tuple[FakeServer, FakeServer]) -> SGLangPool:
    made = SGLangPool([SGLangClient(server.url) for server in servers])
    made.connect()
    return made


@pytest.fixture
def sync(pool: SGLangPool) -> Iterator[WeightSync]:
    with closing(WeightSync(pool, SyncConfig(verify="off", transport="http"))) as made:
        yield made


def trained(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def servers_of(pool: SGLangPool) -> set[str]:
    return {reply.server for reply in pool.generate(PROMPTS, SHORT)}


def test_one_that_this_trainers_update_has_left_behind(
    servers: tuple[FakeServer, FakeServer], pool: SGLangPool, sync: WeightSync, tensors: Tensors
) -> None:
    first, second = servers
    sync.push(tensors)
    second.arm(Fault(path="/end_weight_update", action="refuse"))
    with pytest.raises(WeightUpdateError):
        sync.push(trained(tensors))
    assert pool.clients[1].weight_version().startswith("dirty-")
    pool.remove(second.url)
    pool.add(second.url)
    assert "does not hold the current weights yet" in pool.quarantined[second.url]
    assert servers_of(pool) == {first.url}
    sync.push(trained(tensors))
    assert servers_of(pool) == {first.url, second.url}
    assert torch.equal(second.weights[0]["lm_head.weight"], trained(tensors)["lm_head.weight"])


def test_one_that_a_trainer_has_left_behind_which_has_ended_and_none_whose_trainer_may_live(
    make: Make, pool: SGLangPool, sync: WeightSync, tensors: Tensors
) -> None:
    sync.push(tensors)
    here = TrainerMark.own("a1b2c3d4.1")
    ended = make(weight_version=f"dirty-7@{replace(here, started=here.started + 1)}")
    elsewhere = make(weight_version=f"dirty-7@{replace(here, host='00000000')}")
    with pytest.raises(ConfigError, match="another process is updating it"):
        pool.add(elsewhere.url)
    pool.add(ended.url)
    assert ended.url in pool.quarantined
    sync.push(trained(tensors))
    assert ended.url in servers_of(pool)
    assert torch.equal(ended.weights[0]["lm_head.weight"], trained(tensors)["lm_head.weight"])


def test_none_joins_a_pool_that_sends_no_weights(make: Make, pool: SGLangPool) -> None:
    here = TrainerMark.own("a1b2c3d4.1")
    with pytest.raises(ConfigError, match="another process is updating it"):
        pool.add(make(weight_version=f"dirty-7@{replace(here, started=here.started + 1)}").url)
