"""Replies made with weights that nobody trained are generated again: of a server that was restarted by somebody else,
and of one whose verification fails after it has answered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_sglang import FakeServer
from tests.fake_sglang.model import read_checkpoint
from tests.quick.pools import pool_of
from tests.stale_tensors import reload_on_one_server
from torchrl_sglang import SamplingParams, ServerError, SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.parallel import Task
from torchrl_sglang.weights.update.verification import verify_servers

PLAIN = SyncConfig(verify="off")
ONE = SamplingParams(max_new_tokens=1)
PROMPTS = [[1, 2], [3, 4], [5, 6], [7, 8]]


@pytest.fixture
def tensors(tiny_llama: Path) -> dict[str, torch.Tensor]:
    return {name: tensor * (1 + 1 / 128) for name, tensor in read_checkpoint(tiny_llama).items()}


def test_prompts_of_a_server_that_somebody_else_restarted_are_generated_elsewhere(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    restarted, other = make(), make()
    pool = pool_of(restarted, other)
    sync = WeightSync(pool, PLAIN)
    sync.push(tensors)
    restarted.set_state(weight_version="default")
    replies = pool.generate(PROMPTS, ONE)
    assert {(reply.server, reply.weight_version) for reply in replies} == {(other.url, f"1@{sync.owner}")}
    assert "its process was replaced: it holds version 'default'" in pool.quarantined[restarted.url]
    sync.push(tensors)
    assert not pool.quarantined
    assert {reply.server for reply in pool.generate(PROMPTS, ONE)} == {restarted.url, other.url}
    sync.close()


def test_the_only_server_restarted_by_somebody_else_is_an_error_that_says_so(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    server = make()
    pool = pool_of(server)
    sync = WeightSync(pool, PLAIN)
    sync.push(tensors)
    server.set_state(weight_version="default")
    with pytest.raises(ServerError, match="its process was replaced"):
        pool.generate(PROMPTS, ONE)
    server.set_state(weight_version="default")
    sync.push(tensors)
    server.set_state(weight_version="default")
    with pytest.raises(ServerError, match="its process was replaced"):
        list(pool.stream([1, 2], ONE))
    sync.close()


def test_a_pool_that_never_updated_a_server_notices_by_its_replies(make: Callable[..., FakeServer]) -> None:
    server, other = make(weight_version="4@t"), make(weight_version="4@t")
    pool = pool_of(server, other)
    for fake in (server, other):
        fake.set_state(weight_version="5@t")
    pool.generate(PROMPTS, ONE)
    server.set_state(weight_version="default")
    assert {reply.server for reply in pool.generate(PROMPTS, ONE)} == {other.url}


@pytest.mark.parametrize("version", ["3@another", "somebody-elses-experiment", "13@t"])
def test_another_trainers_numbers_are_no_restart(make: Callable[..., FakeServer], version: str) -> None:
    server = make(weight_version="12@t")
    pool = pool_of(server)
    server.set_state(weight_version=version)
    assert pool.generate(PROMPTS[:1], ONE)[0].weight_version == version
    assert not pool.quarantined


def test_an_update_takes_a_server_that_somebody_else_restarted_into_a_new_group(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    """Nothing was generated since: the update itself notices, before the servers are told of a bucket."""
    servers = [make(), make()]
    pool = pool_of(*servers)
    sync = WeightSync(pool, PLAIN)
    sync.push(tensors)
    servers[0].set_state(weight_version="default")
    report = sync.push(tensors)
    assert report is not None
    assert set(report.server_weights.values()) == {"new"}
    assert pool.state.server(servers[0].url).restarts == 1
    joins = [event for event in servers[0].events if event["path"] == "/init_weights_update_group"]
    assert len(joins) == 2
    sync.close()


@pytest.mark.parametrize("is_good", [True, False], ids=["verified", "rejected"])
def test_answers_given_before_the_verification_wait_for_it(
    make: Callable[..., FakeServer],
    tensors: dict[str, torch.Tensor],
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_good: bool,
) -> None:
    may_verify = threading.Event()

    def verify_later(*args: Any, **options: Any) -> None:
        assert may_verify.wait(60)
        verify_servers(*args, **options)

    monkeypatch.setattr("torchrl_sglang.weights.push.verify_servers", verify_later)
    server, other = make(), make()
    pool = pool_of(server, other)
    pool.quarantine(other.url, "so that the prompt goes to the first server")
    sync = WeightSync(pool, SyncConfig(verify_atol=1e9))
    if not is_good:
        reload_on_one_server(sync, server.url, tiny_llama)
    pushing = Task(lambda: sync.push(tensors), name="push")
    while pool.state.server(server.url).is_verified and not pushing.done:
        pushing.wait(0.005)
    generating = Task(lambda: pool.generate(PROMPTS[:1], ONE), name="generate")
    while not any(event["path"] == "/generate" and event["status"] == 200 for event in server.events):
        assert not generating.wait(0.005)
    assert not generating.wait(0.1)
    may_verify.set()
    (reply,) = generating.outcome().unwrap()
    assert reply.weight_version == f"1@{sync.owner}"
    if is_good:
        assert pushing.outcome().unwrap() is not None
    else:
        assert isinstance(pushing.outcome().error, WeightUpdateError)
        assert reply.server == other.url
    assert pool.state.server(server.url).is_verified
    sync.close()
