"""A streamed sequence is sent, checked and sent again as a batch is: by the pool and by a chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.fake_sglang import FakeServer, Fault
from tests.fake_sglang.model import read_checkpoint
from tests.quick.pools import pool_of
from torchrl_sglang import (
    ConfigError,
    LethalPromptError,
    SamplingParams,
    ServerError,
    ServerLostError,
    SGLangChat,
    SyncConfig,
    WeightSync,
)
from torchrl_sglang.pool import SGLangPool

TWELVE = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
LETHAL = 11

Start = Callable[..., Iterator[object]]


def generates(server: FakeServer) -> int:
    return sum(event["path"] == "/generate" for event in server.events)


def by_pool(pool: SGLangPool, number: int = 2) -> Iterator[object]:
    return pool.stream([number, 2], TWELVE)


def by_chat(pool: SGLangPool, number: int = 2) -> Iterator[object]:
    return SGLangChat(pool, max_new_tokens=12, temperature=0).iter_chat(f"{number} and what is it?")


both = pytest.mark.parametrize("start", [by_pool, by_chat])


@both
def test_a_server_that_dies_before_the_first_token_is_replaced_by_another(
    make: Callable[..., FakeServer], start: Start
) -> None:
    dying, other = make(), make()
    pool = pool_of(dying, other)
    stream = start(pool)
    dying.arm(Fault(path="/generate", action="die", at="scheduled"))
    assert list(stream)
    assert list(pool.quarantined) == [dying.url]
    assert (generates(dying), generates(other)) == (1, 1)


@both
def test_a_server_that_was_dead_before_is_replaced_by_another(make: Callable[..., FakeServer], start: Start) -> None:
    dead, other = make(), make()
    pool = pool_of(dead, other)
    stream = start(pool)
    dead.stop()
    assert list(stream)
    assert list(pool.quarantined) == [dead.url]
    assert generates(other) == 1


@both
def test_streams_count_as_load(make: Callable[..., FakeServer], start: Start) -> None:
    servers = [make(step_s=0.01), make(step_s=0.01)]
    pool = pool_of(*servers)
    streams = [start(pool, number) for number in range(8)]
    for stream in streams:
        next(stream)
    assert [generates(server) for server in servers] == [4, 4]
    for stream in streams:
        list(stream)


def test_batches_go_where_no_stream_runs(make: Callable[..., FakeServer]) -> None:
    servers = [make(step_s=0.01), make()]
    pool = pool_of(*servers)
    with closing(pool.stream([1, 2], TWELVE)) as stream:
        first = next(stream).server
        assert {reply.server for reply in pool.generate([[3, 4]], TWELVE)} == {server.url for server in servers} - {
            first
        }


@both
def test_a_server_that_dies_after_the_first_token_ends_the_stream(
    make: Callable[..., FakeServer], start: Start
) -> None:
    servers = [make(step_s=0.05), make(step_s=0.05)]
    pool = pool_of(*servers)
    stream = start(pool)
    next(stream)
    (busy,) = [server for server in servers if generates(server)]
    busy.stop()
    with pytest.raises(ServerLostError):
        list(stream)
    assert list(pool.quarantined) == [busy.url]
    assert sum(generates(server) for server in servers) == 1


def test_a_prompt_that_two_servers_died_on_goes_to_no_third(make: Callable[..., FakeServer]) -> None:
    servers = [make(lethal_id=LETHAL) for _ in range(3)]
    pool = pool_of(*servers)
    with pytest.raises(LethalPromptError, match="two servers died on this prompt"):
        list(pool.stream([LETHAL, 2], TWELVE))
    assert sorted(generates(server) for server in servers) == [0, 1, 1]
    assert len(pool.healthy) == 1


@both
def test_a_stream_with_a_restarted_servers_weights_is_generated_elsewhere(
    make: Callable[..., FakeServer], tiny_llama: Path, start: Start
) -> None:
    restarted, other = make(), make()
    pool = pool_of(restarted, other)
    sync = WeightSync(pool, SyncConfig(verify="off"))
    tensors: dict[str, torch.Tensor] = read_checkpoint(tiny_llama)
    sync.push(tensors)
    restarted.set_state(weight_version="default")
    assert list(start(pool))
    assert "its process was replaced" in pool.quarantined[restarted.url]
    assert generates(other) == 1
    sync.close()


def test_the_only_server_that_dies_is_an_error(make: Callable[..., FakeServer]) -> None:
    server = make()
    pool = pool_of(server)
    server.arm(Fault(path="/generate", action="die", at="scheduled"))
    with pytest.raises(ServerLostError):
        list(pool.stream([1, 2], TWELVE))
    with pytest.raises(ServerError, match="no server is left, the stream was not begun"):
        list(pool.stream([1, 2], TWELVE))


def test_a_request_that_may_still_run_is_not_sent_again(make: Callable[..., FakeServer]) -> None:
    servers = [make(), make()]
    pool = pool_of(*servers)
    for server in servers:
        server.arm(Fault(path="/generate", action="drop", at="arrived"))
    with pytest.raises(ServerLostError):
        list(pool.stream([1, 2], TWELVE))
    assert sum(generates(server) for server in servers) == 1
    assert not pool.quarantined


def test_a_bad_stream_is_refused_before_the_first_step(make: Callable[..., FakeServer]) -> None:
    server = make()
    pool = pool_of(server)
    with pytest.raises(ConfigError, match="n=2"):
        pool.stream([1, 2], SamplingParams(n=2))
    with pytest.raises(ConfigError, match="timeout_s must be"):
        pool.stream([1, 2], TWELVE, timeout_s=0)
    with pytest.raises(ConfigError):
        pool.stream([10**9], TWELVE)
    assert generates(server) == 0


def test_replies_of_a_stream_count_as_seen(make: Callable[..., FakeServer]) -> None:
    server = make(weight_version="4@t")
    pool = pool_of(server)
    server.set_state(weight_version="5@t")
    list(pool.stream([1, 2], TWELVE))
    assert pool.state.weights.newest_seen.number == 5
